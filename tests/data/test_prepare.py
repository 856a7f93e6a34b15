"""From records to rows: every row is accounted for, none trains on nothing, a prompt stands on one side only."""

import random
from typing import Any

import pytest

from posttrain.data.chat import ChatFormat
from posttrain.data.prepare import (
    Contamination,
    PreparedPairs,
    PreparedRows,
    in_validation,
    prepare_demonstrations,
    prepare_pairs,
)
from posttrain.data.read_results import Demonstrations, Preferences, Problem, SourceInfo
from posttrain.errors import DataError
from posttrain.models.tokenizer import HuggingFaceTokenizer
from posttrain.records import Conversation, Message, PreferencePair

# The gemma template on one token a byte: <bos><start_of_turn>user\n … <end_of_turn>\n<start_of_turn>model\n … <end_of_turn>
AROUND_PROMPT = 1 + 1 + 5 + 1 + 1 + 1 + 6
AROUND = AROUND_PROMPT + 1


def talk(name: str, ask: str, say: str) -> Conversation:
    return Conversation(name, (Message("user", ask), Message("assistant", say)), "made.jsonl")


def pair(name: str, ask: str, chosen: str, rejected: str) -> PreferencePair:
    sides = (Message("assistant", chosen),), (Message("assistant", rejected),)
    return PreferencePair(name, (Message("user", ask),), *sides, source="made.jsonl")


def sources(rows: int) -> tuple[SourceInfo, ...]:
    return (SourceInfo("made.jsonl", "messages", rows, "0" * 64),)


def rows_of(
    chat: ChatFormat, records: list[Conversation], problems: tuple[Problem, ...] = (), *, max_tokens: int = 1024,
    validation: float = 0.0, allow_dropped: float = 0.0, evaluation: tuple[str, ...] = (),
) -> PreparedRows:  # fmt: skip
    read = Demonstrations(tuple(records), problems, sources(len(records) + len(problems)))
    return prepare_demonstrations(
        read, chat, max_tokens=max_tokens, validation=validation, allow_dropped=allow_dropped, evaluation_prompts=evaluation
    )


def pairs_of(
    chat: ChatFormat, records: list[PreferencePair], problems: tuple[Problem, ...] = (), *, max_tokens: int = 1024,
    validation: float = 0.0, allow_dropped: float = 0.0, evaluation: tuple[str, ...] = (),
) -> PreparedPairs:  # fmt: skip
    read = Preferences(tuple(records), problems, sources(len(records) + len(problems)))
    return prepare_pairs(
        read, chat, max_tokens=max_tokens, validation=validation, allow_dropped=allow_dropped, evaluation_prompts=evaluation
    )


def accounted(prepared: PreparedRows | PreparedPairs) -> int:
    report = prepared.report
    assert (report["train_rows"], report["validation_rows"]) == (len(prepared.train), len(prepared.validation))
    return report["train_rows"] + report["validation_rows"] + sum(report["dropped"].values()) + report["contaminated"]


def test_the_count_of_template_tokens_that_the_tests_below_build_on(gemma: ChatFormat):
    row = rows_of(gemma, [talk("a", "12345", "123")]).train[0]
    assert (len(row.ids), sum(row.trained)) == (AROUND + 5 + 3, 4)


# --- B2 ---------------------------------------------------------------------------------------------------------------


