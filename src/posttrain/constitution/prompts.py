"""The exact conversations made from a principle. `posttrain constitution check` prints them; tests compare their wording.

    detection    does the answer have the fault that the critique request describes? Yes or No
    critique     what is wrong with the answer, or NOTHING_FOUND
    revision     the same conversation, then the request for a better answer
    contrast     the principles as a system message, for answers that follow them

`judge/prompts.py` has the prompt that compares two answers.

Small models confuse critique and revision, so worked examples in the same form come first. Prompts and answers are enclosed in
marks that they cannot contain, and the request follows them, so that instructions in an answer have less effect.
"""

import re
from collections.abc import Sequence

from posttrain.constitution.principles import Example, Principle
from posttrain.judge.prompts import marked
from posttrain.records import Message

NOTHING_FOUND = "Nothing to change."
_NOTHING = re.compile(
    r"\W*(?:no\W+)?(?:there (?:is|was) )?nothing (?:here )?to (?:be )?(?:changed?|point(?:ed)? out)(?! the)", re.IGNORECASE
)
# More worked examples than any principle has.
ALL = 2**31
_SYSTEM = "You check answers by one rule at a time and improve them."


def finds_nothing(critique_text: str) -> bool:
    """Whether a critique begins by saying that nothing is to be changed, as asked or in a longer sentence."""
    return _NOTHING.match(critique_text) is not None


def detection(principle: Principle, prompt: str, answer: str, *, examples: int = ALL) -> list[Message]:
    """Ask whether the answer has the fault, after so many worked examples. The reply starts with Yes or No."""
    shots = [
        turn
        for example in principle.example[:examples]
        for turn in (
            _detection_request(principle, example.prompt, example.answer),
            Message("assistant", "No" if example.revision is None else "Yes"),
        )
    ]
    return [Message("system", _SYSTEM), *shots, _detection_request(principle, prompt, answer)]


def critique(principle: Principle, prompt: str, answer: str, *, examples: int = ALL) -> list[Message]:
    """Ask what is wrong with an answer, after so many worked examples. The reply is NOTHING_FOUND if nothing is."""
    shots = [turn for example in principle.example[:examples] for turn in _example(principle, example, revise=False)]
    return [Message("system", _SYSTEM), *shots, _critique_request(principle, prompt, answer)]


def revision(principle: Principle, prompt: str, answer: str, critique_text: str, *, examples: int = ALL) -> list[Message]:
    """Ask for a better answer after a critique."""
    assert principle.revision is not None
    worked = [example for example in principle.example if example.revision is not None][:examples]
    shots = [turn for example in worked for turn in _example(principle, example, revise=True)]
    turns = [_critique_request(principle, prompt, answer), Message("assistant", critique_text), _revision_request(principle)]
    return [Message("system", _SYSTEM), *shots, *turns]


def contrast(principles: Sequence[Principle], prompt: Sequence[Message]) -> list[Message]:
    """A conversation whose system message states the principles; a system message of the prompt comes before them."""
    rules = "\n".join(f"- {principle.title}." for principle in principles)
    prompt_system = "".join(f"{m.content}\n\n" for m in prompt if m.role == "system")
    rest = [m for m in prompt if m.role != "system"]
    return [Message("system", f"{prompt_system}Follow these rules in your answer, without mentioning them:\n{rules}"), *rest]


def _pair(prompt: str, answer: str) -> str:
    return f"{marked('question', prompt)}\n\n{marked('answer', answer)}"


def _critique_request(principle: Principle, prompt: str, answer: str) -> Message:
    assert principle.critique is not None
    return Message(
        "user", f"{_pair(prompt, answer)}\n\n{principle.critique}\nIf there is nothing to point out, reply: {NOTHING_FOUND}"
    )


def _detection_request(principle: Principle, prompt: str, answer: str) -> Message:
    assert principle.critique is not None
    request = f"{_pair(prompt, answer)}\n\n{principle.critique}\nIs there anything to point out? Reply with Yes or No."
    return Message("user", request)


def _revision_request(principle: Principle) -> Message:
    return Message("user", f"{principle.revision}\nReply with the new answer alone.")


def _example(principle: Principle, example: Example, *, revise: bool) -> list[Message]:
    turns = [_critique_request(principle, example.prompt, example.answer), Message("assistant", example.critique)]
    if revise and example.revision is not None:
        turns += [_revision_request(principle), Message("assistant", example.revision)]
    return turns
