"""The process in which a reward function runs: `python -m posttrain.train.reward_worker package.module:function`.

Where it stands: `functions.py` starts it, and kills it when a call takes too long. It speaks JSON, one line a message. The
function's own prints go to standard error, and its standard input is empty, so that neither stands between the messages.

    in   {"prompts": [...], "completions": [...]}
    out  {"ready": true}, then a call's {"scores": [...]}, or {"error": what, "index": the completion, or null}

What is said of an exception is its type and the line of the function's code, not its message: that may quote a completion.
"""

import contextlib
import importlib
import inspect
import itertools
import json
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Function = Callable[..., Any]
# Scores are float32 from here on.
LARGEST = 3e38


def main(reference: str) -> None:
    """Import, then answer calls until standard input ends."""
    out, asked = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    calls: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(asked, calls), daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        function = load(reference)
    except BaseException as error:  # noqa: BLE001 - what somebody's import raises is not ours to know
        say({"error": _import_words(reference, error), "index": None})
        return
    say({"ready": True})
    while True:
        call = json.loads(calls.get())
        say(answer(function, call["prompts"], call["completions"]))


def _listen(asked: TextIO, calls: "queue.Queue[str]") -> None:
    """Hand calls over; when there can be no more, the process ends, whatever the function is doing."""
    for line in asked:
        calls.put(line)
    os._exit(0)


def load(reference: str) -> Function:
    """The function that `package.module:function` names. Raises what its module raises; TypeError where it is no function, or
    none that can be called with `prompts` and `completions`."""
    module, _, name = reference.partition(":")
    found = vars(importlib.import_module(module)).get(name)
    if not callable(found):
        raise TypeError(f"no function {name} in {module}")
    with contextlib.suppress(ValueError):  # some of C's have no signature
        signature = inspect.signature(found)
        try:
            signature.bind(prompts=[], completions=[])
        except TypeError as error:
            raise TypeError(f"no function {name}(prompts, completions) in {module}: {error}") from None
    return found  # type: ignore[no-any-return]


def _import_words(reference: str, error: BaseException) -> str:
    module = reference.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}"
    if isinstance(error, TypeError) and str(error).startswith("no function "):
        return str(error)
    return f"importing it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def answer(function: Function, prompts: list[str], completions: list[str]) -> dict[str, Any]:
    """The function's scores, checked, or what is wrong with them and with which completion it began."""
    try:
        found = _called(function, prompts, completions)
    except Exception as error:  # noqa: BLE001 - somebody's function
        return {"error": f"raised {_place(error)}", "index": _first_that_raises(function, prompts, completions)}
    return check(found, len(completions))


def _called(function: Function, prompts: list[str], completions: list[str]) -> Any:
    """What a function returns; of a generator, whose code runs only now, no more than shows that it returns too many."""
    found = function(prompts=prompts, completions=completions)
    return list(itertools.islice(found, len(completions) + 1)) if isinstance(found, Iterator) else found


def check(found: Any, count: int) -> dict[str, Any]:
    """One finite number a completion, of whatever type; nothing else passes."""
    if isinstance(found, str | bytes | dict | set | frozenset):
        return {"error": f"returned a {type(found).__name__}", "index": None}
    try:
        values = list(found)
    except TypeError:
        return {"error": f"returned a {type(found).__name__}", "index": None}
    if len(values) != count:
        many = f"more than {count}" if len(values) > count else f"{len(values)}"
        return {"error": f"returned {many} scores for {count} completions", "index": min(len(values), count - 1)}
    scores = []
    for index, value in enumerate(values):
        number = math.nan
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            if not isinstance(value, str | bytes):
                number = float(value)
        if not abs(number) <= LARGEST:
            shown = f"{number}" if isinstance(value, float) else f"a {type(value).__name__} that is no finite number"
            return {"error": f"returned {shown}", "index": index}
        scores.append(number)
    return {"scores": scores}


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
