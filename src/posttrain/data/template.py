"""Rendering of chat templates in a sandbox with time limits. A template sees only messages and two token strings.

`data/chat.py` renders every conversation with a `ChatTemplate`. A template is untrusted code that comes with a model.
`data/sandbox.py` limits its language and `data/bounded.py` the size of its values. This module limits:

    source    at most MAX_TEMPLATE_CHARS
    time      RENDER_SECONDS plus MESSAGE_SECONDS per message of the thread's processor time, measured by a line tracer.
              Wall-clock time would make the trained rows depend on the load of the machine

Not supported: tools, images, and `strftime_now` (a prompt must not depend on the date).
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import jinja2
import jinja2.filters

from posttrain.data.bounded import begin_render
from posttrain.data.sandbox import make_sandbox
from posttrain.errors import DataError, ModelError
from posttrain.records import Message

MAX_TEMPLATE_CHARS = 64 * 1024
RENDER_SECONDS = 0.1
MESSAGE_SECONDS = 0.0005
# Reading the processor time costs more than a traced line, so it is read once per this many events.
_EVENTS_PER_CHECK = 16
_NAME = "<chat template>"
_ENVIRONMENT = make_sandbox()
# Python cannot install trace functions in two threads at once; audit hooks make the installation slower.
_INSTALLING = threading.Lock()


class ChatTemplate:
    """A compiled template. Raises ModelError for an invalid or too long source."""

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError("chat template", f"{len(source)} characters", allowed=f"at most {MAX_TEMPLATE_CHARS}")
        try:
            code = _ENVIRONMENT.compile(source, filename=_NAME)
            self._compiled = jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.globals)
        except Exception as error:  # noqa: BLE001 - Jinja and Python's compiler raise many types of errors
            raise ModelError("chat template", f"not a valid template: {_short(error)}", do="set [base] template") from None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool, bos: str, eos: str) -> str:
        """Render messages. Raises DataError for any error of the template."""
        values = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "add_generation_prompt": generation_prompt, "bos_token": bos, "eos_token": eos,
        }  # fmt: skip
        seconds = RENDER_SECONDS + MESSAGE_SECONDS * len(messages)
        try:
            try:
                return self._render_in_time(values, seconds)
            except _OutOfTime:
                # Retry: in a large process a garbage collection alone can take this long.
                return self._render_in_time(values, seconds)
        except (Exception, _OutOfTime) as error:  # noqa: BLE001 - a template can raise any error
            raise DataError(
                "chat template",
                f"refuses the conversation: {_short(error)}",
                do="change the row or set [base] template",
            ) from None

    def _render_in_time(self, values: dict[str, Any], seconds: float) -> str:
        previous_trace = sys.gettrace()
        with _INSTALLING:
            sys.settrace(_Deadline(seconds))
        try:
            begin_render()
            # Call the compiled function directly, since `Template.generate` rewrites tracebacks by running generated code.
            text = _ENVIRONMENT.concat(self._compiled.root_render_func(self._compiled.new_context(values)))
            text.encode()  # raises for a lone surrogate
            return text
        finally:
            with _INSTALLING:
                sys.settrace(previous_trace)


class _OutOfTime(BaseException):
    """The time limit. A BaseException, so that no `except Exception` in Jinja catches it; tracing stops after it is raised."""


class _Deadline:
    """A trace function that raises _OutOfTime after the processor time is used up."""

    def __init__(self, seconds: float) -> None:
        self._end = time.thread_time() + seconds
        self._seconds = seconds
        self._events = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Callable[[FrameType, str, Any], Any] | None:
        # Only the template and the filters contain loops, so other files are not traced. Finalizers that a garbage collection
        # runs arrive here too: an exception in one of them would be lost.
        if frame.f_code.co_filename not in _TRACED_FILES:
            return None
        self._events += 1
        if self._events % _EVENTS_PER_CHECK == 0 and time.thread_time() > self._end:
            raise _OutOfTime(f"took longer than {self._seconds:.1f} s")
        return self


_TRACED_FILES = frozenset({_NAME, jinja2.filters.__file__})


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removeprefix("TemplateError: ").removeprefix(
        "_OutOfTime: "
    )
