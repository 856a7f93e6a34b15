"""The contrast stage: prompts in, preference pairs out, without a judge (after Yang et al. 2024, RLCD).

For each prompt the policy answers twice: with drawn principles in its system prompt, and without. The first answer is chosen,
the second rejected. That label is an assumption, so no judge is needed. Answers are saved in parts, so that a stopped stage
resumes.
Left out: whether the principles had an effect, which the evaluation of what is trained on the pairs shows.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import read_jsonl, write_jsonl
from posttrain.constitution.principles import Principle, load_constitution
from posttrain.constitution.prompts import contrast
from posttrain.data.chat import ChatFormat
from posttrain.data.made_rows import write_made_rows
from posttrain.data.prompts import PromptRow, check_room, prepare_prompts
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.progress import Progress
from posttrain.records import Rollout
from posttrain.stages.contrast import ContrastStage
from posttrain.stages.kind import Preparation, Result
from posttrain.train.checkpoint import CHECKPOINTS
from posttrain.train.stage import StageContext

# Prompts whose answers are saved at once.
PART = 128


class Drawn(NamedTuple):
    """A prompt, the principles that were drawn for it, and its token ids with them in the system prompt."""

    row: PromptRow
    principles: list[Principle]
    ids: list[int]


class PreparedContrast(NamedTuple):
    """The prompts with their principles, and the report on the data."""

    drawn: list[Drawn]
    report: dict[str, Any]


def prepare_contrast(stage: ContrastStage, chat: ChatFormat, how: Preparation) -> PreparedContrast:
    """Draw principles for the prompts. Raises DataError if no prompt is left, or one leaves no room for its answer with or
    without principles."""
    prompts = prepare_prompts(
        stage.data, chat, seed=how.seed, max_prompt_tokens=stage.max_prompt_tokens, evaluation_prompts=how.evaluation_prompts
    )
    drawn = draw_principles(stage, prompts.train, chat, seed=how.seed)
    longest = [PromptRow(f"{d.row.id} with {len(d.principles)} principles", d.ids, "") for d in drawn]
    where = f'stage "{stage.name}"'
    check_room([*prompts.train, *longest], max_new_tokens=stage.max_new_tokens, context=how.context, where=where)
    return PreparedContrast(drawn, prompts.report)


def draw_principles(stage: ContrastStage, rows: list[PromptRow], chat: ChatFormat, *, seed: int) -> list[Drawn]:
    """Principles for each prompt, without repetition, by weight. A draw is a function of the seed and of the prompt's id."""
    principles = load_constitution(stage.constitution).principle
    seed = seed if stage.seed is None else stage.seed
    drawn = []
    for row in rows:
        chance = random.Random(f"{seed}|{row.id}")
        # The largest u^(1/w) of uniform u draw without replacement by weight w (Efraimidis and Spirakis 2006).
        ranked = sorted(principles, key=lambda principle: -(chance.random() ** (1 / principle.weight)))
        chosen = ranked[: stage.principles or len(ranked)]
        drawn.append(Drawn(row, chosen, chat.encode_prompt(contrast(chosen, row.messages))))
    return drawn


def write_contrast(context: StageContext, stage: ContrastStage) -> Result:
    """Answer every prompt with and without principles and write the pairs. Raises DataError for data that cannot be used."""
    drawn, report = prepare_contrast(stage, context.base.chat, context.preparation)
    policy = context.policies.activate(stage.init)
    rows: list[dict[str, Any]] = []
    progress = Progress(stage.name, len(drawn))
    for number, start in enumerate(range(0, len(drawn), PART)):
        part = drawn[start : start + PART]
        saved = context.folder / CHECKPOINTS / f"pairs-{number:05d}.jsonl"
        rows += list(read_jsonl(saved)) if saved.exists() else _answer(context, stage, part, policy, number, saved)
        progress.update(len(part))
        context.stop.check("answering with and without principles")
    usable = [row for row in rows if "dropped" not in row]
    dropped = Counter(row["dropped"] for row in rows if "dropped" in row)
    result = write_made_rows(context.folder, usable, report, planned=context.data, where=f'stage "{stage.name}"')
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    warnings = (f"{dropped.total():,} of {len(rows):,} pairs are dropped: {reasons}",) if dropped else ()
    return Result({**result.manifest, "pairs_dropped": dict(dropped)}, (*result.warnings, *warnings))


def _answer(
    context: StageContext, stage: ContrastStage, part: list[Drawn], policy: str, number: int, path: Path
) -> list[dict[str, Any]]:
    """The pairs of one part, saved. A pair that cannot be used has a reason under `dropped`."""
    seed = context.recipe.seed if stage.seed is None else stage.seed
    settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, (seed * 1_000_003 + number) % 2**31)
    # Both answers of a prompt run in one batch; prompts that begin alike share what is computed.
    rollouts = generate(context.base, [ids for d in part for ids in (d.ids, d.row.ids)], settings, policy)
    rows = [_pair(d, rollouts[2 * i], rollouts[2 * i + 1]) for i, d in enumerate(part)]
    path.parent.mkdir(exist_ok=True)
    write_jsonl(path, rows)
    return rows


def _pair(drawn: Drawn, with_principles: Rollout, plain: Rollout) -> dict[str, Any]:
    chosen, rejected = with_principles.text.strip(), plain.text.strip()
    row = {
        "id": drawn.row.id, "prompt": [{"role": m.role, "content": m.content} for m in drawn.row.messages], "chosen": chosen,
        "rejected": rejected, "principles": [principle.id for principle in drawn.principles],
    }  # fmt: skip
    if not chosen or not rejected:
        return {**row, "dropped": "with an empty answer"}
    if not with_principles.ended or not plain.ended:
        return {**row, "dropped": "with an answer that does not end"}
    return {**row, "dropped": "with equal answers"} if chosen == rejected else row
