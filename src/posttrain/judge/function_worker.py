"""The process in which a reward function runs: `python -m posttrain.judge.function_worker package.module:function`.

`functions.py` starts it. `function_guard.py` ends it and all processes that the function started. Messages are lines of JSON.
The function's own prints go to standard error, and its standard input is empty, so that neither mixes with the messages. Every
answer repeats the number and the length of its call, so that it is not taken for the answer to another call.

    in   {"call": number, "prompts": [...], "completions": [...]}
    out  {"ready": true, "source": hash}, then of a call {"call": number, "count": completions} and
         "scores": [...], or "error": what, "index": the completion, or null

Of an exception the answer has the type and the line of the function's code, not the message: it may quote a completion.
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

from posttrain.judge.function_guard import start_guarded
from posttrain.judge.function_source import import_source, read_source
from posttrain.judge.functions import PIPES_GONE
from posttrain.streams import keep_writing

Function = Callable[..., Any]
# Scores become float32.
LARGEST = 3e38
# Characters of an error: names of types and functions may be long.
ERROR_CHARACTERS = 400


class _Pipes:
    """The two pipes to the run. A function may fork, close descriptors or replace them; none of that may become an answer."""

    def __init__(self) -> None:
        self.calls, self.answers = os.dup(0), os.dup(1)
        self.process = os.getpid()
        self.identities = self._identities()
        self.pending = b""

    def _identities(self) -> list[tuple[int, int]]:
        return [(status.st_dev, status.st_ino) for status in map(os.fstat, (self.calls, self.answers))]

    def _check(self) -> None:
        """End this process where it is a fork that the function made, or where its pipes are gone."""
        if os.getpid() != self.process:
            os._exit(0)
        try:
            same = self._identities() == self.identities
        except OSError:
            same = False
        if not same:
            os._exit(PIPES_GONE)

    def receive(self) -> dict[str, Any]:
        """The next call. Ends the process where the run has closed the pipe."""
        self._check()
        while b"\n" not in self.pending:
            read = os.read(self.calls, 1 << 20)
            if not read:
                os._exit(0)
            self.pending += read
        line, _, self.pending = self.pending.partition(b"\n")
        call: dict[str, Any] = json.loads(line)
        return call

    def send(self, message: dict[str, Any]) -> None:
        """Write a message."""
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
    except BaseException as error:  # noqa: BLE001 - an import of the user's may raise anything
        pipes.send({"error": _import_error(reference, error), "index": None})
        return
    pipes.send({"ready": True, "source": source.hash()})
    while True:
        call = pipes.receive()
        prompts, completions = call["prompts"], call["completions"]
        pipes.send({"call": call["call"], "count": len(completions), **answer(function, prompts, completions)})


def load(reference: str, module: Any) -> Function:
    """The function of a module that `package.module:function` names.

    Raises TypeError where it is not a function that can be called with `prompts` and `completions`.
    """
    where, _, name = reference.partition(":")
    function = vars(module).get(name)
    if not callable(function):
        raise TypeError(f"no function {name} in {where}")
    with contextlib.suppress(ValueError):  # some functions in C have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(prompts=[], completions=[])
        except TypeError as error:
            raise TypeError(f"no function {name}(prompts, completions) in {where}: {error}") from None
    return function  # type: ignore[no-any-return]


def _import_error(reference: str, error: BaseException) -> str:
    module = reference.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}"
    if isinstance(error, TypeError) and str(error).startswith("no function "):
        return str(error)
    return f"importing it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def answer(function: Function, prompts: list[str], completions: list[str]) -> dict[str, Any]:
    """The function's scores, checked, or what is wrong with them and the first completion that it concerns.

    The function gets copies, so that changing its arguments has no effect here.
    """
    try:
        result = _call(function, prompts, completions)
    except Exception as error:  # noqa: BLE001 - a function of the user's may raise anything
        return {
            "error": f"raised {_place(error)}"[:ERROR_CHARACTERS],
            "index": _first_that_raises(function, prompts, completions),
        }
    return check(result, len(completions))


def _call(function: Function, prompts: list[str], completions: list[str]) -> Any:
    """The result of a function as a list, or unchanged where it is not a sequence of scores.

    An iterator may be endless, so at most one item more than there are completions is taken.
    """
    result = function(prompts=list(prompts), completions=list(completions))
    if isinstance(result, str | bytes | bytearray | dict | set | frozenset):
        return result
    try:
        scores = iter(result)
    except TypeError:
        return result
    return list(itertools.islice(scores, len(completions) + 1))


def check(result: Any, count: int) -> dict[str, Any]:
    """The scores where the result is one finite number a completion, of any numeric type; else an error."""
    if not isinstance(result, list):
        return {"error": f"returned a {type(result).__name__}"[:ERROR_CHARACTERS], "index": None}
    if len(result) != count:
        many = f"more than {count}" if len(result) > count else f"{len(result)}"
        return {"error": f"returned {many} scores for {count} completions", "index": min(len(result), count - 1)}
    scores = []
    for index, value in enumerate(result):
        number = _number(value)
        if not abs(number) <= LARGEST:
            shown = f"{value}" if isinstance(value, float) else f"a {type(value).__name__} that is no finite number"
            return {"error": f"returned {shown}"[:ERROR_CHARACTERS], "index": index}
        scores.append(number)
    return {"scores": scores}


def _number(value: Any) -> float:
    """A score as a float, NaN where it is not a number. Texts, lists and arrays are not, even those of a single number."""
    try:
        iter(value)
    except TypeError:
        with contextlib.suppress(Exception):  # a type of the user's may raise anything
            return float(value)
    return math.nan


def _first_that_raises(function: Function, prompts: list[str], completions: list[str]) -> int | None:
    """The first completion that raises when it is scored alone; None where none does."""
    for index in range(len(completions)):
        try:
            _call(function, prompts[index : index + 1], completions[index : index + 1])
        except Exception:  # noqa: BLE001 - a function of the user's may raise anything
            return index
    return None


def _place(error: Exception) -> str:
    """The type of an exception and the innermost line that is not in an installed package."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "site-packages" not in f.filename
    ]
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


if __name__ == "__main__":
    main(sys.argv[1])
