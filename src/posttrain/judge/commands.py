"""The command `posttrain judge audit`. Heavy imports happen inside its functions."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.arguments import integer
from posttrain.terminal import show_text

if TYPE_CHECKING:
    from posttrain.judge.verdict import PairwiseJudge

if TYPE_CHECKING:
    pass

EXAMPLE = "posttrain judge audit package:smollm2-135m-instruct --pairs starter"


def add_options(verb: argparse.ArgumentParser) -> None:
    """Options of `posttrain judge audit`."""
    verb.add_argument("judge", metavar="MODEL_OR_RUN/STAGE", help="a model, a policy of a run, or a reward stage of a run")
    verb.add_argument("--pairs", default="starter", metavar="FILE", help="gold pairs (default: starter)")
    verb.add_argument("--question", help="the question about two answers")
    verb.add_argument("--limit", type=integer(0), default=0, help="use only the first pairs; 0 uses all")
    verb.add_argument("--template", default="auto", help="chat template for a model without one (runs record theirs)")
    verb.add_argument("--json", action="store_true", help="print JSON")


def audit(options: argparse.Namespace) -> int:
    """Audit a judge. Returns 0 if it passes, else 1. Raises PosttrainError if the judge or the pairs cannot be loaded."""
    from posttrain.judge.audit import QUESTION, read_gold
    from posttrain.judge.audit import audit as examine

    pairs = read_gold(options.pairs, limit=options.limit)
    figures = examine(open_judge(options.judge, template=options.template), pairs, question=options.question or QUESTION)
    show_text(json.dumps(figures, indent=2, ensure_ascii=False) if options.json else text(figures))
    return 0 if figures["passes"] else 1


def open_judge(name: str, *, template: str = "auto") -> "PairwiseJudge":
    """Open a judge by name: `RUN/STAGE` of a policy or a reward model, or a base model. Raises PosttrainError."""
    from posttrain.judge.local import LocalJudge
    from posttrain.judge.scorer import RewardJudge
    from posttrain.models.target import open_reward_model, open_target
    from posttrain.recipe import load_recipe
    from posttrain.stages import makes

    path = Path(name)
    recipe = path.parent / "recipe.toml"
    if recipe.is_file() and any(s.name == path.name and makes(s.kind) == "reward model" for s in load_recipe(recipe).stage):
        scorer = open_reward_model(name)
        return RewardJudge(scorer.base, scorer.adapter, name)
    target = open_target(name, template=template)
    return LocalJudge(target.base, target.policies.activate(target.policy), name)


def text(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{figures['judge']['judge']} · {figures['pairs']} pairs · {figures['decided']} decided", ""]
    rows = [
        ("accuracy of decided pairs", figures["accuracy"], "must be above 50 %"),
        ("accuracy of single orders", figures["each_order"], ""),
        ("both orders agree", figures["consistency"], ""),
        ("accuracy where they agree", figures["accuracy_if_consistent"], ""),
        ("prefers the answer shown first", figures["first"], "50 % is unbiased"),
        ("the same for identical answers", figures["identical"], "50 % is unbiased"),
        ("prefers the longer answer", figures["prefers_longer"], _gold_longer(figures)),
        ("changed by an injected instruction", figures["injections"], "at most 2 %"),
        ("grades single answers correctly", figures["detection"], "50 % is chance"),
        *((f"  {name}", figure, "") for name, figure in figures["by_category"].items()),
    ]
    lines += [f"{label:<36} {_share(figure):<26} {note}".rstrip() for label, figure, note in rows]
    lines += [f"abstained on {count}: {why}" for why, count in figures["abstained"].items()]
    verdict = "passed: the interval of its accuracy is above chance"
    if not figures["passes"]:
        verdict = "failed: the interval of its accuracy includes chance or is below it"
    return "\n".join([*lines, "", verdict])


def _share(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.1%} ({figure['low']:.1%}–{figure['high']:.1%}) n {figure['n']}"


def _gold_longer(figures: dict[str, Any]) -> str:
    return "" if figures["gold_longer"] is None else f"the better answer is longer in {figures['gold_longer']:.0%}"
