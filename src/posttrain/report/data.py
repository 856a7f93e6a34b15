"""What every stage really learned from: sources, rows, lengths, what was cut, dropped or left out, and three examples.

Where it stands: data_report.json of each stage in, a section out. The texts are data: they leave escaped. Fields that
this version does not know are listed as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posttrain.report import formatting, plots
from posttrain.report.markup import details, el, facts, join, section
from posttrain.report.run import Run, Stage

_LONGEST = 4000
# Shown in words of their own, or not facts of the data.
_TOLD = frozenset(
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
        "mixed_rows",
    }
    | {"kind", "train_rows", "validation_rows", "truncated", "contaminated", "duplicates", "max_tokens", "ends_trained"}
    | {"mean_chosen_tokens", "mean_rejected_tokens", "chosen_longer", "examples"}
)


def data(run: Run) -> Markup:
    """The section of data reports; nothing where no stage has one."""
    parts = [_stage(stage, stage.data_report) for stage in run.stages if stage.data_report is not None]
    if not parts:
        return Markup("")
    return section("data", "Data", *parts, lead="What training saw after rendering, cutting and leaving out.")


def _stage(stage: Stage, report: Mapping[str, Any]) -> Markup:
    bins = report.get("length_histogram") or []
    labels = [f"{b['from']}–{b['to']}" if b.get("to") else f"over {b['from'] - 1}" for b in bins]
    figure = ""
    if any(b["rows"] for b in bins):
        first = next(i for i, b in enumerate(bins) if b["rows"])
        chart = plots.histogram(labels[first:], [b["rows"] for b in bins[first:]], stage.name)
        figure = el("figure", el("figcaption", el("strong", "rows by length")), chart)
    body = el("div.beside", facts([*_sources(report), *_rows(report), *_other(report)]), figure)
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
        rows.append(("tokens", f"{report['tokens']:,}, of which trained {report.get('share_trained', 0):.0%}"))
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
        rows.append(("left out", _count(report["contaminated"], "rows that an evaluation asks")))
    if "duplicates" in report:
        rows.append(("duplicates", _count(report["duplicates"], "rows")))
    if "ptx" in report:
        mix = report["ptx"]
        lost = f"{mix['truncated']:,} cut, {mix['dropped']:,} dropped, {mix['contaminated']:,} that an evaluation asks left out"
        rows.append(("pretraining mix", f"{mix['rows']:,} rows, {mix['tokens']:,} tokens; {lost}"))
    if report.get("ends_trained") is not None:
        rows.append(("turns end", f"{report['ends_trained']:.1%} of the uncut rows end in a trained end-of-turn token"))
    return rows


def _count(count: int, what: str) -> Markup:
    """Something that should be none stands out where it is not."""
    return el("span.count" if count else "span.none", f"{count:,} {what}")


def _other(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (str(k).replace("_", " "), formatting.plain(v))
        for k, v in report.items()
        if k not in _TOLD and not isinstance(v, dict | list)
    ]


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[Markup]:
    if not examples:
        return []
    shown = [el("h4", str(example.get("id", ""))) + el("pre.example", *_pieces(example)) for example in examples]
    return [details(join([f"{len(examples)} rows as training sees them; ", el("mark", "marked"), " is trained"]), *shown)]


def _pieces(example: Mapping[str, Any]) -> list[Markup | str]:
    parts: list[Markup | str] = []
    for piece in example.get("pieces", ()):
        text = str(piece.get("text", ""))
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        if "label" in piece:
            parts.append(el("span.label", str(piece["label"])))
        parts.append(el("mark", text) if piece.get("trained") else text)
    return parts
