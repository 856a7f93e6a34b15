"""The command `posttrain judge audit`. Heavy imports happen inside its functions."""

import argparse
import json
import shutil
from typing import Any

from posttrain.arguments import integer
from posttrain.artifacts import fingerprint
from posttrain.cache_folder import cache_folder
from posttrain.stages.judge_settings import POLICY, REWARD, JudgeSettings, check_judge
from posttrain.stages.kind import Earlier
from posttrain.stop import StopSignal
from posttrain.terminal import show_text

# A file of verdicts instead of a judge.
STORED = "verdicts:"
COEFFICIENTS = {
    "b_pos": "log-odds: shown first", "b_gold": "log-odds: the better answer", "b_len": "log-odds: longer by one deviation",
    "b_self": "log-odds: its own answer",
}  # fmt: skip
EXAMPLE = "posttrain judge audit package:smollm2-135m-instruct --pairs starter"


def add_options(verb: argparse.ArgumentParser) -> None:
    """Options of `posttrain judge audit`."""
    verb.add_argument(
        "judge", metavar="JUDGE",
        help="a model, RUN/STAGE, rule:package.module:function, http://host:port/v1 (with --model), or verdicts:FILE",
    )  # fmt: skip
    verb.add_argument("--pairs", default="starter", metavar="FILE", help="gold pairs (default: starter)")
    verb.add_argument("--question", help="the question about two answers")
    verb.add_argument("--limit", type=integer(0), default=0, help="use only the first pairs; 0 uses all")
    verb.add_argument("--template", default="auto", help="chat template for a model without one (runs record theirs)")
    verb.add_argument("--model", default="", metavar="NAME", help="the model's name at a server")
    verb.add_argument(
        "--key", default=JudgeSettings.model_fields["key"].default, metavar="ENVVAR",
        help="the environment variable with the key of a server",
    )  # fmt: skip
    verb.add_argument(
        "--reasoning", type=integer(0, 64), default=0, metavar="K", help="sample K replies with reasoning for each order"
    )
    verb.add_argument("--self", dest="own", default="", metavar="NAME", help="the judge's name among the authors of the pairs")
    verb.add_argument("--json", action="store_true", help="print JSON")


def audit(options: argparse.Namespace) -> int:
    """Audit a judge. Returns 0 if it passes, else 1. Raises PosttrainError if the judge or the pairs cannot be loaded."""
    figures = _audit_stored(options) if options.judge.startswith(STORED) else _audit(options)
    show_text(json.dumps(figures, indent=2, ensure_ascii=False) if options.json else text(figures))
    return 0 if figures["passes"] else 1


def _audit_stored(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a file of verdicts, which needs no model."""
    from posttrain.judge.audit import audit_stored
    from posttrain.judge.stored_verdicts import read_verdicts

    stored = read_verdicts(options.judge.removeprefix(STORED))
    return audit_stored(options.judge, stored[: options.limit or None], own=options.own)


def _audit(options: argparse.Namespace) -> dict[str, Any]:
    from posttrain.judge.audit import QUESTION, read_gold
    from posttrain.judge.audit import audit as examine
    from posttrain.judge.open import JudgeContext, open_judge

    where = "posttrain judge audit"
    settings = JudgeSettings(
        name=options.judge, model=options.model, key=options.key, template=options.template, reasoning=options.reasoning
    )
    if not options.judge.startswith((POLICY, REWARD)):  # `open_judge` refuses these, because there is no run
        check_judge(settings, Earlier(where, full=False, policies=(), reward_models=(), rows={}))
    pairs = read_gold(options.pairs, limit=options.limit)
    stop = StopSignal()
    question = options.question or QUESTION
    # An interrupted audit of a server goes on from here. A finished one asks again, since the server may have another model.
    cache = cache_folder() / "judge-audits" / fingerprint([settings.model_dump(), options.pairs, options.limit, question])
    with stop.installed(), open_judge(settings, JudgeContext(None, None, cache, stop, where=where)) as judge:
        figures = examine(judge, pairs, question=question, own=options.own)
    shutil.rmtree(cache, ignore_errors=True)
    return figures


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
    measured = [row for row in rows if row[1] is not None or figures["judge"]["kind"] != "stored"]
    lines += [f"{label:<36} {_share(figure):<26} {note}".rstrip() for label, figure, note in measured]
    lines += _self_preference(figures.get("self"))
    lines += [f"abstained on {count}: {why}" for why, count in figures["abstained"].items()]
    verdict = "passed: the interval of its accuracy is above chance"
    if not figures["passes"]:
        verdict = "failed: the interval of its accuracy includes chance or is below it"
    return "\n".join([*lines, "", verdict])


def _share(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.1%} ({figure['low']:.1%}–{figure['high']:.1%}) n {figure['n']}"


def _self_preference(figures: dict[str, Any] | None) -> list[str]:
    """The regression and the gap of a judge that wrote some of the answers."""
    if figures is None:
        return []
    lines = []
    coefficients, gap = figures["coefficients"], figures["gap"]
    if coefficients is None:
        lines.append("self-preference: no finite estimate (too few orders, or one cause predicts every verdict)")
    for name, figure in (coefficients or {}).items():
        lines.append(f"{COEFFICIENTS[name]:<36} {figure['value']:+.2f} (standard error {figure['error']:.2f})")
    if gap is not None:
        shares = f"{gap['own']:.1%} of {gap['n_own']} own, {gap['other']:.1%} of {gap['n_other']} other"
        interval = f"{gap['value']:+.1%} ({gap['low']:+.1%} to {gap['high']:+.1%})"
        lines.append(f"{'better answers preferred: own - other':<36} {interval:<26} {shares}")
    return lines


def _gold_longer(figures: dict[str, Any]) -> str:
    return "" if figures["gold_longer"] is None else f"the better answer is longer in {figures['gold_longer']:.0%}"