def test_0_of_10000_rows_around_the_limit_train_on_nothing(gemma: ChatFormat):
    rng = random.Random(2)
    limit = 64
    lengths = [(rng.randint(1, limit + 4 - AROUND), rng.randint(1, 40)) for _ in range(10_000)]
    records = [talk(f"r{i}", "q" * ask, "a" * say) for i, (ask, say) in enumerate(lengths)]
    prepared = rows_of(gemma, records, max_tokens=limit, validation=0.2, allow_dropped=1.0, evaluation=("q" * 7,))
    kept = [*prepared.train, *prepared.validation]
    assert sum(not any(r.trained) for r in kept) == 0, "0 of 10,000 rows without a target"
    assert accounted(prepared) == prepared.report["rows"] == prepared.report["mixed_rows"] == 10_000
    # By arithmetic: contaminated first; no target where the prompt fills the limit; cut where the whole is longer.
    asked = [(ask, say) for ask, say in lengths if ask != 7]
    assert prepared.report["contaminated"] == 10_000 - len(asked)
    assert prepared.report["dropped"] == {
        f"no trained token within max_tokens = {limit}": sum(AROUND_PROMPT + ask >= limit for ask, _ in asked)
    }
    assert prepared.report["truncated"] == sum(AROUND + ask + say > limit for ask, say in asked)
    assert prepared.report["ends_trained"] == 1.0
    assert all(len(r.ids) <= limit for r in kept)
    assert prepared.report["tokens"] == sum(len(r.ids) for r in kept)
    assert prepared.report["trained_tokens"] == sum(sum(r.trained) for r in kept)


def test_0_of_2000_pairs_around_the_limit_are_lost(gemma: ChatFormat):
    rng = random.Random(3)
    limit = 64
    lengths = [(rng.randint(1, 30), rng.randint(1, 30), rng.randint(1, 30)) for _ in range(2000)]
    records = [pair(f"r{i}", "q" * a, "c" * b, "r" * c) for i, (a, b, c) in enumerate(lengths)]
    prepared = pairs_of(gemma, records, max_tokens=limit, validation=0.2, allow_dropped=1.0, evaluation=("q" * 7,))
    assert accounted(prepared) == 2000
    long = sum(a != 7 and AROUND + a + max(b, c) > limit for a, b, c in lengths)
    assert prepared.report["dropped"] == {f"longer than max_tokens = {limit}": long}
    for row in (*prepared.train, *prepared.validation):
        assert row.chosen_ids[-1] == row.rejected_ids[-1] == gemma.end_id
        assert len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids)) <= limit


def test_the_context_of_the_base_limits_rows_and_pairs(gemma: ChatFormat):
    records = [talk("short", "q", "a"), talk("long", "q", "a" * 80), talk("asks long", "q" * 80, "a")]
    read = Demonstrations(tuple(records), (), sources(3))
    keywords: dict[str, Any] = {"validation": 0.0, "allow_dropped": 1.0, "evaluation_prompts": (), "context": 64}
    prepared = prepare_demonstrations(read, gemma, max_tokens=1024, **keywords)
    assert [len(row.ids) for row in prepared.train] == [AROUND + 2, 64]
    assert (prepared.report["max_tokens"], prepared.report["truncated"]) == (64, 2)
    assert prepared.report["dropped"] == {"no trained token within the base's context of 64 tokens": 1}
    assert prepared.report["warnings"] == ["max_tokens = 1,024 exceeds the base's context of 64 tokens: 2 rows are truncated"]
    pairs = Preferences((pair("a", "q", "1", "2"), pair("b", "q", "1" * 80, "2")), (), sources(2))
    assert prepare_pairs(pairs, gemma, max_tokens=1024, **keywords).report["dropped"] == {
        "longer than the base's context of 64 tokens": 1
    }
    assert prepare_demonstrations(read, gemma, max_tokens=64, **keywords).report["warnings"] == []


def test_more_than_allowed_dropped_is_an_error_that_names_the_rows(gemma: ChatFormat):
    good = [talk(f"g{i}", f"question {i}", "yes") for i in range(98)]
    bad = [talk(f"b{i}", "q" * 200 + str(i), "yes") for i in range(2)]
    with pytest.raises(DataError) as error:
        rows_of(gemma, good + bad, max_tokens=100, allow_dropped=0.01)
    assert str(error.value) == (
        'data "made.jsonl" · 2 of 100 rows cannot be trained on (2 rows: no trained token within max_tokens = 100 '
        "(first: b0, b1)) · 1% (allow_dropped) · correct the rows, or raise allow_dropped in the recipe"
    )
    assert len(rows_of(gemma, good + bad, max_tokens=100, allow_dropped=0.02).train) == 98
    assert len(rows_of(gemma, [*good, *good, *bad[:1]], max_tokens=100, allow_dropped=0.01).train) == 196


