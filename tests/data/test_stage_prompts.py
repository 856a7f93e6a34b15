"""Prompts to be answered: one that cannot be rendered is dropped and counted, as a row of an sft stage is."""

import json
from pathlib import Path

import pytest

from posttrain.data.chat import ChatFormat
from posttrain.data.prompts import prepare_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("refused, warned", [(1, False), (40, True)])
def test_a_prompt_that_the_template_refuses_is_dropped_and_counted(tmp_path: Path, make_tokenizer, refused: int, warned: bool):
    rows = [{"prompt": f"Name thing {i}.", "completion": "Yes."} for i in range(299)]
    rows += [{"prompt": SYSTEM, "completion": "Yes."}] * refused
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepared = prepare_prompts(
        str(tmp_path / "d.jsonl"), ChatFormat(make_tokenizer(TEMPLATE)), seed=0, max_prompt_tokens=256, evaluation_prompts=()
    )
    report = prepared.report
    assert (len(prepared.train), report["mixed_rows"]) == (299, 299 + refused)
    assert report["dropped"] == {"chat template refuses the conversation: no system role": refused}
    assert report["dropped_rows"][0]["row"] == "d-300"
    assert bool(report["warnings"]) is warned


def test_rows_that_give_no_prompt_are_named_by_their_reason(tmp_path: Path, gemma: ChatFormat):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": ""},
        {"prompt": "d", "completion": "e", "tools": ["x"]},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = prepare_prompts(str(tmp_path / "d.jsonl"), gemma, seed=0, max_prompt_tokens=256, evaluation_prompts=()).report
    assert report["dropped"] == {
        "empty text": 1, "tools: not supported, and without it the row means something else": 1,
    }  # fmt: skip
    assert report["warnings"] == ["1 of 3 rows are dropped because of unsupported fields (1 with tools)"]


def test_prompts_that_are_left_out_are_named(tmp_path: Path, gemma: ChatFormat):
    rows = [
        {"id": "kept", "prompt": "Name a colour."},
        {"id": "again", "prompt": "Name a colour."},
        {"id": "long", "prompt": "word " * 300},
        {"id": "known", "prompt": "What is rain?"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = prepare_prompts(
        str(tmp_path / "d.jsonl"), gemma, seed=0, max_prompt_tokens=64, evaluation_prompts=("What is rain?",)
    ).report
    assert (report["contaminated"], report["contaminated_rows"]) == (1, ["known"])
    assert (report["duplicates"], report["duplicate_rows"]) == (1, ["again"])
    assert report["dropped"] == {"longer than max_prompt_tokens = 64": 1}
    assert [(row["row"], row["reason"]) for row in report["dropped_rows"]] == [("long", "longer than max_prompt_tokens = 64")]
