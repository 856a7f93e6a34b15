"""Tables of the sections on constitutions. Input: figures of `constitution/trail.py`. No text of a prompt is in a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posttrain.constitution import figure_words as words
from posttrain.report.markup import Content, el, join, scroll

_LISTED = 3


def narrow(text: str) -> str:
    """Percent signs with a narrow space that does not break."""
    return text.replace(" %", "\u202f%")


def principles_of_revisions(figures: Mapping[str, Any]) -> Markup:
    """What each principle found and changed."""
    heads = ("principle", "drawn", "fault found", "changed", "dropped", "characters", "refuses before", "after", "preferred")
    rows = [
        [
            _principle(name, f.get("title", "")), f"{f['drawn']:,}", _share(f["found"]), _share(f["changed"]),
            f"{f['dropped']:,}", _change(f["length_change"]), *_before_after(f["refusals"]), _share(f["preferred"]),
        ]
        for name, f in {**figures["by_principle"], "all": figures["total"]}.items()
    ]  # fmt: skip
    return _table(heads, rows, "figures of the principles")


def principles_of_contrast(figures: Mapping[str, Any]) -> Markup:
    """How far answers with each principle differ from plain ones."""
    heads = ("principle", "drawn", "characters", "refuses without", "with")
    rows = [
        [_principle(name, f.get("title", "")), f"{f['drawn']:,}", _change(f["length_change"]), *_before_after(f["refusals"])]
        for name, f in {**figures["by_principle"], "all": figures["total"]}.items()
    ]
    return _table(heads, rows, "figures of the principles")


def principles_of_labels(principles: Mapping[str, Any]) -> Markup:
    """The votes of each principle, and the labels without it."""
    heads = (
        "principle", "votes", "decisive", "abstained", "tied", "first preferred", "as the label", "kappa with people",
        "labels without it",
    )  # fmt: skip
    rows = [
        [
            _principle(name, f["title"]), f"{f['votes']:,}", f"{f['decisive']:,}", f"{f['abstained']:,}", f"{f['tied']:,}",
            _share(f["first"]), _share(f["with_label"]), _kappa(f["human"]), _without(f["without"]),
        ]
        for name, f in principles.items()
    ]  # fmt: skip
    return _table(heads, rows, "votes of the principles")


def categories_of_revisions(categories: Mapping[str, Any], left_out: Sequence[str]) -> Markup:
    """Prompts by category: the first answer against the text after the last round."""
    heads = ("category", "prompts", "fault found", "changed", "refuses before", "after")
    rows = [
        [_category(name, f), f"{f['prompts']:,}", _share(f["found"]), _share(f["changed"]), *_before_after(f["refusals"])]
        for name, f in categories.items()
    ]
    return join([_table(heads, rows, "figures of the categories"), *_left_out(left_out)])


def categories_of_labels(categories: Mapping[str, Any], left_out: Sequence[str]) -> Markup:
    """Judged pairs by category."""
    heads = ("category", "pairs", "labelled", "kappa with people")
    rows = [
        [_category(name, f), f"{f['pairs']:,}", _share(f["labelled"]), _kappa(f["human"])] for name, f in categories.items()
    ]
    return join([_table(heads, rows, "figures of the categories"), *_left_out(left_out)])


def rounds(by_round: Mapping[str, Any], evasions: Sequence[Mapping[str, Any]]) -> Markup:
    """The rounds side by side."""
    refusing = {str(entry["round"]): entry["only_refuse"] for entry in evasions}
    heads = ("round", "fault found", "changed", "dropped", "characters", "preferred", "only refuse")
    rows = [
        [
            number, _share(f["found"]), _share(f["changed"]), f"{f['dropped']:,}", _change(f["length_change"]),
            _share(f["preferred"]), _share(refusing.get(number)),
        ]
        for number, f in by_round.items()
    ]  # fmt: skip
    return _table(heads, rows, "figures of the rounds")


def evasion(entries: Sequence[Mapping[str, Any]]) -> Markup:
    """Refusals and repetition in the first answers and in the revisions of each round."""
    heads = ("texts", "count", "only refuse", "distinct", "shared phrases", "most repeated openings and phrases")
    rows = [
        [
            "first answers" if e["round"] == 0 else f"round {e['round']}", f"{e['texts']:,}", _share(e["only_refuse"]),
            _plain(e["distinct"]), _plain(e["shared_phrases"]), _repeated([*e["openings"][:_LISTED], *e["phrases"][:_LISTED]]),
        ]
        for e in entries
    ]  # fmt: skip
    return _table(heads, rows, "repetition by round")


def audit_facts(audit: Mapping[str, Any]) -> Iterable[tuple[Content, Content]]:
    """The figures of a judge's audit."""
    names = {
        "accuracy": "accuracy of decided pairs", "each_order": "accuracy of single orders", "consistency": "both orders agree",
        "first": "prefers the answer shown first", "identical": "the same for identical answers",
        "prefers_longer": "prefers the longer answer", "injections": "changed by an injected instruction",
        "detection": "grades single answers correctly",
    }  # fmt: skip
    yield "gold pairs", f"{audit.get('pairs', '?')}, {audit.get('decided', '?')} decided"
    for key, name in names.items():
        figure = audit.get(key)
        if isinstance(figure, Mapping) and {"value", "low", "high", "n"} <= figure.keys():
            yield name, narrow(words.share_words(figure, n=True))
    judge = audit.get("judge")
    if isinstance(judge, Mapping):
        for key, value in judge.items():
            yield key, el("code", str(value))


def _table(heads: Sequence[str], rows: Sequence[Sequence[Content]], label: str) -> Markup:
    if not rows:
        return Markup("")
    body = [el("tr", el("th.principle", row[0]), *(el("td", cell) for cell in row[1:])) for row in rows]
    head = el("thead", el("tr", *(el("th", name) for name in heads)))
    return scroll(el("table", head, el("tbody", *body)), label=label)


def _principle(name: str, title: str) -> Markup:
    return join([name, el("span.small", title)]) if title else join([name])


def _category(name: str, figures: Mapping[str, Any]) -> Markup:
    held_out = figures["held_out"]
    mark = [el("span.badge", "left out of the constitution", attrs={"title": ", ".join(held_out)})] if held_out else []
    return join([name or "(none)", *mark])


def _left_out(names: Sequence[str]) -> list[Markup]:
    return [el("p.note", f"Not used: principles with the id or tag {', '.join(names)}.")] if names else []


def _two(text: str) -> Markup:
    """A value, and its interval below it."""
    value, bracket, rest = narrow(text).partition(" (")
    return join([value, el("span.small", f"({rest}")]) if bracket else join([value])


def _share(figure: Mapping[str, Any] | None) -> Markup:
    return _two(words.share_words(figure))


def _change(figure: Mapping[str, Any] | None) -> Markup:
    return _two(words.change_words(figure))


def _kappa(human: Mapping[str, Any] | None) -> Markup:
    return _two(words.kappa_words(human))


def _plain(value: float | None) -> str:
    return words.NONE if value is None else narrow(words.percent(value))


def _before_after(refusals: Mapping[str, Any] | None) -> list[Markup]:
    return [_share(None if refusals is None else refusals[key]) for key in ("before", "after")]


def _without(counts: Mapping[str, int]) -> Markup:
    changed = f"{counts['flip']:,} flip, {counts['vanish']:,} vanish"
    return join([changed, el("span.small", f"of {counts['labels']:,}")])


def _repeated(entries: Sequence[Sequence[Any]]) -> Markup:
    return join([el("span.small", f"{count}× {text}") for text, count in entries] or [words.NONE])