def test_unreadable_rows_count_as_dropped(gemma: ChatFormat):
    good = [talk(f"g{i}", f"question {i}", "yes") for i in range(3)]
    problem = Problem("made.jsonl", "row 7", "no assistant turn")
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be trained on \(1 rows: no assistant turn \(first: row 7\)\)"):
        rows_of(gemma, good, (problem,))
    prepared = rows_of(gemma, good, (problem,), allow_dropped=0.25)
    assert prepared.report["dropped_rows"] == [problem._asdict()]
    assert accounted(prepared) == 4


@pytest.mark.parametrize("allowed", [0.0, 1.0])
def test_every_row_longer_than_the_limit_is_an_error(gemma: ChatFormat, allowed: float):
    with pytest.raises(DataError, match=r"no row left to train on \(2 rows: no trained token within max_tokens = 10"):
        rows_of(gemma, [talk("a", "one", "1"), talk("b", "two", "2")], max_tokens=10, allow_dropped=allowed)
    with pytest.raises(DataError, match=r"no row left to train on \(1 rows: longer than max_tokens = 10"):
        pairs_of(gemma, [pair("a", "one", "1", "2")], max_tokens=10, allow_dropped=allowed)
    with pytest.raises(DataError, match=r"no row left to train on .all held out or contaminated."):
        rows_of(gemma, [talk("a", "one", "1")], evaluation=("one",))


def test_a_row_that_the_template_refuses_is_dropped_with_its_reason(make_tokenizer):
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    chat = ChatFormat(make_tokenizer(source))
    odd = Conversation("odd", (Message("system", "x"), Message("user", "q"), Message("assistant", "a")), "made.jsonl")
    prepared = rows_of(chat, [talk("a", "one", "1"), odd], allow_dropped=0.5)
    assert prepared.report["dropped"] == {"chat template refuses the conversation: no system role": 1}
    assert prepared.report["dropped_rows"][0]["row"] == "odd"
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be trained on .*no system role .first: odd"):
        rows_of(chat, [talk("a", "one", "1"), odd], allow_dropped=0.01)


def test_sides_that_a_template_makes_equal_are_dropped(gemma: ChatFormat):
    prepared = pairs_of(gemma, [pair("a", "one", "1", "2"), pair("b", "two", "same", " same\n")], allow_dropped=0.5)
    assert prepared.report["dropped"] == {"chosen equals rejected once rendered": 1}


def test_the_end_of_every_uncut_row_is_trained(tiny_tokenizer: HuggingFaceTokenizer):
    records = [talk(f"r{i}", "q" * (1 + i % 7), "a" * (1 + i % 11)) for i in range(100)]
    for template in ("gemma", "chatml", "plain"):
        prepared = rows_of(ChatFormat(tiny_tokenizer, template), records)
        assert (prepared.report["ends_trained"], prepared.report["truncated"]) == (1.0, 0)


# --- validation split -------------------------------------------------------------------------------------------------


def test_one_prompt_never_stands_on_both_sides(gemma: ChatFormat):
    records = [talk(f"r{i}", f"question {i % 50}" + " " * (i % 3), f"answer {i}") for i in range(400)]
    prepared = rows_of(gemma, records, validation=0.3)
    asked = {r.id: r.messages[0].content.strip() for r in records}
    train, held = ({asked[row.id] for row in side} for side in (prepared.train, prepared.validation))
    assert not train & held
    assert train | held == {f"question {i}" for i in range(50)}


def test_the_split_is_stable_and_the_same_for_demonstrations_and_pairs(gemma: ChatFormat):
    asks = [f"question number {i}" for i in range(200)]
    talks, pairs = [talk(a, a, "yes") for a in asks], [pair(a, a, "yes", "no") for a in asks]
    held = {row.id for row in rows_of(gemma, talks, validation=0.2).validation}
    assert held == {row.id for row in pairs_of(gemma, pairs, validation=0.2).validation}
    assert held == {row.id for row in rows_of(gemma, talks[::-1], validation=0.2).validation}
    assert held > {row.id for row in rows_of(gemma, talks, validation=0.1).validation}
    # Fixed for good: a run that goes on elsewhere holds out the same prompts.
    assert [a for a in asks if in_validation((Message("user", a),), 0.05)][:3] == HELD_OUT


