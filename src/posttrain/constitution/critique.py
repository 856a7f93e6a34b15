"""The critique stage: prompts in, demonstrations out, by critique and revision (Bai et al. 2022, section 3).

    answer ─▶ for each round: draw a principle ─▶ does the answer have the fault? ─▶ critique ─▶ revision ─▶ drop rules
    all revisions ─▶ gate: a judge must prefer them to the answers before them ─▶ rows.jsonl, rounds.jsonl

A principle is drawn for each prompt and round independently. An answer without a fault is not revised. The next round starts
from the last revision that was kept. Each round runs over all prompts in parts that are saved, so a stopped stage resumes
inside a round. `rounds.jsonl` has every round of every prompt; `rows.jsonl` has the demonstrations.

Left out: whether the critique is right. The gate and the evaluation of what is trained on the revisions measure the effect.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from posttrain.artifacts import fingerprint, write_json, write_jsonl
from posttrain.constitution import prompts as words
from posttrain.constitution.gate import GATE_FILE, RevisionGate, gate_revisions, refuse_revisions
from posttrain.constitution.judging import judging
from posttrain.constitution.principles import Constitution, Principle, load_constitution
from posttrain.constitution.revision_faults import fault_of
from posttrain.constitution.saved_parts import Row, in_parts
from posttrain.data.chat import ChatFormat
from posttrain.data.made_rows import messages_of_row, reasons_text, turns_of, write_made_rows
from posttrain.data.prompts import PromptRow, check_room, prepare_prompts
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.judge.local import option_replies, weights_in_use
from posttrain.judge.prompts import conversation_text
from posttrain.records import Message, Rollout
from posttrain.stages.critique import CritiqueStage, judge_of
from posttrain.stages.kind import Preparation, Result
from posttrain.stages.shared_settings import own_seed
from posttrain.train.stage import StageContext

# Prompts that are worked on, and saved, at once.
PART = 128
ROUNDS_FILE = "rounds.jsonl"


class PreparedCritique(NamedTuple):
    """The prompts, the principles to draw from, and the report on the data."""

    prompts: list[PromptRow]
    constitution: Constitution
    report: dict[str, Any]


class RowRequest(NamedTuple):
    """A conversation that continues, and the number of its row."""

    row: int
    messages: list[Message]


def prepare_critique(stage: CritiqueStage, chat: ChatFormat, how: Preparation) -> PreparedCritique:
    """Read prompts and principles. Raises DataError if no prompt is left or one leaves no room for its answer, and RecipeError
    for a principle that lacks a request."""
    where = f'stage "{stage.name}"'
    constitution = load_constitution(stage.constitution).without(stage.leave_out, where)
    for request in ("critique", "revision", "comparison"):
        constitution.having(request, where)
    prompts = prepare_prompts(
        stage.data, chat, seed=how.seed, max_prompt_tokens=stage.max_prompt_tokens, evaluation_prompts=how.evaluation_prompts
    )
    check_room(prompts.train, max_new_tokens=stage.max_new_tokens, context=how.context, where=where)
    return PreparedCritique(prompts.train, constitution, prompts.report)


def draw_principle(principles: Sequence[Principle], row: str, number: int, seed: int) -> Principle:
    """The principle of a prompt in a round, by weight. A function of the seed, the id of the prompt and the round alone."""
    chance = random.Random(f"{seed}|{row}|{number}")
    return chance.choices(principles, [principle.weight for principle in principles])[0]


def write_revisions(context: StageContext, stage: CritiqueStage) -> Result:
    """Answer, criticise, revise, ask the judge, and write the rows. Raises JudgeError if the judge failed its audit or does not
    prefer the revisions; the saved rounds stay for a run with `gate = "report"`."""
    prepared = prepare_critique(stage, context.base.chat, context.preparation)
    with judging(context, stage, judge_of(stage), allow_weak=stage.allow_weak_judge or stage.gate == "report") as judged:
        rounds = CritiqueRounds(context, stage, prepared)
        answers = in_parts(context, prepared.prompts, rounds.answer, name="answers", doing="answering the prompts", size=PART)
        rows = rounds.run([(row["answer"], row["ended"]) for row in answers])
        gate = gate_revisions(judged.judge, rows, prepared.constitution, pairs=stage.gate_pairs, seed=rounds.seed)
    # Written before a refusal, so that its reason can be read.
    write_jsonl(context.folder / ROUNDS_FILE, rows)
    write_json(context.folder / GATE_FILE, gate._asdict())
    if stage.gate == "stop":
        refuse_revisions(gate, f'stage "{stage.name}"')
    revisions = _demonstrations(stage, rows)
    result = write_made_rows(context.folder, revisions, prepared.report, planned=context.data, where=f'stage "{stage.name}"')
    counts = _counts(rows)
    manifest = {
        **result.manifest, "rounds": counts, "judge": judged.manifest, "gate": gate._asdict(),
        "prompts_by_source": dict(Counter(row.source for row in prepared.prompts)),
        "constitution": prepared.constitution.identity,
    }  # fmt: skip
    return Result(manifest, (*result.warnings, *judged.warnings, *_warnings(counts, gate)))


class CritiqueRounds:
    """The policy that answers, and what a part of a round needs."""

    def __init__(self, context: StageContext, stage: CritiqueStage, prepared: PreparedCritique) -> None:
        self.context, self.stage, self.prepared = context, stage, prepared
        self.policy = context.policies.activate(stage.init)
        self.seed = own_seed(stage, context.recipe.seed)
        self.principles = {principle.id: principle for principle in prepared.constitution.principle}
        self.fingerprint = fingerprint(weights_in_use(context.base, self.policy))

    def answer(self, part: Sequence[PromptRow], number: int) -> list[Row]:
        """The first answers of a part."""
        rollouts = self._generate([row.ids for row in part], self.stage.max_new_tokens, f"answers {number}")
        return [{"answer": rollout.text.strip(), "ended": rollout.ended} for rollout in rollouts]

    def run(self, answers: list[tuple[str, bool]]) -> list[Row]:
        """All rounds over all prompts. Each starts from the answers that the round before left, and whether they end."""
        rows: list[Row] = []
        for number in range(1, self.stage.rounds + 1):
            begun = [self._begin(row, number, *answer) for row, answer in zip(self.prepared.prompts, answers, strict=True)]
            made = in_parts(
                self.context, begun, self._revise, name=f"round-{number}", doing=f"round {number} of critiques", size=PART
            )
            answers = [
                (row["revision"], True) if row["outcome"] == "revised" else (row["answer"], row["answer_ended"]) for row in made
            ]
            rows += made
        return rows

    def _begin(self, row: PromptRow, number: int, answer: str, ended: bool) -> Row:
        principle = draw_principle(self.prepared.constitution.principle, row.id, number, self.seed)
        return {
            "id": f"{row.id}/r{number}", "prompt_id": row.id, "category": row.category, "source": row.source, "round": number,
            "prompt": turns_of(row.messages), "answer": answer,
            "answer_ended": ended,
            "principle": principle.id, "detection": None, "critique": None, "revision": None, "outcome": "nothing found",
            "reason": "", "gate": None, "policy": self.fingerprint, "seed": self.seed,
        }  # fmt: skip

    def _revise(self, part: Sequence[Row], number: int) -> list[Row]:
        """Detection, critique and revision of a part of a round, each for all of its rows at once."""
        rows = [dict(row) for row in part]
        name = f"{rows[0]['round']} {number}"
        faulty = self._detect(rows)
        critiques = self._reply(
            [RowRequest(i, words.critique(*self._of(rows[i]), examples=self.stage.examples)) for i in faulty], rows,
            self.stage.critique_tokens, f"critiques {name}",
        )  # fmt: skip
        revisable = []
        for i, reply in critiques.items():
            rows[i]["critique"] = reply.text.strip()
            if not rows[i]["critique"]:
                rows[i] |= {"outcome": "dropped", "reason": "an empty critique"}
            elif not words.finds_nothing(rows[i]["critique"]):
                revisable.append(i)
        asked = [
            RowRequest(i, words.revision(*self._of(rows[i]), rows[i]["critique"], examples=self.stage.examples))
            for i in revisable
        ]
        for i, reply in self._reply(asked, rows, self.stage.max_new_tokens, f"revisions {name}").items():
            fault = fault_of(reply.text.strip(), rows[i]["answer"], rows[i]["critique"], ended=reply.ended)
            rows[i] |= {"revision": reply.text.strip(), "outcome": "dropped" if fault else "revised", "reason": fault}
        return rows

    def _of(self, row: Row) -> tuple[Principle, str, str]:
        return self.principles[row["principle"]], conversation_text(messages_of_row(row)), row["answer"]

    def _detect(self, rows: list[Row]) -> list[int]:
        """The rows whose answer has the fault, as the policy sees it. An empty answer, or an unreadable reply, has none."""
        usable = [i for i in sorted(range(len(rows)), key=lambda i: str(rows[i]["principle"])) if rows[i]["answer"]]
        for i in set(range(len(rows))) - set(usable):
            rows[i] |= {"outcome": "dropped", "reason": "an empty answer"}
        if self.stage.detection == 0:
            return usable
        asked = [words.detection(*self._of(rows[i]), examples=self.stage.examples) for i in usable]
        found = []
        for i, reply in zip(usable, option_replies(self.context.base, self.policy, asked, ("Yes", "No")), strict=True):
            rows[i]["detection"] = None if reply.probability is None else round(reply.probability, 6)
            if reply.probability is None:
                rows[i] |= {"outcome": "dropped", "reason": f"detection: {reply.why}"}
            elif reply.probability >= self.stage.detection:
                found.append(i)
        return found

    def _reply(self, requests: list[RowRequest], rows: list[Row], tokens: int, name: str) -> dict[int, Rollout]:
        """The replies by number of the row. A conversation that leaves no room for its reply drops its row."""
        base = self.context.base
        # Prompts of one principle begin with the same worked examples, which neighbours share.
        requests = sorted(requests, key=lambda request: str(rows[request.row]["principle"]))
        encoded = [(request.row, base.chat.encode_prompt(request.messages)) for request in requests]
        fitting = [(i, ids) for i, ids in encoded if len(ids) + tokens <= base.context]
        for i in {i for i, _ in encoded} - {i for i, _ in fitting}:
            rows[i] |= {"outcome": "dropped", "reason": f"does not fit the context of {base.context} tokens"}
        rollouts = self._generate([ids for _, ids in fitting], tokens, name)
        return {i: rollout for (i, _), rollout in zip(fitting, rollouts, strict=True)}

    def _generate(self, prompts: list[list[int]], tokens: int, name: str) -> list[Rollout]:
        """Samples whose seed depends on the part and on what is sampled, so that a resumed stage draws the same."""
        self.context.stop.check("sampling")
        if not prompts:
            return []
        seed = random.Random(f"{self.seed}|{name}").randrange(2**31)
        return generate(self.context.base, prompts, SamplingSettings(tokens, self.stage.temperature, 1.0, seed), self.policy)


def _demonstrations(stage: CritiqueStage, rows: Sequence[Row]) -> list[Row]:
    """The revisions that were kept, as demonstrations: all of them, or the last one of each prompt."""
    revised = [row for row in rows if row["outcome"] == "revised"]
    if stage.keep == "last":
        revised = list({row["prompt_id"]: row for row in revised}.values())
    return [
        {"id": r["id"], "prompt": r["prompt"], "completion": r["revision"], "principle": r["principle"], "round": r["round"]}
        for r in revised
    ]


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    outcomes = Counter(row["outcome"] for row in rows)
    dropped = Counter(row["reason"] for row in rows if row["outcome"] == "dropped")
    return {"revised": outcomes["revised"], "nothing found": outcomes["nothing found"], "dropped": dict(dropped)}


def _warnings(counts: dict[str, Any], gate: RevisionGate) -> tuple[str, ...]:
    dropped = sum(counts["dropped"].values())
    total = counts["revised"] + counts["nothing found"] + dropped
    warnings = (f"{dropped:,} of {total:,} rounds are dropped: {reasons_text(counts['dropped'])}",) if dropped else ()
    return warnings if gate.passes else (*warnings, f"the revisions did not pass the gate: {gate.text}")
