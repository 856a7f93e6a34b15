"""The sections on critique and revision, on contrast and on AI labels: what each principle did, and who judged.

Input: the records of the stages that make rows (`constitution/trail_files.py`). The figures are those of
`constitution/revision_figures.py` and `label_figures.py`, which `posttrain audit` prints too. Texts of prompts and answers are
in collapsed blocks alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posttrain.constitution import figure_words as words
from posttrain.constitution.trail import figures_of
from posttrain.constitution.trail_files import RoundRecord, RowsStage, UnfinishedStage
from posttrain.constitution.word_diff import word_diff
from posttrain.report import constitution_tables as tables
from posttrain.report import plots
from posttrain.report.markup import details, el, facts, join, section
from posttrain.report.run import RunRecord

_REVISIONS = (
    "A policy criticised and revised its own answers, one principle at a time. Shares have 95\u202f% intervals. Refusals are "
    "found by a rule. The command posttrain audit shows why a row was trained."
)
_LABELS = (
    "A judge compared answers by each principle in both orders. A vote that depends on the order abstains. Kappa is agreement "
    "beyond chance: 0 is chance, 1 is perfect."
)
_CONTRAST = "The answer with principles in the system prompt is chosen, the plain one rejected. No judge compared them."
_EXAMPLES, _LONGEST = 3, 6000
# Shares of a round that are drawn, by the key of their figure.
_SHARES = {"fault found": "found", "changed": "changed", "preferred": "preferred"}
_COLOURS = {"fault found": 1, "changed": 2, "preferred": 3, "only refuse": 4}


def revisions(run: RunRecord) -> Markup:
    """The section on critique and revision; empty without such a stage."""
    parts = [_revision_stage(stage) for stage in run.rows if stage.rounds]
    parts += [_unfinished(stage) for stage in run.unfinished_rows if not stage.labels]
    return section("revisions", "Critique and revision", *parts, lead=_REVISIONS) if parts else Markup("")


def labels(run: RunRecord) -> Markup:
    """The section on AI labels; empty without such a stage."""
    parts = [_label_stage(stage) for stage in run.rows if stage.judged]
    parts += [_refused(stage) for stage in run.rows if "labelled_by_why" in stage.manifest]
    parts += [_unfinished(stage) for stage in run.unfinished_rows if stage.labels]
    return section("labels", "AI labels", *parts, lead=_LABELS) if parts else Markup("")


def contrasts(run: RunRecord) -> Markup:
    """The section on contrast; empty without such a stage."""
    parts = [_contrast_stage(stage) for stage in run.rows if stage.contrasts]
    return section("contrast", "Contrast", *parts, lead=_CONTRAST) if parts else Markup("")


def _revision_stage(stage: RowsStage) -> Markup:
    figures = figures_of(stage)
    of_rows = figures["revisions"]
    return el(
        "div.stage", *_head(stage, figures, words.revision_sentence(of_rows)),
        tables.principles_of_revisions(of_rows),
        tables.categories_of_revisions(of_rows["by_category"], of_rows["left_out"]),
        _rounds(stage.name, of_rows),
        tables.evasion(of_rows["evasion"]),
        *_reasons("dropped", of_rows["dropped"]), *_audit(stage), *map(_example, _chosen_examples(stage.rounds)),
    )  # fmt: skip


def _label_stage(stage: RowsStage) -> Markup:
    figures = figures_of(stage)
    of_rows = figures["labels"]
    rows = [words.agreement_sentence(of_rows)]
    if of_rows["unexplained"]:
        rows.append(f"{of_rows['unexplained']:,} labels differ from the weighted mean of their votes.")
    return el(
        "div.stage", *_head(stage, figures, words.label_sentence(of_rows)),
        el("p", tables.narrow(" ".join(rows))),
        tables.principles_of_labels(of_rows["by_principle"]),
        tables.categories_of_labels(of_rows["by_category"], of_rows["left_out"]),
        *_reasons("abstained", of_rows["abstained"]), *_reasons("dropped", of_rows["dropped"]), *_audit(stage),
    )  # fmt: skip


def _contrast_stage(stage: RowsStage) -> Markup:
    figures = figures_of(stage)
    of_rows = figures["contrast"]
    return el(
        "div.stage", *_head(stage, figures, words.contrast_sentence(of_rows)), tables.principles_of_contrast(of_rows),
        *_reasons("dropped", of_rows["dropped"]),
    )  # fmt: skip


def _unfinished(stage: UnfinishedStage) -> Markup:
    what = el("p", el("strong", tables.narrow(words.refusal_of_judge(stage.audit, stage.gate))))
    do = "Nothing was trained on its rows. Use another judge or policy, or a contrast stage, which needs no judge."
    head = el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", "not finished"))
    return el("div.stage", head, what, el("p", do), *_audit_details(stage.audit))


def _refused(stage: RowsStage) -> Markup:
    """A stage whose judge was refused, so that its pairs were made without one."""
    judge = tables.narrow(words.judge_words(stage.table("judge")))
    what = el("p", el("strong", "The judge was refused."), f" {judge}. Its pairs were made by contrast (see Contrast).")
    head = el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", f"{len(stage.rows):,} rows"))
    return el("div.stage", head, what, *_audit_details(stage.audit))


def _head(stage: RowsStage, figures: Mapping[str, Any], sentence: str) -> list[Markup]:
    constitution = figures["constitution"] or {}
    version = f" {constitution['version']}" if constitution.get("version") else ""
    answering = ", ".join(stage.answering) or "the data"
    about = f"{figures['rows']:,} rows · constitution {constitution.get('name', '?')}{version} · answered by {answering}"
    parts = [el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", about))]
    if words.weak(figures["judge"]):
        parts.append(el("p", el("span.stamp", "weak judge allowed"), " This judge failed its audit and was used anyway."))
    # The verdict first, then what it rests on.
    verdict, stop, rest = tables.narrow(sentence).partition(". ")
    parts.append(el("p", el("strong", f"{verdict}."), f" {rest}") if stop else el("p", el("strong", verdict)))
    if judge := words.judge_words(figures["judge"]):
        parts.append(el("p.note", tables.narrow(f"Judge {judge}.")))
    return parts


def _rounds(name: str, figures: Mapping[str, Any]) -> Markup:
    """Figures of each round as a table, and as a chart if there are several rounds."""
    table = tables.rounds(figures["by_round"], figures["evasion"])
    numbers = [int(number) for number in figures["by_round"]]
    if len(numbers) < 2:
        return table
    shares = {key: {n: figures["by_round"][str(n)][at] for n in numbers} for key, at in _SHARES.items()}
    shares["only refuse"] = {entry["round"]: entry["only_refuse"] for entry in figures["evasion"] if entry["round"]}
    points = {key: [(n, 100 * f["value"]) for n, f in values.items() if f is not None] for key, values in shares.items()}
    series = [
        plots.Series(key, _COLOURS[key], [x for x, _ in line], [y for _, y in line], True)
        for key, line in points.items()
        if line
    ]
    legend = [el("span.key", el(f"i.c{line.colour}"), line.label) for line in series]
    caption = el("figcaption", el("strong", "by round, %"), el("span.legend", *legend))
    chart = plots.curves(series, f"{name}, shares by round", x_name="round")
    return join([table, el("div.plots", el("figure", caption, chart))])


def _reasons(title: str, reasons: Mapping[str, int]) -> list[Markup]:
    if not reasons:
        return []
    return [el("p.note", f"{title}: ", ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()))]


def _audit(stage: RowsStage) -> list[Markup]:
    return _audit_details(stage.audit)


def _audit_details(audit: Mapping[str, Any] | None) -> list[Markup]:
    if audit is None or "exempt" in audit:
        return []
    return [details("the audit of the judge", facts(tables.audit_facts(audit)))]


def _chosen_examples(rounds: Sequence[RoundRecord]) -> list[RoundRecord]:
    """Three kept revisions, spread over the stage; those of prompts without a category first."""
    revised = sorted((row for row in rounds if row.revised), key=lambda row: bool(row.category))
    harmless = [row for row in revised if not row.category]
    pool = harmless if len(harmless) >= _EXAMPLES else revised
    places = sorted({0, len(pool) // 2, len(pool) - 1}) if pool else []
    return [pool[i] for i in places][:_EXAMPLES]


def _example(row: RoundRecord) -> Markup:
    """One revision against its answer, collapsed. The summary has no text of the prompt."""
    category = f" · category {row.category}" if row.category else ""
    parts = [("prompt", [_cut("\n\n".join(turn.content for turn in row.prompt))])]
    parts += [("critique", [_cut(row.critique)])] if row.critique else []
    marks = {"removed": "del", "added": "ins"}
    diff = [
        el(marks[piece.kind], piece.text) if piece.kind in marks else piece.text
        for piece in word_diff(_cut(row.answer), _cut(row.after))
    ]
    blocks = [el("div", el("span.label", name), *texts) for name, texts in [*parts, ("what changed", diff)]]
    return details(f"example: {row.id} · {row.principle}{category}", el("pre.example", *blocks))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