HELD_OUT = ["question number 9", "question number 53", "question number 62"]


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_held_out_is_about_the_share_asked_for(share: float):
    held = sum(in_validation((Message("user", f"q{i}"),), share) for i in range(10_000))
    assert abs(held / 10_000 - share) < 4 * (share * (1 - share) / 10_000) ** 0.5  # four standard errors


# --- contamination ----------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.mark.parametrize(
    "asked, found",
    [
        ("What is the capital of Norway?", True),
        ("what is THE capital, of norway", True),
        ("What is the capital of Norway, please?", False),
        (LONG, True),
        ("Say: " + LONG.upper().replace(" ", ", ") + "!", True),
        ("zero " + " ".join(LONG.split()[1:]) + " more", True),  # 13 words in a row
        ("zero " + " ".join(LONG.split()[2:]) + " more", False),  # 12 words in a row
        ("", False),
    ],
)
def test_a_prompt_is_contaminated_by_the_whole_or_by_13_words(asked: str, found: bool):
    contamination = Contamination(["What is the capital of Norway?", LONG, "  "])
    assert contamination.found([Message("user", asked)]) is found
    assert contamination.found([Message("user", "Hi"), Message("assistant", "Hello"), Message("user", asked)]) is found
    assert contamination.found([Message("assistant", asked)]) is False


def test_contaminated_rows_are_left_out_and_named(gemma: ChatFormat):
    prepared = rows_of(gemma, [talk("a", "Asked.", "1"), talk("b", "Not asked.", "2")], evaluation=("asked",))
    assert [r.id for r in prepared.train] == ["b"]
    assert (prepared.report["contaminated"], prepared.report["contaminated_rows"]) == (1, ["a"])
    both = pairs_of(gemma, [pair("a", "Asked.", "1", "2"), pair("b", "Not asked.", "2", "3")], evaluation=("asked",))
    assert both.report["contaminated_rows"] == ["a"]


# --- what the report says ---------------------------------------------------------------------------------------------


def test_the_report_of_a_small_file(gemma: ChatFormat):
    records = [talk("a", "1" * 3, "1"), talk("b", "1" * 3, "1"), talk("c", "1" * 30, "1" * 20)]
    report = rows_of(gemma, records).report
    lengths = [AROUND + 4, AROUND + 4, AROUND + 50]
    assert (report["tokens"], report["trained_tokens"]) == (sum(lengths), 2 + 2 + 21)
    assert report["share_trained"] == pytest.approx(25 / sum(lengths))
    assert report["duplicates"] == 1
    assert report["length_quantiles"] == {"0.0": 21, "0.25": 21, "0.5": 21, "0.75": 67, "0.95": 67, "1.0": 67}
    assert [(b["from"], b["to"], b["rows"]) for b in report["length_histogram"]] == [
        (1, 16, 0),
        (17, 32, 2),
        (33, 64, 0),
        (65, 128, 1),
    ]
    assert [e["id"] for e in report["examples"]] == ["a", "b", "c"]
    assert report["examples"][0]["pieces"] == [
        {"text": "<bos><start_of_turn>user\n111<end_of_turn>\n<start_of_turn>model\n", "trained": False},
        {"text": "1<end_of_turn>", "trained": True},
    ]


def test_the_report_of_pairs(gemma: ChatFormat):
    report = pairs_of(gemma, [pair("a", "q", "yes", "no"), pair("b", "p", "12345", "1234567")]).report
    assert (report["mean_chosen_tokens"], report["mean_rejected_tokens"], report["chosen_longer"]) == (5.0, 5.5, 0.5)
    assert [p["label"] for p in report["examples"][0]["pieces"]] == ["prompt", "chosen", "rejected"]
    assert (report["ends_trained"], report["formats"], report["duplicates"]) == (1.0, ["messages"], 0)
