"""The figures of the audit trail as words, for the terminal and the report: `63 % (55–70)`, `+12 (−3 to +27)`, sentences.

An interval always follows its value. A missing figure is a dash.
"""

from collections.abc import Mapping
from typing import Any

NONE = "–"


def percent(value: float) -> str:
    """A share: `63 %`."""
    return f"{100 * value:.0f} %"


def share_words(figure: Mapping[str, Any] | None, *, n: bool = False) -> str:
    """A share with its interval, and its count on request: `63 % (55–70)`, `63 % (55–70), n 160`."""
    if figure is None:
        return NONE
    text = f"{percent(figure['value'])} ({100 * figure['low']:.0f}–{100 * figure['high']:.0f})"
    return f"{text}, n {figure['n']:,}" if n else text


def signed(value: float, digits: int = 0) -> str:
    """A signed number with a true minus sign. Zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def change_words(figure: Mapping[str, Any] | None) -> str:
    """A mean change with its interval: `+12 (−3 to +27)`. A single value has none."""
    if figure is None:
        return NONE
    if figure["n"] == 1:
        return f"{signed(figure['value'])} (n 1)"
    return f"{signed(figure['value'])} ({signed(figure['low'])} to {signed(figure['high'])})"


def points_words(figure: Mapping[str, Any]) -> str:
    """A change of a share: `+12 points (+3 to +21)`."""
    value, low, high = (signed(100 * figure[key]) for key in ("value", "low", "high"))
    return f"{value} points ({low} to {high})"


def kappa_words(human: Mapping[str, Any] | None) -> str:
    """Kappa with people: `0.41 (0.20 to 0.62), n 60`."""
    if human is None:
        return NONE
    kappa = human["kappa"]
    if kappa["value"] is None:
        return f"not defined, n {kappa['n']:,}"
    value, low, high = (number_words(kappa[key]) for key in ("value", "low", "high"))
    # Without any variation in the table the large-sample variance is 0, which says nothing.
    interval = "no interval" if kappa["low"] == kappa["high"] else f"{low} to {high}"
    return f"{value} ({interval}), n {kappa['n']:,}"


def number_words(value: float | None, digits: int = 2) -> str:
    """A number without an interval."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def weak(judge: Mapping[str, Any] | None) -> bool:
    """Whether a judge that failed its audit was used anyway."""
    return bool(judge and judge.get("allowed_weak"))


def judge_words(judge: Mapping[str, Any] | None) -> str:
    """The judge of a stage and its audit; empty without a judge."""
    if not judge:
        return ""
    name, accuracy = judge.get("name", "?"), judge.get("accuracy")
    if accuracy is None and judge.get("passes"):
        return f"{name}: a rule, which is its own definition of better; it has no accuracy"
    figures = f"accuracy {share_words(accuracy, n=True)}" if accuracy else "it decided no gold pair"
    if weak(judge):
        return f"{name}: failed its audit and was used anyway: {figures}"
    if judge.get("passes"):
        return f"{name}: passed its audit: {figures}"
    return f"{name}: failed its audit and was not used: {figures}"


def refusal_of_judge(audit: Mapping[str, Any] | None, gate: Mapping[str, Any] | None) -> str:
    """Why an unfinished stage went no further, from the files that it left."""
    if audit is not None and audit.get("passes") is False:
        accuracy = audit.get("accuracy")
        figures = f"accuracy {share_words(accuracy, n=True)}" if accuracy else "it decided no gold pair"
        return f"The judge was refused: {figures}."
    if gate is not None and gate.get("passes") is False:
        return f"The revisions did not pass the gate: {gate_words(gate)}"
    return "The stage is not finished."


def gate_share(gate: Mapping[str, Any]) -> dict[str, Any] | None:
    """The share of preferred revisions with its interval; None if nothing was decided."""
    if not gate.get("decided"):
        return None
    return {"value": gate["preferred"] / gate["decided"], "low": gate["low"], "high": gate["high"], "n": gate["decided"]}


def gate_words(gate: Mapping[str, Any]) -> str:
    """The verdict of the gate as a sentence; empty if there was no gate."""
    if not gate:
        return ""
    share = gate_share(gate)
    if share is None:
        return f"The judge decided none of {gate.get('asked', 0):,} comparisons of a revision with its answer."
    verdict = "not shown to be above chance"
    if gate.get("passes") or share["high"] < 0.5:
        verdict = "above chance" if gate.get("passes") else "below chance"
    return f"Revisions are preferred in {share_words(share)} of {share['n']:,} decided comparisons: {verdict}."


def refusal_words(refusals: Mapping[str, Any] | None) -> str:
    """Refusals before and after: `12 % → 40 %`."""
    if refusals is None:
        return NONE
    return f"{percent(refusals['before']['value'])} → {percent(refusals['after']['value'])}"


def revision_sentence(figures: Mapping[str, Any]) -> str:
    """What a stage of critique and revision found, in one sentence or two."""
    total, whole = figures["total"], figures["whole"]
    found = f"The policy found a fault in {share_words(total['found'])} of the answers"
    found = found if total["found"] else "No answer was checked for a fault"
    parts = [f"{found} and {share_words(whole['changed'])} of {whole['prompts']:,} prompts have a revision."]
    if whole["refusals"] is not None:
        change = whole["refusals"]["change"]
        shown = change["low"] > 0 or change["high"] < 0
        words = points_words(change) if shown else f"no change is shown, {points_words(change)}"
        before, after = (percent(whole["refusals"][key]["value"]) for key in ("before", "after"))
        parts.append(f"Refusals go from {before} to {after}: {words}.")
    return " ".join(filter(None, [gate_words(figures["gate"]), *parts]))


def label_sentence(figures: Mapping[str, Any]) -> str:
    """What a stage of labels found, in one sentence or two."""
    outcomes = figures["outcomes"]
    labelled = outcomes.get("labelled", 0)
    lost = [f"{outcomes[name]:,} {name}" for name in ("abstained", "dropped") if outcomes.get(name)]
    text = f"{labelled:,} of {figures['pairs']:,} pairs are labelled{' (' + ', '.join(lost) + ')' if lost else ''}."
    human = figures["human"]
    if human is None:
        return f"{text} No pair has a label of people to compare with."
    return f"{text} Labels agree with people on {share_words(human['alike'], n=True)}; kappa {kappa_words(human)}."


def agreement_sentence(figures: Mapping[str, Any]) -> str:
    """How far principles agree, and whether the order of the answers matters."""
    agreement = figures["agreement"]
    first = f"The answer shown first is preferred in {share_words(figures['first'])} of single orders (50 % is unbiased)."
    if not agreement["items"]:
        return f"No pair has two decisive votes, so nothing can be said about the agreement of principles. {first}"
    mean, all_agree = share_words(agreement["mean"]), share_words(agreement["unanimous"])
    over = f"{agreement['items']:,} pairs with at least two decisive votes"
    return f"Principles agree on {mean} of pairs of votes over {over}; all of them agree on {all_agree}. {first}"


def contrast_sentence(figures: Mapping[str, Any]) -> str:
    """What a stage of contrast made; it has no judge, so it says nothing about which answer is better."""
    total = figures["total"]
    text = f"{figures['pairs']:,} pairs. The answer with principles is chosen by assumption: no judge compared the two."
    if total["length_change"] is None:
        return text
    longer, refusals = change_words(total["length_change"]), refusal_words(total["refusals"])
    return f"{text} Against the plain answer it has {longer} characters; refusals {refusals}."
