"""Chat templates in a box: Jinja that sees messages and two token strings, and can neither reach out nor run away.

Where it stands: `data/chat.py` renders every conversation through a `ChatTemplate`. A template comes with a model: it
is somebody else's code. What it can say, and how large its values get, are in
`data/sandbox.py` and `data/bounded.py`; here are

    source    at most MAX_TEMPLATE_CHARS
    time      RENDER_SECONDS and MESSAGE_SECONDS a message of this thread's processor time, in any thread, seen by a line
              tracer. Processor time and not the clock: a busy machine must not decide which rows are trained on

Left out: tools, images, and `strftime_now` (a prompt must not depend on the day).
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
# Reading the processor's clock costs more than a traced line, so it is read at every such event.
_EVENTS_PER_LOOK = 16
_NAME = "<chat template>"
_ENVIRONMENT = make_sandbox()
# Python refuses to install a trace function while another thread does, which takes longer where audit events are listened to.
_INSTALLING = threading.Lock()


class ChatTemplate:
    """A compiled template. Raises ModelError for a source that is no template or too long."""

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError("chat template", f"{len(source)} characters", allowed=f"at most {MAX_TEMPLATE_CHARS}")
        try:
            code = _ENVIRONMENT.compile(source, filename=_NAME)
            self._compiled = jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.globals)
        except Exception as error:  # noqa: BLE001 - Jinja and Python's compiler raise anything at odd sources
            raise ModelError("chat template", f"not a valid template: {_short(error)}", do="set [base] template") from None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool, bos: str, eos: str) -> str:
        """The text of messages. Raises DataError, in words, for whatever the template does wrong."""
        values = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "add_generation_prompt": generation_prompt, "bos_token": bos, "eos_token": eos,
        }  # fmt: skip
        seconds = RENDER_SECONDS + MESSAGE_SECONDS * len(messages)
        try:
            try:
                return self._in_time(values, seconds)
            except _OutOfTime:
                # A collection of garbage falls on whatever runs, and in a large process it may take that long by itself.
                return self._in_time(values, seconds)
        except (Exception, _OutOfTime) as error:  # noqa: BLE001 - a template can raise anything; none of it is ours
            raise DataError(
                "chat template",
                f"refuses the conversation: {_short(error)}",
                do="change the row or set [base] template",
            ) from None

    def _in_time(self, values: dict[str, Any], seconds: float) -> str:
        before = sys.gettrace()
        with _INSTALLING:
            sys.settrace(_Deadline(seconds))
        try:
            begin_render()
            # The compiled function itself, since `Template.generate` rewrites tracebacks by running made-up code.
            text = _ENVIRONMENT.concat(self._compiled.root_render_func(self._compiled.new_context(values)))
            text.encode()  # half of a character is no text
            return text
        finally:
            with _INSTALLING:
                sys.settrace(before)


class _OutOfTime(BaseException):
    """No `except Exception` inside Jinja may swallow the end of a template's time: tracing is off once it was raised."""


class _Deadline:
    """A trace function that ends a template's loop when its processor time is spent."""

    def __init__(self, seconds: float) -> None:
        self._end = time.thread_time() + seconds
        self._seconds = seconds
        self._events = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Callable[[FrameType, str, Any], Any] | None:
        self._events += 1
        if self._events % _EVENTS_PER_LOOK == 0 and time.thread_time() > self._end:
            raise _OutOfTime(f"took longer than {self._seconds:.1f} s")
        # Loops stand in the template and in the filters; lines elsewhere need no look.
        return self if frame.f_code.co_filename in _TRACED_FILES else None


_TRACED_FILES = frozenset({_NAME, jinja2.filters.__file__})


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removeprefix("TemplateError: ").removeprefix(
        "_OutOfTime: "
    )
