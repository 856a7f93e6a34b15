"""Chat templates in a box: Jinja that sees messages and two token strings, and can neither reach out nor run away.

Where it stands: `data/chat.py` renders every conversation through a `ChatTemplate`. A template comes with a model: it
is somebody else's code. The box is Jinja's immutable sandbox made narrower:

    reach     a few string methods, filters and globals; no loader, no formatting mini-language
    size      no value larger than MAX_VALUE, checked before it is made, and no list that holds more than MAX_ITEMS with
              everything inside it: a list of itself twice, thirty times over, is a billion items to compare or print.
              The source at most MAX_TEMPLATE_CHARS
    time      RENDER_SECONDS and MESSAGE_SECONDS a message of this thread's processor time, in any thread, seen by a line
              tracer. Processor time and not the clock: a busy machine must not decide which rows are trained on

Left out: tools, images, and `strftime_now` (a prompt must not depend on the day).
"""

import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinMethodType, FrameType, MethodType
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from posttrain.errors import DataError, ModelError
from posttrain.records import Message

MAX_TEMPLATE_CHARS = 64 * 1024
# Largest text (characters), list (items, with all that is inside) or number (bits) that a template may make.
MAX_VALUE = 4 * 1024 * 1024
MAX_ITEMS = 100_000
MAX_NUMBER_BITS = 4096
RENDER_SECONDS = 0.1
MESSAGE_SECONDS = 0.0005
# Reading the processor's clock costs more than a traced line, so it is read at every such event.
_EVENTS_PER_LOOK = 16
_NAME = "<chat template>"
_STRING_METHODS = frozenset({
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
})  # fmt: skip
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "sort", "string", "title", "trim", "truncate", "unique", "upper",
)  # fmt: skip


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
        except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError, OverflowError, MemoryError) as error:
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
            # The compiled function itself, since `Template.generate` rewrites tracebacks by running made-up code.
            return _ENVIRONMENT.concat(self._compiled.root_render_func(self._compiled.new_context(values)))
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


# --- sizes ------------------------------------------------------------------------------------------------------------


def _limit(size: int) -> None:
    if size > MAX_VALUE:
        raise OverflowError(f"a value of more than {MAX_VALUE} characters or items")


def _checked(value: Any) -> Any:
    if isinstance(value, str):
        _limit(len(value))
    elif isinstance(value, list | tuple | dict):
        _limit_deep(value)
    elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise OverflowError("a number that is too large")
    return value


def _limit_deep(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> None:
    """A container costs what is inside it, each time it stands there: printing and comparing walk through all of it."""
    items, characters = 0, 0
    waiting: list[Any] = [value]
    while waiting:
        container = waiting.pop()
        items += len(container)
        if items > MAX_ITEMS:
            raise OverflowError(f"a list of more than {MAX_ITEMS} items")
        for item in (*container, *container.values()) if isinstance(container, dict) else container:
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, list | tuple | dict):
                waiting.append(item)
    _limit(characters)


def _concat(parts: Iterable[Any]) -> str:
    found: list[str] = []
    size = 0
    for part in parts:
        text = str(part)
        size += len(text)
        _limit(size)
        found.append(text)
    return "".join(found)


def _check_replace(text: str, old: str, new: str, *_: Any) -> None:
    _limit(len(text) + text.count(old) * len(new))


def _check_join(separator: str, parts: Sequence[Any]) -> None:
    _limit(len(parts) * (len(separator) + 1) + sum(len(p) for p in parts if isinstance(p, str)))


def _multiply(left: Any, right: Any) -> Any:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            _limit(len(sequence) * times)
    return _checked(left * right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_NUMBER_BITS:
        raise OverflowError("a number that is too large")
    return left**right


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        _limit(len(left) + len(right))
    return _checked(left + right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        raise TypeError("text cannot be formatted with %")
    return left % right


# --- the sandbox ------------------------------------------------------------------------------------------------------


class _Code(jinja2.compiler.CodeGenerator):
    """Jinja's code with a checked `~` and checked containers."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: jinja2.nodes.List, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.checked(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.checked(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: jinja2.compiler.Frame) -> None:
        if node.ctx == "store":  # the names of `for a, b in …`
            super().visit_Tuple(node, frame)
            return
        self.write("environment.checked(")
        super().visit_Tuple(node, frame)
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for other libraries; here the text inside is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_CHECKS: dict[str, Callable[..., None]] = {"replace": _check_replace, "join": _check_join}


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Only what chat templates use."""

    code_generator_class = _Code
    concat = staticmethod(_concat)
    checked = staticmethod(_checked)
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja offers a boxed `str.format`, which still pads to any width: here `format` is unsafe like the rest."""

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:  # Jinja's own signature
        _limit_deep(args)  # a macro may keep what it was given
        _limit_deep(named)
        if isinstance(function, BuiltinMethodType | MethodType) and isinstance(function.__self__, str):
            check = _CHECKS.get(function.__name__)
            if check is not None:
                args = tuple(list(a) if not isinstance(a, str | int) else a for a in args)
                check(function.__self__, *args)
        return _checked(super().call(context, function, *args, **named))


def _sized(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        return _checked(function(*args, **named))

    return checked


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    _check_replace(str(text), str(old), str(new))
    return str(text).replace(str(old), str(new), count)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = (environment.getitem(v, attribute) for v in values)
    parts: list[str] = []
    for value in values:
        parts += [str(d), str(value)] if parts else [str(value)]
    return _concat(parts)


def _indent(text: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise ValueError("indent is 0 to 64 characters")
    return jinja2.filters.do_indent(str(text), width, first, blank)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError("indent is 0 to 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> _Sandbox:
    # Nothing is folded at compile time: a constant would be computed without the checks.
    extensions = [jinja2.ext.loopcontrols, _Generation]
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, optimized=False, extensions=extensions)
    made.binop_table |= {"*": _multiply, "**": _power, "+": _add, "%": _modulo}
    own: dict[str, Callable[..., Any]] = {"replace": _replace, "join": _join, "indent": _indent, "tojson": _to_json}
    theirs: Any = jinja2.filters.FILTERS
    made.filters = {name: _sized(theirs[name]) for name in _FILTERS} | {n: _sized(f) for n, f in own.items()}
    made.globals = {
        "raise_exception": _raise_exception, "namespace": jinja2.utils.Namespace, "range": jinja2.sandbox.safe_range,
    }  # fmt: skip
    return made


_ENVIRONMENT = _environment()
