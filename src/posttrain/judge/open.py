"""Opens the judge that a recipe or a command names, and closes it.

policy:NAME · reward:NAME     a policy or a reward model of the run, on the base that is loaded
rule:package.module:function  a function, in a process of its own
http://… · https://…          a model behind an OpenAI-compatible server
anything else                 a stage of another run (RUN/STAGE), or a model: a package, a folder, a file, a hub id
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from posttrain.errors import RecipeError
from posttrain.generate.remote import Remote, RemoteSettings
from posttrain.judge.endpoint import EndpointJudge
from posttrain.judge.function_source import source_hash
from posttrain.judge.functions import FunctionWorker
from posttrain.judge.local import LocalJudge
from posttrain.judge.reasoning import Reasoning
from posttrain.judge.rule import RuleJudge
from posttrain.judge.scorer import RewardJudge
from posttrain.judge.verdict import PairwiseJudge
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import BaseModel
from posttrain.models.target import open_reward_model, open_target
from posttrain.recipe import load_recipe
from posttrain.stages import makes
from posttrain.stages.judge_settings import ENDPOINTS, POLICY, REWARD, RULE, JudgeSettings
from posttrain.stop import StopSignal


class JudgeContext(NamedTuple):
    """What a judge may use: the run's base and policies, a folder for replies of servers, and the planned hashes of functions.

    `where` begins the errors. Outside of a run there is no base.
    """

    base: BaseModel | None
    policies: Policies | None
    cache: Path
    stop: StopSignal | None = None
    functions: Mapping[str, str] = {}
    where: str = "judge"


@contextmanager
def open_judge(settings: JudgeSettings, context: JudgeContext) -> Iterator[PairwiseJudge]:
    """The judge that `settings` names, usable inside the block.

    Raises PosttrainError if it cannot be opened: RecipeError for a policy outside of a run, for a function that cannot be
    imported or was edited since the run was planned, EndpointError for an address, ModelError for a model.
    """
    name = settings.name
    if name.startswith(RULE):
        with closing(_open_worker(settings, context)) as worker:
            source = context.functions.get(worker.reference) or source_hash(worker.reference)
            yield RuleJudge(worker, name, source=source, where=context.where)
    elif name.startswith(ENDPOINTS):
        with closing(_open_remote(settings, context)) as remote:
            yield EndpointJudge(remote, f"{settings.model} at {remote.identity()['address']}", reasoning=_reasoning(settings))
    elif name.startswith((POLICY, REWARD)):
        yield _open_own(settings, context)
    else:
        yield _open_model(settings, context)


def _reasoning(settings: JudgeSettings) -> Reasoning | None:
    if not settings.reasoning:
        return None
    return Reasoning(settings.reasoning, settings.reasoning_tokens, settings.clamp)


def _open_worker(settings: JudgeSettings, context: JudgeContext) -> FunctionWorker:
    function = settings.name.removeprefix(RULE)
    return FunctionWorker(
        function, timeout=settings.timeout, where=context.where, stop=context.stop, planned=context.functions.get(function)
    )


def _open_remote(settings: JudgeSettings, context: JudgeContext) -> Remote:
    if not settings.model:
        found = f'judge = "{settings.name}" without the name of a model'
        raise RecipeError(context.where, found, allowed="a model that the server has", do="name the model")
    remote = RemoteSettings(
        settings.name, settings.model, settings.key, settings.concurrency, settings.timeout, settings.retries,
        settings.max_requests, settings.max_tokens,
    )  # fmt: skip
    return Remote(remote, context.cache, where=f"{context.where}, judge", stop=context.stop)


def _open_own(settings: JudgeSettings, context: JudgeContext) -> PairwiseJudge:
    """A policy or a reward model of the run."""
    base, policies, name = context.base, context.policies, settings.name
    if base is None or policies is None:
        do = "give RUN/STAGE: the run folder and the name of the stage"
        raise RecipeError(context.where, f'"{name}" outside of a run', allowed="policy: and reward: in a recipe", do=do)
    if name.startswith(REWARD):
        return RewardJudge(base, name.removeprefix(REWARD), name, activate=policies.activate)
    policy = name.removeprefix(POLICY)
    return LocalJudge(base, policy, name, activate=policies.activate, reasoning=_reasoning(settings))


def _open_model(settings: JudgeSettings, context: JudgeContext) -> PairwiseJudge:
    """A stage of another run or a model, loaded for this. The base of the run is not loaded twice."""
    name, reasoning = settings.name, _reasoning(settings)
    base, policies = context.base, context.policies
    if base is not None and policies is not None and name == base.source.model and settings.template == "auto":
        return LocalJudge(base, "base", name, activate=policies.activate, reasoning=reasoning)
    path = Path(name)
    recipe = path.parent / "recipe.toml"
    if recipe.is_file() and any(s.name == path.name and makes(s.kind) == "reward model" for s in load_recipe(recipe).stage):
        scorer = open_reward_model(name)
        return RewardJudge(scorer.base, scorer.adapter, name)
    target = open_target(name, template=settings.template)
    return LocalJudge(target.base, target.policy, name, activate=target.policies.activate, reasoning=reasoning)
