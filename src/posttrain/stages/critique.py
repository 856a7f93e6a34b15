"""The kind `critique`: a policy criticises and revises its answers. `constitution/critique.py` does the work."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from posttrain.stages.judge_settings import (
    POLICY,
    JudgedSettings,
    JudgeSettings,
    check_judge,
    judge_reads,
    judge_settings,
    weak_judge,
)
from posttrain.stages.kind import PROMPTS, Earlier, Input, Reads, Section, Sizes, StageKind, Work

# The judge that is the policy which answers.
SELF = POLICY + "init"


class CritiqueStage(JudgedSettings):
    """Demonstrations from self-critique: a policy answers prompts, looks for faults by drawn principles, and revises."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"gate"})

    kind: Literal["critique"]
    """Stage kind."""
    judge: str | JudgeSettings = SELF
    """Who compares each revision with the answer before it; `policy:init` is the policy that answers."""
    gate: Literal["stop", "report"] = "stop"
    """`stop` ends the run if the judge does not prefer the revisions, or fails its audit; `report` records it and goes on."""
    gate_pairs: Annotated[int, Field(ge=1)] = 200
    """Largest number of revisions that the judge compares."""
    rounds: Annotated[int, Field(ge=1, le=16)] = 2
    """Rounds of critique and revision. Each draws a principle for each prompt, independently of the other rounds."""
    keep: Literal["all", "last"] = "all"
    """Which revisions of a prompt become demonstrations: those of all rounds, or the last one."""
    detection: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a fault, as the policy sees it, from which an answer is criticised and revised; 0 always does."""
    examples: Annotated[int, Field(ge=0, le=64)] = 4
    """Worked examples of the principle before the question for a fault, before a critique and before a revision."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    """Longest answer and longest revision in tokens; a revision that does not end is dropped, counted and shown."""
    critique_tokens: Annotated[int, Field(ge=1, le=8192)] = 96
    """Longest critique in tokens."""


def judge_of(stage: CritiqueStage) -> JudgeSettings:
    """The judge of a stage, with the name of the policy that `policy:init` means."""
    settings = judge_settings(stage.judge)
    return settings.model_copy(update={"name": POLICY + stage.init}) if settings.name == SELF else settings


def _reads(stage: CritiqueStage) -> Reads:
    judge = judge_reads(judge_of(stage))
    return judge._replace(policies=(stage.init, *judge.policies))


def _check(stage: CritiqueStage, earlier: Earlier) -> None:
    check_judge(judge_of(stage), earlier)


def _estimate(stage: CritiqueStage, report: dict[str, Any], sizes: Sizes) -> Work:
    """An answer a prompt, and in each round a critique and a revision; worked examples are not counted."""
    rows = report["train_rows"]
    a_round = rows * (stage.critique_tokens + stage.max_new_tokens)
    new = rows * stage.max_new_tokens + stage.rounds * a_round
    # A round reads the prompt and the answer three times: for the detection, the critique and the revision.
    read = report["tokens"] + 3 * stage.rounds * (report["tokens"] + rows * stage.max_new_tokens)
    return Work(rows, read + new, new, 2.0 * ((read + new) * sizes.body + new * sizes.head))


def _refuses(stage: CritiqueStage, manifest: Mapping[str, Any]) -> str:
    if stage.gate == "report":
        return ""
    failed = manifest.get("gate", {}).get("passes") is False
    return 'its revisions did not pass the gate, and gate is "stop"' if failed else weak_judge(stage, manifest)


KIND = StageKind(
    settings=CritiqueStage,
    makes="rows",
    content="demonstrations",
    code=1,
    inputs=(Input("data", PROMPTS),),
    prepare="posttrain.constitution.critique:prepare_critique",
    run="posttrain.constitution.critique:write_revisions",
    reads=_reads,
    check=_check,
    estimate=_estimate,
    documents="posttrain.constitution.documents:judged_documents",
    refuses=_refuses,
    sections=(Section("revisions", "Critique and revision", "posttrain.report.constitution:revisions"),),
)
