"""Questions of a local judge that share texts are computed together; the probabilities are those of each alone."""

import pytest

from posttrain.judge.local import _common, _sharing, _tokens, option_replies
from posttrain.judge.prompts import comparison
from posttrain.models.base_model import BaseModel


def test_probabilities_do_not_depend_on_what_is_shared(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.judge.local.MIN_MASS", 0.0)  # random weights answer nothing
    pairs = [("What is rain?", "Water.", "Sand that falls."), ("Say hello", "Hello to you", "Go")]
    questions = ["Which is true?", "Which is shorter and friendlier?", "Which is better?"]
    prompts = [comparison(q, *pair) for pair in pairs for q in questions]
    together = option_replies(base, "base", prompts, ("A", "B"))
    alone = [option_replies(base, "base", [prompt], ("A", "B"))[0] for prompt in prompts]
    assert [reply.probability for reply in together] == pytest.approx([reply.probability for reply in alone], abs=1e-5)


def test_neighbours_that_share_half_of_their_tokens_are_one_group() -> None:
    text, other = list(range(100)), list(range(500, 600))
    prompts = [[*text, 1, 2], [*text, 3], [*text, 4, 5, 6], [*other, 1], [*other, 2], [1, 2, 3]]
    groups = _sharing(prompts, 4096)
    assert groups == [[0, 1, 2], [3, 4], [5]]
    assert [_tokens([prompts[n] for n in group]) for group in groups] == [100 + 2 + 1 + 3, 100 + 2, 3]
    assert _sharing(prompts, 103) == [[0, 1], [2], [3, 4], [5]]


def test_each_question_keeps_a_token_of_its_own() -> None:
    assert _common([1, 2, 3], [1, 2, 3]) == 2
    assert _common([1, 2, 3], [1, 2]) == 1
    assert _common([7], [7]) == 0
