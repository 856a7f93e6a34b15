"""What a stage with a judge reads besides its data: constitution and gold pairs. Their hashes are part of its fingerprint.

This runs when a run is planned, so a principle without a comparison question is an error before a weight is read. It does not
import torch.
"""

import importlib.util

from posttrain.artifacts import hash_file, read_manifest
from posttrain.constitution.principles import load_constitution
from posttrain.data.sources import data_hashes
from posttrain.errors import EndpointError, RecipeError
from posttrain.judge.audit import GOLD
from posttrain.models.source import locate_base
from posttrain.settings import ROWS_OF
from posttrain.stages.judge_settings import ENDPOINTS, POLICY, REWARD, RULE, JudgedSettings, judge_settings


def judged_documents(stage: JudgedSettings) -> dict[str, str]:
    """Hashes by name. Raises RecipeError for a constitution that cannot be used, and DataError for a gold file that cannot be
    read."""
    constitution = load_constitution(stage.constitution)
    constitution.without(stage.leave_out, f'stage "{stage.name}"').having("comparison", f"constitution {stage.constitution}")
    if stage.gold.startswith(ROWS_OF):
        found = f'gold = "{stage.gold}" is made by the run'
        raise RecipeError(f'stage "{stage.name}"', found, allowed="starter, or a file of pairs that people labelled")
    gold = hash_file(GOLD) if stage.gold == "starter" else data_hashes(stage.gold)[stage.gold]
    documents = {f"constitution {stage.constitution}": constitution.fingerprint, f"gold {stage.gold}": gold}
    return documents | _judge(stage)


def _judge(stage: JudgedSettings) -> dict[str, str]:
    """The weights of a judge that is not of this run. Raises ModelError if there is none, EndpointError without httpx."""
    name = judge_settings(stage.judge).name
    if name.startswith(ENDPOINTS) and importlib.util.find_spec("httpx") is None:
        do = 'install the extra: pip install "posttrain[endpoints]"'
        raise EndpointError(f'stage "{stage.name}"', f'judge = "{name.split("@")[-1]}" needs httpx', do=do)
    if name.startswith((*ENDPOINTS, POLICY, REWARD, RULE)):
        return {}
    from posttrain.models.target import split_target  # imports torch

    if (split := split_target(name)) is not None:
        run, policy = split
        manifest = read_manifest(run / policy) or {}
        return {f"judge {name}": str(manifest.get("fingerprint", policy))}
    return {f"judge {name}": locate_base(name).weights_hash}
