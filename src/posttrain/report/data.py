"""The data section: sources, rows, lengths, truncated, dropped and excluded rows, and three examples of every stage.

Input: data_report.json of each stage. Texts are escaped. Unknown fields are listed unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posttrain.report import formatting, plots
from posttrain.report.markup import details, el, facts, join, section
from posttrain.report.run import RunRecord, StageRecord

_LONGEST = 4000
# Fields with their own rows below, and fields that are not shown.
_SHOWN_FIELDS = frozenset(
    {
        "tokens",
        "trained_tokens",
        "share_trained",
        "length_quantiles",
        "length_histogram",
        "sources",
        "formats",
        "rows",
        "dropped",
        "dropped_rows",
        "contaminated_rows",
        "duplicate_rows",
        "mixed_rows",
    }
    | {"kind", "train_rows", "validation_rows", "truncated", "contaminated", "duplicates", "max_tokens", "ends_trained"}
    | {"mean_chosen_tokens", "mean_rejected_tokens", "chosen_longer", "examples"}
)


def data(run: RunRecord) -> Markup:
    """The section of data reports; empty if no stage has one."""
    parts = [_stage(stage, stage.data_report) for stage in run.stages if stage.data_report is not None]
    if not parts:
        return Markup("")
    return section("data", "Data", *parts, lead="What training used after rendering, truncating and filtering.")


def _stage(stage: StageRecord, report: Mapping[str, Any]) -> Markup:
    bins = report.get("length_histogram") or []
    labels = [f"{b['from']}–{b['to']}" if b.get("to") else f"over {b['from'] - 1}" for b in bins]
    figure = ""
    if any(b["rows"] for b in bins):
        first = next(i for i, b in enumerate(bins) if b["rows"])
        chart = plots.histogram(labels[first:], [b["rows"] for b in bins[first:]], stage.name)
        figure = el("figure", el("figcaption", el("strong", "rows by length")), chart)
    body = el("div.beside", facts([*_sources(report), *_rows(report), *_unknown_fields(report)]), figure)
    return el(
        "div.stage", el("h3", stage.name, " ", el("span.kind", stage.kind)), body, *_examples(report.get("examples") or [])
    )


def _sources(report: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    return [
        ("source", join([el("strong", str(s.get("path", ""))), f" · {formatting.plain(s.get('rows'))} rows · ",
                         str(s.get("layout", "")), " · ", el("code", str(s.get("sha256", ""))[:12])]))
        for s in report.get("sources", ())
    ]  # fmt: skip


def _rows(report: Mapping[str, Any]) -> list[tuple[str, Markup | str]]:
    rows: list[tuple[str, Markup | str]] = []
    if "train_rows" in report:
        rows.append(("rows", f"{report['train_rows']:,} to train on, {report.get('validation_rows', 0):,} held out"))
    if "tokens" in report:
        trained = f", of which trained {report['share_trained']:.0%}" if report.get("share_trained") else ""
        rows.append(("tokens", f"{report['tokens']:,}{trained}"))
    quantiles = report.get("length_quantiles") or {}
    if {"0.5", "0.95", "1.0"} <= quantiles.keys():
        rows.append(
            (
                "length",
                f"median {quantiles['0.5']:,}, 95\u202f% under {quantiles['0.95']:,}, longest {quantiles['1.0']:,} tokens",
            )
        )
    if "mean_chosen_tokens" in report:
        sides = f"chosen {report['mean_chosen_tokens']:.0f}, rejected {report['mean_rejected_tokens']:.0f} tokens on average"
        rows.append(("completions", f"{sides}; chosen is longer in {report['chosen_longer']:.0%}"))
    if "truncated" in report:
        rows.append(("cut", _count(report["truncated"], f"rows at {report.get('max_tokens', 0):,} tokens")))
    if "dropped" in report:
        reasons = "".join(f" · {count:,} {reason}" for reason, count in report["dropped"].items())
        rows.append(("dropped", join([_count(sum(report["dropped"].values()), "rows"), reasons])))
    if "contaminated" in report:
        rows.append(("left out", _count(report["contaminated"], "rows whose prompt is in an evaluation")))
    if "duplicates" in report:
        rows.append(("duplicates", _count(report["duplicates"], "rows")))
    if "ptx" in report:
        mix = report["ptx"]
        lost = f"{mix['truncated']:,} cut, {mix['dropped']:,} dropped, {mix['contaminated']:,} in an evaluation"
        rows.append(("pretraining mix", f"{mix['rows']:,} rows, {mix['tokens']:,} tokens; {lost}"))
    if report.get("ends_trained") is not None:
        rows.append(("turns end", f"{report['ends_trained']:.1%} of the uncut rows end in a trained end-of-turn token"))
    return rows


def _count(count: int, label: str) -> Markup:
    """A count that should be 0; other values are highlighted."""
    return el("span.count" if count else "span.none", f"{count:,} {label}")


def _unknown_fields(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (str(k).replace("_", " "), formatting.plain(v))
        for k, v in report.items()
        if k not in _SHOWN_FIELDS and not isinstance(v, dict | list)
    ]


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[Markup]:
    if not examples:
        return []
    shown = [el("h4", str(example.get("id", ""))) + el("pre.example", *_pieces(example)) for example in examples]
    return [details(join([f"{len(examples)} rows as in training; ", el("mark", "marked"), " text is trained"]), *shown)]


def _pieces(example: Mapping[str, Any]) -> list[Markup | str]:
    parts: list[Markup | str] = []
    for piece in example.get("pieces", ()):
        text = str(piece.get("text", ""))
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        if piece.get("label"):
            parts.append(el("span.label", str(piece["label"])))
        parts.append(el("mark", text) if piece.get("trained") else text)
    return parts
