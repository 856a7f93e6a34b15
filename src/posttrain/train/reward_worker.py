"""The process in which a reward function runs: `python -m posttrain.train.reward_worker package.module:function`.

Where it stands: `functions.py` starts it; `reward_guard.py` ends it and whatever the function started. It speaks JSON, one line
a message. The function's own prints go to standard error, and its standard input is empty, so that neither stands between the
messages. Every answer repeats the number and the length of its call, so that none is taken for another call's.

    in   {"call": number, "prompts": [...], "completions": [...]}
    out  {"ready": true, "source": hash}, then of a call {"call": number, "count": completions} and
         "scores": [...], or "error": what, "index": the completion, or null

What is said of an exception is its type and the line of the function's code, not its message: that may quote a completion.
"""

import contextlib
import inspect
import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from posttrain.streams import keep_writing
from posttrain.train.function_source import import_source, read_source
from posttrain.train.functions import PIPES_GONE
from posttrain.train.reward_guard import start_guarded

Function = Callable[..., Any]
# Scores are float32 from here on.
LARGEST = 3e38
# Characters of what is said of a mistake: names of types and functions may be long.
SAID = 400


class _Pipes:
    """The two pipes to the run. A function may fork, close descriptors or put other files in their place; none of that may
    become an answer.
    """

    def __init__(self) -> None:
        self.calls, self.answers = os.dup(0), os.dup(1)
        self.process = os.getpid()
        self.identities = self._identities()
        self.pending = b""

    def _identities(self) -> list[tuple[int, int]]:
        return [(found.st_dev, found.st_ino) for found in map(os.fstat, (self.calls, self.answers))]

    def _check(self) -> None:
        """End a process that the function forked and that came back here, and one whose pipes are gone."""
        if os.getpid() != self.process:
            os._exit(0)
        try:
            same = self._identities() == self.identities
        except OSError:
            same = False
        if not same:
            os._exit(PIPES_GONE)

    def receive(self) -> dict[str, Any]:
        """The next call. Ends the process where there can be no more."""
        self._check()
        while b"\n" not in self.pending:
            read = os.read(self.calls, 1 << 20)
            if not read:
                os._exit(0)
            self.pending += read
        line, _, self.pending = self.pending.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def say(self, message: dict[str, Any]) -> None:
        self._check()
        left = json.dumps(message).encode() + b"\n"
        while left:
            left = left[os.write(self.answers, left) :]


def main(reference: str) -> None:
    """Import, then answer calls until the run ends."""
    start_guarded(0)
    pipes = _Pipes()
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    keep_writing()
    try:
        source = read_source(reference)
        function = load(reference, import_source(reference, source))
    except BaseException as error:  # noqa: BLE001 - what somebody's import raises is not ours to know
        pipes.say({"error": _import_words(reference, error), "index": None})
        return
    pipes.say({"ready": True, "source": source.hash()})
    while True:
        call = pipes.receive()
        prompts, completions = call["prompts"], call["completions"]
        pipes.say({"call": call["call"], "count": len(completions), **answer(function, prompts, completions)})


def load(reference: str, module: Any) -> Function:
    """The function of a module that `package.module:function` names. Raises TypeError where it is no function, or none that can
    be called with `prompts` and `completions`.
    """
    where, _, name = reference.partition(":")
    found = vars(module).get(name)
    if not callable(found):
        raise TypeError(f"no function {name} in {where}")
    with contextlib.suppress(ValueError):  # some of C's have no signature
        signature = inspect.signature(found)
        try:
            signature.bind(prompts=[], completions=[])
        except TypeError as error:
            raise TypeError(f"no function {name}(prompts, completions) in {where}: {error}") from None
    return found  # type: ignore[no-any-return]


def _import_words(reference: str, error: BaseException) -> str:
    module = reference.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}"
    if isinstance(error, TypeError) and str(error).startswith("no function "):
        return str(error)
    return f"importing it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def answer(function: Function, prompts: list[str], completions: list[str]) -> dict[str, Any]:
    """The function's scores, checked, or what is wrong with them and with which completion it began.

    The function gets copies: what it does to its lists changes neither the count nor what is asked again.
    """
    try:
        found = _called(function, prompts, completions)
    except Exception as error:  # noqa: BLE001 - somebody's function
        return {"error": f"raised {_place(error)}"[:SAID], "index": _first_that_raises(function, prompts, completions)}
    return check(found, len(completions))


def _called(function: Function, prompts: list[str], completions: list[str]) -> Any:
    """What a function returns, as a list; of a generator, whose code runs only now, or of what never ends, no more than shows
    that there are too many. What is no row of scores comes through as it is.
    """
    found = function(prompts=list(prompts), completions=list(completions))
    if isinstance(found, str | bytes | bytearray | dict | set | frozenset):
        return found
    try:
        scores = iter(found)
    except TypeError:
        return found
    return list(itertools.islice(scores, len(completions) + 1))


def check(found: Any, count: int) -> dict[str, Any]:
    """One finite number a completion, of whatever type; nothing else passes."""
    if not isinstance(found, list):
        return {"error": f"returned a {type(found).__name__}"[:SAID], "index": None}
    if len(found) != count:
        many = f"more than {count}" if len(found) > count else f"{len(found)}"
        return {"error": f"returned {many} scores for {count} completions", "index": min(len(found), count - 1)}
    scores = []
    for index, value in enumerate(found):
        number = _number(value)
        if not abs(number) <= LARGEST:
            shown = f"{value}" if isinstance(value, float) else f"a {type(value).__name__} that is no finite number"
            return {"error": f"returned {shown}"[:SAID], "index": index}
        scores.append(number)
    return {"scores": scores}


def _number(value: Any) -> float:
    """A score as a float, nan where it is none: neither a text nor a list or array is, not even one of a single number."""
    try:
        iter(value)
    except TypeError:
        with contextlib.suppress(Exception):  # what somebody's type raises is not ours to know
            return float(value)
    return math.nan


def _first_that_raises(function: Function, prompts: list[str], completions: list[str]) -> int | None:
    """The first completion that raises by itself; None where none does."""
    for index in range(len(completions)):
        try:
            _called(function, prompts[index : index + 1], completions[index : index + 1])
        except Exception:  # noqa: BLE001 - somebody's function
            return index
    return None


def _place(error: Exception) -> str:
    """Type of an exception and the line of the innermost code that is not of a library."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "site-packages" not in f.filename]
    where = f" at {os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{where}"


if __name__ == "__main__":
    main(sys.argv[1])
