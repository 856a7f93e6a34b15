"""`posttrain judge audit`: its options, what it runs, and its text. Nothing heavy is imported before it is needed."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.arguments import whole
from posttrain.terminal import show_text

if TYPE_CHECKING:
    from posttrain.judge.verdict import Judge

EXAMPLE = "posttrain judge audit package:smollm2-135m-instruct --pairs starter"


def add_options(verb: argparse.ArgumentParser) -> None:
    """Options of `posttrain judge audit`."""
    verb.add_argument("judge", metavar="MODEL_OR_RUN/STAGE", help="a model, a policy of a run, or a reward stage of a run")
    verb.add_argument("--pairs", default="starter", metavar="FILE", help="gold pairs (default: starter)")
    verb.add_argument("--question", help="what is asked about two answers")
    verb.add_argument("--limit", type=whole(0), default=0, help="first pairs only; 0 is all")
    verb.add_argument("--template", default="auto", help="chat template of a model without one (a run knows its own)")
    verb.add_argument("--json", action="store_true", help="print JSON")


def audit(options: argparse.Namespace) -> int:
    """Audit a judge; 0 where it may label, 1 where it may not. Raises PosttrainError for what is not there."""
    from posttrain.judge.audit import QUESTION, read_gold
    from posttrain.judge.audit import audit as examine

    pairs = read_gold(options.pairs, limit=options.limit)
    found = examine(open_judge(options.judge, template=options.template), pairs, question=options.question or QUESTION)
    show_text(json.dumps(found, indent=2, ensure_ascii=False) if options.json else text(found))
    return 0 if found["passes"] else 1


def open_judge(name: str, *, template: str = "auto") -> "Judge":
    """A judge by its name: `RUN/STAGE` of a policy or a reward model, or a base model. Raises PosttrainError."""
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


def text(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{found['judge']['judge']} · {found['pairs']} pairs · {found['decided']} decided", ""]
    rows = [
        ("accuracy of decided pairs", found["accuracy"], "must lie above 50 %"),
        ("accuracy of single orders", found["each_order"], ""),
        ("both orders agree", found["consistency"], ""),
        ("accuracy where they agree", found["accuracy_if_consistent"], ""),
        ("prefers the answer shown first", found["first"], "50 % is unbiased"),
        ("the same, of identical answers", found["identical"], "50 % is unbiased"),
        ("prefers the longer answer", found["prefers_longer"], _gold_longer(found)),
        ("changed by an injected instruction", found["injections"], "at most 2 %"),
        ("grades single answers right", found["detection"], "50 % is chance"),
        *((f"  {name}", figure, "") for name, figure in found["by_category"].items()),
    ]
    lines += [f"{label:<36} {_share(figure):<26} {note}".rstrip() for label, figure, note in rows]
    lines += [f"abstained on {count}: {why}" for why, count in found["abstained"].items()]
    verdict = "may label: the interval of its accuracy lies above chance"
    if not found["passes"]:
        verdict = "may not label: the interval of its accuracy includes chance or lies below it"
    return "\n".join([*lines, "", verdict])


def _share(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.1%} ({figure['low']:.1%}–{figure['high']:.1%}) n {figure['n']}"


def _gold_longer(found: dict[str, Any]) -> str:
    return "" if found["gold_longer"] is None else f"the better answer is longer in {found['gold_longer']:.0%}"
