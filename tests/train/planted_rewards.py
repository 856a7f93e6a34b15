"""Reward functions of tests: some score, some break. They run in a process of their own, as a user's do."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence

# A completion that the breaking functions break at, and that no error may quote.
SECRET = "zz secret"


def share(completions: Sequence[str]) -> list[float]:
    """The share of characters that are letters from a to t: 7 % of what the tiny random model writes."""
    return [sum(c in "abcdefghijklmnopqrst" for c in text) / max(len(text), 1) for text in completions]


def proxy(prompts: list[str], completions: list[str]) -> list[float]:
    """Pays for more of it without end: the planted reward that can be exploited."""
    print("what a function prints is no message")
    return share(completions)


def enough(prompts: list[str], completions: list[str]) -> list[float]:
    """Grows with `proxy` to 0.2 and then stays: what a clean run ends on is a plateau."""
    return [1 - max(0.2 - s, 0) for s in share(completions)]


def no_more(prompts: list[str], completions: list[str]) -> list[float]:
    """Grows with `proxy` to 0.2 and then falls: what the planted reward does not see."""
    return [1 - abs(s - 0.2) for s in share(completions)]


def short(prompts: list[str], completions: list[str]) -> list[float]:
    """Minus the length, as whole numbers."""
    return [-len(text) for text in completions]


def asks(prompts: list[str], completions: list[str]) -> list[float]:
    """The length of the prompt: to see what a function is given."""
    return [float(len(text)) for text in prompts]


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    """Cannot bear an empty text, and quotes it."""
    for text in completions:
        if text == SECRET:
            raise ValueError(f"cannot score {text}")
    return [0.0] * len(completions)


def not_a_number(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("nan") if text == SECRET else 1.0 for text in completions]


def infinite(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("inf") if text == SECRET else 1.0 for text in completions]


def nothing(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if text == SECRET else 1.0 for text in completions]


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * (len(completions) - 1)


def one_number(prompts: list[str], completions: list[str]) -> float:
    return 1.0


def raises_late(prompts: list[str], completions: list[str]) -> Iterator[float]:
    """A generator: its code runs only while the scores are taken from it."""
    for text in completions:
        if text == SECRET:
            raise ValueError(f"cannot score {text}")
        yield 1.0


def endless(prompts: list[str], completions: list[str]) -> Iterator[float]:
    return itertools.repeat(1.0)


def too_large(prompts: list[str], completions: list[str]) -> list[int]:
    return [10**400 if text == SECRET else 1 for text in completions]


def unordered(prompts: list[str], completions: list[str]) -> set[float]:
    return {float(index) for index in range(len(completions))}


def reads_input(prompts: list[str], completions: list[str]) -> list[float]:
    """Would take a call for its own input, and wait for the next."""
    return [float(len(sys.stdin.read()))] * len(completions)


def by_position(texts: list[str], answers: list[str]) -> list[float]:
    return share(answers)


def hangs(prompts: list[str], completions: list[str]) -> list[float]:
    time.sleep(600)
    return [0.0] * len(completions)


def dies(prompts: list[str], completions: list[str]) -> list[float]:
    import os

    os._exit(7)


CALLS: list[int] = []


def third_time(prompts: list[str], completions: list[str]) -> list[float]:
    """Fails from its third call on; a new process counts anew."""
    CALLS.append(1)
    if len(CALLS) > 2:
        raise RuntimeError
    return share(completions)


NO_FUNCTION = 3


# --- lists that are changed, and shapes that are no row of scores -------------------------------------------------------


def empties(prompts: list[str], completions: list[str]) -> list[float]:
    """Right, but takes its completions away one by one."""
    found = []
    while completions:
        found.append(float(len(completions.pop(0))))
    return found


def appends(prompts: list[str], completions: list[str]) -> list[float]:
    completions.append("one more")
    return [1.0] * len(completions)


def leaves_one(prompts: list[str], completions: list[str]) -> list[float]:
    del completions[1:]
    return [5.0]


def empties_and_raises(prompts: list[str], completions: list[str]) -> list[float]:
    while completions:
        if completions.pop() == SECRET:
            raise ValueError
    return []


def nested(prompts: list[str], completions: list[str]) -> list[list[float]]:
    return [[1.0] for _ in completions]


def column(prompts: list[str], completions: list[str]) -> object:
    import numpy

    return numpy.ones((len(completions), 1))


def texts(prompts: list[str], completions: list[str]) -> list[str]:
    return ["1.0" for _ in completions]


def by_name(prompts: list[str], completions: list[str]) -> dict[str, float]:
    return dict.fromkeys(completions, 1.0)


class _Endless:
    def __iter__(self) -> Iterator[float]:
        return itertools.repeat(1.0)


def endless_rows(prompts: list[str], completions: list[str]) -> _Endless:
    return _Endless()


def of_libraries(prompts: list[str], completions: list[str]) -> list[object]:
    """A number of each kind that libraries have: numpy's, torch's, whole, true, a fraction."""
    from fractions import Fraction

    import numpy
    import torch

    kinds = [numpy.float32, numpy.array, torch.tensor, int, bool, Fraction, numpy.int64]
    return [kinds[k % len(kinds)](1) for k, _ in enumerate(completions)]


def array(prompts: list[str], completions: list[str]) -> object:
    import numpy

    return numpy.array([len(text) for text in completions], dtype=numpy.float32)
