"""Open the judge of a stage and audit it before it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from posttrain.judge.open import JudgeContext, open_judge
from posttrain.judge.trust import Trust, audit_before_use
from posttrain.judge.verdict import PairwiseJudge
from posttrain.stages.judge_settings import JudgedSettings, JudgeSettings
from posttrain.train.stage import StageContext

# The folder of a run with the replies of servers, so that no stage asks twice.
CACHE = "judge-cache"


class Judging(NamedTuple):
    """A judge that may be used, with the result of its audit."""

    judge: PairwiseJudge
    trust: Trust
    manifest: dict[str, Any]

    @property
    def failure(self) -> str:
        """That the judge failed its audit, with the figures."""
        accuracy = self.trust.figures.get("accuracy")
        share = (
            "decided no pair" if accuracy is None
            else f"accuracy {accuracy['value']:.0%} ({accuracy['low']:.0%}–{accuracy['high']:.0%}) of {accuracy['n']} pairs"
        )  # fmt: skip
        return f"the judge {self.judge.name} failed its audit ({share})"

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning if the judge failed its audit and is used anyway."""
        return () if self.trust.passes else (f"{self.failure}, and is used anyway",)


@contextmanager
def judging(context: StageContext, stage: JudgedSettings, settings: JudgeSettings, *, allow_weak: bool) -> Iterator[Judging]:
    """The audited judge of a stage. Raises JudgeError if it fails its audit and `allow_weak` is false."""
    where = f'stage "{stage.name}"'
    opened = JudgeContext(
        context.base, context.policies, context.folder.parent / CACHE, context.stop, context.sources, where
    )  # fmt: skip
    with open_judge(settings, opened) as judge:
        trust = audit_before_use(judge, gold=stage.gold, allow_weak=allow_weak, where=where, folder=context.folder)
        manifest = {
            **judge.identity(), "name": judge.name, "passes": trust.passes, "allowed_weak": not trust.passes,
            "accuracy": trust.figures.get("accuracy"),
        }  # fmt: skip
        yield Judging(judge, trust, manifest)
