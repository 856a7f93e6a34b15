"""The data report: figures about the training rows, as plain data and as text."""

from collections.abc import Sequence
from typing import Any

# Upper ends of the bins of the length histogram, in tokens.
BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def describe_rows(lengths: Sequence[int], trained_tokens: int) -> dict[str, Any]:
    """Tokens, trained share, length quantiles and length histogram of rows with these lengths in tokens."""
    ordered = sorted(lengths)
    tokens = sum(ordered)
    histogram = []
    low = 0
    for high in (*BINS, None):
        count = sum(1 for n in ordered if n > low and (high is None or n <= high))
        histogram.append({"from": low + 1, "to": high, "rows": count})
        low = high or low
    quantiles = {str(q): ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES} if ordered else {}
    last = max((i for i, b in enumerate(histogram) if b["rows"]), default=0)
    return {
        "tokens": tokens, "trained_tokens": trained_tokens, "share_trained": trained_tokens / tokens if tokens else 0.0,
        "length_quantiles": quantiles,
        "length_histogram": histogram[: last + 1],
    }  # fmt: skip


def format_report(report: dict[str, Any], title: str) -> str:
    """The report as text."""
    lines = [*(f"warning: {warning}" for warning in report["warnings"]), *([""] if report["warnings"] else []), title, ""]
    for source in report["sources"]:
        lines.append(
            f"source       {source['path']}: {source['rows']:,} rows · {source['layout']} · sha256 {source['sha256'][:12]}"
        )
    dropped = sum(report["dropped"].values())
    mixed = "" if report["mixed_rows"] == report["rows"] else f" (of {report['mixed_rows']:,} after mixing by weight)"
    lines += [
        f"rows         {report['train_rows']:,} for training, {report['validation_rows']:,} for validation{mixed}",
        f"tokens       {report['tokens']:,}, of which trained {report['trained_tokens']:,} ({report['share_trained']:.0%})",
        f"truncated    {report['truncated']:,} rows at {report['max_tokens']:,} tokens",
        f"dropped      {dropped:,} rows",
        *(f"             {count:,} {reason}{_rows(report, reason)}" for reason, count in report["dropped"].items()),
        f"contaminated {report['contaminated']:,} rows with an evaluation prompt (excluded)"
        f"{_named(report['contaminated_rows'])}",
        f"duplicates   {report['duplicates']:,} rows",
        f"turns end    {_share(report['ends_trained'])} of the uncut rows end in a trained end-of-turn token",
    ]
    if report.get("turns_rewritten"):
        lines.append(f"not trained  {report['turns_rewritten']:,} earlier turns, which the chat template rewrites later")
    if "mean_chosen_tokens" in report:
        lines.append(
            f"lengths      chosen {report['mean_chosen_tokens']:.0f} and rejected {report['mean_rejected_tokens']:.0f} tokens "
            f"on average; chosen is longer in {report['chosen_longer']:.0%}"
        )
    return "\n".join([*lines, "", *_histogram(report["length_histogram"]), "", *_examples(report["examples"])])


def _rows(report: dict[str, Any], reason: str) -> str:
    return _named([d["row"] for d in report["dropped_rows"] if d["reason"] == reason])


def _named(rows: Sequence[str]) -> str:
    return f": {', '.join(rows[:3])}{' …' if len(rows) > 3 else ''}" if rows else ""


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _histogram(bins: Sequence[dict[str, Any]]) -> list[str]:
    most = max((b["rows"] for b in bins), default=1) or 1
    lines = ["tokens per row"]
    for b in bins:
        label = f"{b['from']}–{b['to']}" if b["to"] else f"over {b['from'] - 1}"
        lines.append(f"  {label:>11} {b['rows']:>7,} {'█' * round(40 * b['rows'] / most)}")
    return lines


def _examples(examples: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["three training rows; ⟦…⟧ is trained"]
    for example in examples:
        text = "".join(_piece(piece) for piece in example["pieces"])
        lines += ["", f"--- {example['id']}", text if len(text) <= 2000 else text[:1000] + " … " + text[-1000:]]
    return lines


def _piece(piece: dict[str, Any]) -> str:
    marked = f"⟦{piece['text']}⟧" if piece["trained"] else str(piece["text"])
    return f"\n[{piece['label']}] {marked}" if piece.get("label") else marked
