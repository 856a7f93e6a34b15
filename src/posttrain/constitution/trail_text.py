"""The audit trail as text for the terminal, at most 100 columns wide.

The text of a row is shown whole. A summary shows figures alone and no text of a prompt.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.constitution.figure_words import (
    NONE,
    agreement_sentence,
    change_words,
    contrast_sentence,
    judge_words,
    kappa_words,
    label_sentence,
    percent,
    refusal_of_judge,
    revision_sentence,
    share_words,
    weak,
)
from posttrain.constitution.word_diff import Piece, as_text, changed_share

WIDTH = 100
_NAME = 26
# From this share of changed words on, two texts are not compared word by word.
_REWRITTEN = 0.8
STAMP = "WEAK JUDGE ALLOWED"


def summary_text(data: Mapping[str, Any]) -> str:
    """The figures of every stage of rows."""
    parts = [_stage(figures) for figures in data["stages"]]
    for entry in data["unfinished"]:
        parts.append(f"{entry['stage']} ({entry['kind']}) · {refusal_of_judge(entry['audit'], entry['gate'])}")
    return "\n\n".join(parts)


def _stage(figures: Mapping[str, Any]) -> str:
    lines = [f"{figures['stage']} ({figures['kind']}) · {figures['rows']:,} rows · {figures['fingerprint']}"]
    if weak(figures["judge"]):
        lines.append(f"*** {STAMP}: this stage used a judge that failed its audit ***")
    if "revisions" in figures:
        lines += _revisions(figures["revisions"])
    elif "labels" in figures:
        lines += _labels(figures["labels"])
    elif "contrast" in figures:
        lines += _contrast(figures["contrast"])
    if judge := judge_words(figures["judge"]):
        lines += ["", *_wrapped(f"judge {judge}")]
    lines += [line for warning in figures["warnings"] for line in _wrapped(f"warning: {warning}")]
    return "\n".join(lines)


def _revisions(figures: Mapping[str, Any]) -> list[str]:
    principles = figures["by_principle"]
    counts = [
        [_short(name), f"{f['drawn']:,}", share_words(f["found"]), share_words(f["changed"]), f"{f['dropped']:,}"]
        for name, f in {**principles, "all": figures["total"]}.items()
    ]
    effects = [
        [_short(name), change_words(f["length_change"]), *_before_after(f["refusals"]), share_words(f["preferred"])]
        for name, f in {**principles, "all": figures["total"]}.items()
    ]
    rounds = [
        [number, share_words(f["found"]), share_words(f["changed"]), f"{f['dropped']:,}", share_words(f["preferred"])]
        for number, f in figures["by_round"].items()
    ]
    refuses = ("refuses before", "after")
    return [
        *_wrapped(revision_sentence(figures)),
        "", *_table(("principle", "drawn", "fault found", "changed", "dropped"), counts),
        "", *_table(("principle", "characters", *refuses, "preferred"), effects),
        "", *_table(("round", "fault found", "changed", "dropped", "preferred"), rounds),
        "", *_categories(figures["by_category"], figures["left_out"]),
        "", *_evasion(figures["evasion"]),
        "", *_reasons("dropped", figures["dropped"]),
    ]  # fmt: skip


def _categories(categories: Mapping[str, Any], left_out: Sequence[str]) -> list[str]:
    rows = [
        [_short(name or "(none)"), f"{f['prompts']:,}", share_words(f["found"]), share_words(f["changed"]),
         *_before_after(f["refusals"]), "its principle" if f["held_out"] else ""]
        for name, f in categories.items()
    ]  # fmt: skip
    lines = _table(("category", "prompts", "fault found", "changed", "refuses before", "after", "left out"), rows)
    return [*lines, *_wrapped(f"left out of the constitution: {', '.join(left_out)}")] if left_out else lines


def _evasion(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        ["answers" if f["round"] == 0 else f"round {f['round']}", f"{f['texts']:,}", share_words(f["only_refuse"]),
         NONE if f["distinct"] is None else percent(f["distinct"]),
         NONE if f["shared_phrases"] is None else percent(f["shared_phrases"])]
        for f in rounds
    ]  # fmt: skip
    lines = _table(("texts", "count", "only refuse", "distinct", "shared phrases"), rows)
    for f in rounds:
        name = "answers" if f["round"] == 0 else f"round {f['round']}"
        for key, about in (("openings", "open with"), ("phrases", "say")):
            if f[key]:
                lines += _wrapped(f"{name} {about}: " + " · ".join(f'"{text}" {count}×' for text, count in f[key]))
    return lines


def _labels(figures: Mapping[str, Any]) -> list[str]:
    principles = figures["by_principle"]
    votes = [
        [_short(name), f"{f['votes']:,}", f"{f['decisive']:,}", f"{f['abstained']:,}", f"{f['tied']:,}",
         share_words(f["first"]), share_words(f["with_label"])]
        for name, f in principles.items()
    ]  # fmt: skip
    without = [
        [_short(name), f"{f['without']['labels']:,}", f"{f['without']['flip']:,}", f"{f['without']['vanish']:,}",
         kappa_words(f["human"])]
        for name, f in principles.items()
    ]  # fmt: skip
    categories = [
        [_short(name or "(none)"), f"{f['pairs']:,}", share_words(f["labelled"]), kappa_words(f["human"]),
         "its principle" if f["held_out"] else ""]
        for name, f in figures["by_category"].items()
    ]  # fmt: skip
    lines = [
        *_wrapped(label_sentence(figures)),
        *_wrapped(agreement_sentence(figures)),
        "", *_table(("principle", "votes", "decisive", "abstained", "tied", "first", "as the label"), votes),
        "", *_table(("without this principle", "labels", "flip", "vanish", "kappa with people"), without),
        "", *_table(("category", "pairs", "labelled", "kappa with people", "left out"), categories),
    ]  # fmt: skip
    lines += _wrapped(f"left out of the constitution: {', '.join(figures['left_out'])}") if figures["left_out"] else []
    lines += [*_reasons("abstained", figures["abstained"]), *_reasons("dropped", figures["dropped"])]
    if figures["unexplained"]:
        lines += _wrapped(f"warning: {figures['unexplained']:,} labels differ from the weighted mean of their votes")
    return lines


def _contrast(figures: Mapping[str, Any]) -> list[str]:
    rows = [
        [_short(name), f"{f['drawn']:,}", change_words(f["length_change"]), *_before_after(f["refusals"])]
        for name, f in {**figures["by_principle"], "all": figures["total"]}.items()
    ]
    heads = ("principle", "drawn", "characters", "refuses without", "with")
    return [*_wrapped(contrast_sentence(figures)), "", *_table(heads, rows), *_reasons("dropped", figures["dropped"])]


def _before_after(refusals: Mapping[str, Any] | None) -> list[str]:
    return [NONE, NONE] if refusals is None else [share_words(refusals[key]) for key in ("before", "after")]


def _reasons(title: str, reasons: Mapping[str, int]) -> list[str]:
    if not reasons:
        return []
    return _wrapped(f"{title}: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()))


# --- one row ----------------------------------------------------------------------------------------------------------


def trace_text(data: Mapping[str, Any]) -> str:
    """Where a row comes from and who trained on it, with its texts whole."""
    parts = ["\n".join(_made(entry)) for entry in data["made"]]
    parts += ["\n".join(_file(entry)) for entry in data["files"]]
    parts += ["\n".join(_wrapped(note)) for note in data["notes"]]
    return "\n\n".join([f"row {data['row']}", *parts])


def _made(entry: Mapping[str, Any]) -> list[str]:
    base, constitution = entry["base"], entry["constitution"]
    answering = " and ".join(f"{p['name']}{_mark(p['fingerprint'])}" for p in entry["answered_by"]) or "the data"
    lines = [f"made by {entry['stage']} ({entry['kind']}) · fingerprint {entry['fingerprint']}"]
    if weak(entry["judge"]):
        lines.append(f"  *** {STAMP} ***")
    lines += _fact("answered by", f"{answering}, base {base['model']}, weights {str(base['weights_hash'])[:16]}")
    if constitution:
        version = f" version {constitution['version']}" if constitution.get("version") else ""
        lines += _fact("constitution", f"{constitution['name']}{version}{_mark(constitution.get('fingerprint'))}")
    if entry["judge"]:
        lines += _fact("judge", judge_words(entry["judge"]))
        identity = (entry["audit"] or {}).get("judge")
        if isinstance(identity, dict):
            lines += _fact("", ", ".join(f"{key} {value}" for key, value in identity.items()))
    lines += _fact("seed", str(entry["seed"]))
    lines += _fact("prompt", entry["prompt_id"] + (f" · category {entry['category']}" if entry["category"] else ""))
    for path, digest in entry["sources"].items():
        lines += _fact("", f"{path}, sha256 {digest[:16]}")
    for turn in entry["prompt"]:
        lines += _whole(turn["role"], turn["content"])
    for row in entry["rows"]:
        lines += ["", *_row(row)]
    return lines


def _row(row: Mapping[str, Any]) -> list[str]:
    here = "  ← this row" if row["asked"] else ""
    if "outcome" in row and "principle" in row:
        lines = _round(row, here)
    elif "votes" in row:
        lines = _votes(row, here)
    elif "principles" in row:
        named = ", ".join(f"{p['id']} ({p['title']})" if p["title"] else p["id"] for p in row["principles"])
        lines = [f"  pair {row['id']}{here}", *_fact("principles", named)]
        lines += [*_whole("chosen, with the principles", row["chosen"]), *_whole("rejected, without", row["rejected"])]
        lines += _changed(row["rejected"], row["chosen"], row["diff"])
    else:
        lines = [f"  row {row['id']}{here}"]
        lines += [line for key, value in row["row"].items() if key != "id" for line in _fact(key, str(value))]
    for reader in row["read_by"]:
        lines += _fact("read by", _reader(reader, row["id"]))
    return lines if row["read_by"] else [*lines, *_fact("read by", "no stage")]


def _round(row: Mapping[str, Any], here: str) -> list[str]:
    outcome = row["outcome"] + (f": {row['reason']}" if row["reason"] else "")
    lines = [f"  round {row['round']} · {row['id']} · {outcome}{here}"]
    lines += _fact("principle", f"{row['principle']}: {row['title']}" if row["title"] else row["principle"])
    if row["detection"] is not None:
        lines += _fact("detection", f"{row['detection']:.1%} that the answer has the fault")
    if row["gate"] is not None:
        lines += _fact("judge", f"the revision is better with {row['gate']:.1%}")
    lines += _fact("policy", f"{row['policy'] or '?'}, seed {row['seed']}")
    lines += _whole("answer", row["answer"])
    lines += _whole("critique", row["critique"]) if row["critique"] is not None else []
    if row["revision"] is not None:
        lines += [*_whole("revision", row["revision"]), *_changed(row["answer"], row["revision"], row["diff"])]
    return lines


def _changed(before: str, after: str, diff: Sequence[Sequence[str]]) -> list[str]:
    """What differs between two texts, word by word unless hardly a word is common."""
    changed = changed_share(before, after)
    if changed > _REWRITTEN:
        return _fact("what changed", f"{changed:.0%} of the words: rewritten")
    return _whole("what changed", marked_diff(diff))


def _votes(row: Mapping[str, Any], here: str) -> list[str]:
    outcome = row["outcome"] + (f": {row['reason']}" if row["reason"] else "")
    lines = [f"  pair {row['id']} · {outcome}{here}"]
    if row["probability"] is not None:
        better = "A" if row["probability"] >= 0.5 else "B"
        lines += _fact("label", f"{better} is better with {max(row['probability'], 1 - row['probability']):.1%}")
    if row["human"] is not None:
        lines += _fact("people", f"prefer A with {row['human']:.0%}")
    votes = [[_short(v["principle"]), f"{v['weight']:g}", *map(_chance, _orders(v)), v["why"]] for v in row["votes"]]
    heads = ("A is better by", "weight", "both", "A first", "A second", "")
    lines += [f"    {line}" for line in _table(heads, votes, WIDTH - 4)] if votes else []
    for side in ("a", "b"):
        by = f" by {row[f'{side}_by']}{_mark(row[f'{side}_policy'])}" if row[f"{side}_by"] else ""
        kept = "" if row["chosen"] is None else ", chosen" if row["chosen"] == side else ", rejected"
        lines += _whole(f"{side.upper()}{by}{kept}", row[side])
    return lines


def _orders(vote: Mapping[str, Any]) -> list[float | None]:
    return [vote[key] for key in ("probability", "first", "second")]


def _chance(probability: float | None) -> str:
    return NONE if probability is None else f"{probability:.1%}"


def _file(entry: Mapping[str, Any]) -> list[str]:
    lines = [f"in {entry['path']} · sha256 {entry['sha256'][:16]}"]
    lines += _wrapped("  the file was changed after it was read") if entry["changed"] else []
    for role, text in entry["texts"]:
        lines += _whole(role, text)
    for reader in entry["read_by"]:
        lines += _fact("read by", _reader(reader, ""))
    return lines


def _reader(reader: Mapping[str, Any], row: str) -> str:
    copy = f", as {reader['as']}" if row and reader["as"] != row else ""
    return f"{reader['stage']} ({reader['kind']}){_mark(reader['fingerprint'])}: {reader['use']}{copy}"


def marked_diff(diff: Sequence[Sequence[str]]) -> str:
    """The pieces of a diff as one text: [-removed-] and {+added+}."""
    return as_text([Piece(kind, text) for kind, text in diff])


def _mark(fingerprint: str | None) -> str:
    return f", fingerprint {fingerprint}" if fingerprint else ""


def _fact(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"    {name:<13} {text}", WIDTH, subsequent_indent=" " * 18, break_on_hyphens=False, replace_whitespace=True
    )


def _whole(name: str, text: str) -> list[str]:
    """A text under its name, every line of it wrapped."""
    lines = [f"    {name}"]
    for line in text.splitlines() or ["(empty)"]:
        lines += textwrap.wrap(line, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False) or [""]
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Aligned columns; the last one is cut where it does not fit."""
    table = [list(heads), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths)).rstrip() for row in table]
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
