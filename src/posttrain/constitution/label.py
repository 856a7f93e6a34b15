"""The label stage: prompts in, preferences with probabilities out, by a judge and a constitution (Bai et al. 2022, section 4).

    policies ─▶ answers ─▶ all pairs of a prompt's answers ─▶ a comparison for each principle ─▶ vote ─▶ rows.jsonl

    p = Σ w_k p_k / Σ w_k    over the principles k that did not abstain; w_k: weight, p_k: probability that answer a is better

A pair on which all principles abstain, or whose votes are tied, has no label. `judged.jsonl` has every pair with its votes;
`rows.jsonl` has the labelled ones, each with the probability of its label, which is never clamped here. Answers and votes are
saved in parts, so a stopped stage resumes.

Left out: whether the judge is right about these pairs. Its audit measures it on gold pairs, `answers = 0` on pairs of people.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from posttrain.artifacts import fingerprint, write_jsonl
from posttrain.constitution.contrast_pairs import make_contrast
from posttrain.constitution.judging import Judging, judging
from posttrain.constitution.label_data import AuthoredAnswer, LabelItem, PreparedLabel, contrast_of, prepare_label
from posttrain.constitution.principles import Principle
from posttrain.constitution.saved_parts import Row, in_parts
from posttrain.data.made_rows import reasons_text, turns_of, write_made_rows
from posttrain.errors import DataError
from posttrain.evaluate.kappa import cohens_kappa
from posttrain.evaluate.stats import weighted_mean, wilson
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.judge.prompts import conversation_text
from posttrain.judge.verdict import ComparisonRequest, PairwiseJudge, Verdict
from posttrain.stages.judge_settings import judge_settings
from posttrain.stages.kind import Result
from posttrain.stages.label import LabelStage, answering
from posttrain.stages.shared_settings import own_seed
from posttrain.train.stage import StageContext

# Prompts whose answers are saved at once, and comparisons whose verdicts are.
PART = 128
COMPARISONS = 512
JUDGED_FILE = "judged.jsonl"


class VotedPair(NamedTuple):
    """A row of judged.jsonl before the vote, and the prompt with the principles that vote on it."""

    row: Row
    item: LabelItem


def write_label(context: StageContext, stage: LabelStage) -> Result:
    """Answer, judge, vote, and write the rows.

    Raises JudgeError if the judge failed its audit and the recipe says neither `allow_weak_judge` nor `if_judge_refused =
    "contrast"`, and DataError if no pair has a label.
    """
    prepared = prepare_label(stage, context.base.chat, context.preparation)
    contrast = stage.if_judge_refused == "contrast"
    with judging(context, stage, judge_settings(stage.judge), allow_weak=stage.allow_weak_judge or contrast) as judged:
        if judged.trust.passes or not contrast:
            rows = _judge(context, stage, judged.judge, _pairs(context, stage, prepared.items))
            return _write_judged(context, stage, prepared, judged, rows)
    return _write_contrast(context, stage, prepared, judged)


# --- answers ----------------------------------------------------------------------------------------------------------


def _pairs(context: StageContext, stage: LabelStage, items: list[LabelItem]) -> list[VotedPair]:
    """All pairs of the answers to each prompt."""
    seed = own_seed(stage, context.recipe.seed)
    answers = [list(item.answers) for item in items]
    for name in answering(stage):
        for known, row in zip(answers, _sampled(context, stage, name, items, seed), strict=True):
            known += [AuthoredAnswer(text, name, ended) for text, ended in row["answers"]]
    return [
        VotedPair(row, item) for item, known in zip(items, answers, strict=True) for row in pair_rows(item, known, seed)
    ]  # fmt: skip


def _sampled(context: StageContext, stage: LabelStage, name: str, items: list[LabelItem], seed: int) -> list[Row]:
    """The answers of one policy to every prompt."""
    policy = context.policies.activate(name)

    def answer(part: Sequence[LabelItem], number: int) -> list[Row]:
        drawn = random.Random(f"{seed}|{name}|{number}").randrange(2**31)
        settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, drawn)
        prompts = [item.row.ids for item in part]
        rollouts = generate(context.base, prompts, settings, policy, completions=stage.answers)
        each = [[rollout.text.strip(), rollout.ended] for rollout in rollouts]
        return [{"answers": each[k : k + stage.answers]} for k in range(0, len(each), stage.answers)]

    return in_parts(context, items, answer, name=f"{stage.name}-answers-{name}", doing="answering the prompts", size=PART)


def pair_rows(item: LabelItem, answers: Sequence[AuthoredAnswer], seed: int) -> list[Row]:
    """A row of judged.jsonl for each two answers, not judged yet. Rows that must not be judged say why."""
    rows: list[Row] = []
    known: set[frozenset[str]] = set()
    prompt = turns_of(item.row.messages)
    for (i, a), (j, b) in combinations(enumerate(answers, 1), 2):
        texts = frozenset((a.text, b.text))
        reason = (
            "an empty answer" if "" in texts
            else "an answer that does not end" if not (a.ended and b.ended)
            else "equal answers" if len(texts) == 1
            else "the answers of an earlier pair" if texts in known
            else ""
        )  # fmt: skip
        known.add(texts)
        rows.append({
            "id": f"{item.row.id}/{i}-{j}", "prompt_id": item.row.id, "category": item.row.category, "source": item.row.source,
            "prompt": prompt, "a": a.text, "b": b.text, "a_by": a.by, "b_by": b.by, "human": item.human, "votes": [],
            "probability": None, "outcome": "dropped" if reason else "labelled", "reason": reason, "seed": seed,
        })  # fmt: skip
    return rows


# --- votes ------------------------------------------------------------------------------------------------------------


def _judge(context: StageContext, stage: LabelStage, judge: PairwiseJudge, pairs: list[VotedPair]) -> list[Row]:
    """The rows with the votes of all principles. All comparisons of a part are one call of the judge."""
    voters = max(len(pair.item.principles) for pair in pairs)

    def judge_part(part: Sequence[VotedPair], number: int) -> list[Row]:
        requests = [
            ComparisonRequest(conversation_text(item.row.messages), row["a"], row["b"], principle.comparison or "")
            for row, item in part if row["outcome"] == "labelled" for principle in item.principles
        ]  # fmt: skip
        verdicts = iter(judge.compare(requests) if requests else [])
        return [
            voted(row, [(principle, next(verdicts)) for principle in item.principles]) if row["outcome"] == "labelled" else row
            for row, item in part
        ]

    # Verdicts of another judge, or of an edited one, are never taken for those of this one.
    asked = fingerprint(judge.identity())
    return in_parts(
        context, pairs, judge_part, name=f"{stage.name}-judged-{asked}", doing="comparing answers",
        size=max(1, COMPARISONS // voters),
    )  # fmt: skip


def voted(row: Row, verdicts: Sequence[tuple[Principle, Verdict]]) -> Row:
    """The row with its votes and their weighted mean. If every principle abstains, or they are tied, the pair has no label."""
    votes: list[Row] = [
        {
            "principle": principle.id, "weight": principle.weight, "probability": _rounded(verdict.probability),
            "first": _rounded(verdict.first), "second": _rounded(verdict.second), "why": verdict.why,
        }
        for principle, verdict in verdicts
    ]  # fmt: skip
    mean = weighted_mean((vote["weight"], vote["probability"]) for vote in votes)
    if mean is None:
        reason = Counter(str(vote["why"]) for vote in votes).most_common(1)[0][0]
        return {**row, "votes": votes, "outcome": "abstained", "reason": reason}
    tied = {"outcome": "abstained", "reason": "the votes are tied"} if _rounded(mean) == 0.5 else {}
    return {**row, "votes": votes, "probability": _rounded(mean), **tied}


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 6)


def preference(row: Row) -> Row:
    """A labelled pair as a preference, with the principles that voted for its label."""
    a_wins = row["probability"] > 0.5
    chosen, rejected = (row["a"], row["b"]) if a_wins else (row["b"], row["a"])
    voters = [
        vote["principle"] for vote in row["votes"]
        if vote["probability"] is not None and (vote["probability"] > 0.5 if a_wins else vote["probability"] < 0.5)
    ]  # fmt: skip
    return {
        "id": row["id"], "prompt": row["prompt"], "chosen": chosen, "rejected": rejected,
        "probability": round(max(row["probability"], 1 - row["probability"]), 6), "category": row["category"],
        "principles": voters,
    }  # fmt: skip


# --- files ------------------------------------------------------------------------------------------------------------


def _write_judged(
    context: StageContext, stage: LabelStage, prepared: PreparedLabel, judged: Judging, rows: list[Row]
) -> Result:  # fmt: skip
    where, counts = f'stage "{stage.name}"', _counts(rows)
    labelled = [preference(row) for row in rows if row["outcome"] == "labelled"]
    if not labelled:
        raise DataError(where, f"none of {len(rows):,} pairs has a label ({_losses(rows)})", do="change judge, policy or data")
    write_jsonl(context.folder / JUDGED_FILE, rows)
    result = write_made_rows(context.folder, labelled, prepared.report, planned=context.data, where=where)
    manifest = {
        **result.manifest, "pairs": counts, "judge": judged.manifest, "constitution": prepared.constitution.identity,
        "labelled_by": "judge", **agreement_with_people(rows),
    }  # fmt: skip
    lost = len(rows) - len(labelled)
    warnings = (f"{lost:,} of {len(rows):,} pairs have no label: {_losses(rows)}",) if lost else ()
    return Result(manifest, (*result.warnings, *judged.warnings, *warnings))


def _write_contrast(context: StageContext, stage: LabelStage, prepared: PreparedLabel, judged: Judging) -> Result:
    """The pairs of a contrast stage, because the judge failed its audit."""
    result = make_contrast(context, contrast_of(stage))
    manifest = {
        **result.manifest, "judge": {**judged.manifest, "allowed_weak": False},
        "constitution": prepared.constitution.identity, "labelled_by": "contrast", "labelled_by_why": judged.failure,
    }  # fmt: skip
    return Result(
        manifest, (*result.warnings, f"{judged.failure}: contrast labels these pairs, and no judge compared the answers")
    )


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    outcomes = Counter(row["outcome"] for row in rows)
    dropped = Counter(row["reason"] for row in rows if row["outcome"] == "dropped")
    return {"labelled": outcomes["labelled"], "abstained": outcomes["abstained"], "dropped": dict(dropped)}


def _losses(rows: Sequence[Row]) -> str:
    lost = Counter(
        f"abstained: {row['reason']}" if row["outcome"] == "abstained" else row["reason"] for row in rows
        if row["outcome"] != "labelled"
    )  # fmt: skip
    return reasons_text(lost)


def agreement_with_people(rows: Sequence[Row]) -> dict[str, Any]:
    """How often judge and people prefer the same answer, with Cohen's kappa, over pairs in which both prefer one."""
    both = [
        (row["probability"] > 0.5, row["human"] > 0.5) for row in rows
        if None not in (row["probability"], row["human"]) and 0.5 not in (row["probability"], row["human"])
    ]  # fmt: skip
    kappa = cohens_kappa([judge for judge, _ in both], [people for _, people in both])
    if kappa is None:
        return {}
    alike = wilson(sum(judge == people for judge, people in both), len(both))
    figures = {"value": alike.value, "low": alike.low, "high": alike.high, "kappa": kappa.value}
    rounded = {name: None if value is None else round(value, 4) for name, value in figures.items()}
    return {"agreement_with_people": {**rounded, "n": len(both)}}
