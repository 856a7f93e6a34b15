"""The sandbox of chat templates: a restricted Jinja that checks every value before it is created.

Values are texts, numbers, booleans, None, lists, tuples, dicts, loops and namespaces. `data/template.py` limits the time of a
render. This module limits:

    reach     only the statements, filters, methods and globals listed below; other attributes and calls are refused. No
              bytes, no format strings, no loader
    size      `data/bounded.py` checks and counts every value before it is created
"""

import functools
import json
from collections.abc import Callable, Iterable
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import markupsafe

from posttrain.data import bounded

_STRING_METHODS = frozenset({
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
})  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    jinja2.runtime.LoopContext: frozenset({
        "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem",
        "revindex", "revindex0",
    }),
}  # fmt: skip
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "lower", "map", "max",
    "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "string", "trim", "truncate", "unique", "upper",
)  # fmt: skip
_LISTS = frozenset({"map", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"})
# Python's parameter names, mapped to those in `data/bounded.py`.
_PARAMETERS = {"sep": "separator"}
_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock,
    nodes.Assign, nodes.AssignBlock, nodes.With, nodes.Scope, nodes.ExprStmt, nodes.Break, nodes.Continue,
    nodes.Const, nodes.Name, nodes.NSRef, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr,
    nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare,
    nodes.Operand, nodes.BinExpr, nodes.UnaryExpr,
)  # fmt: skip

# --- Jinja ------------------------------------------------------------------------------------------------------------


class _CheckedCodeGenerator(jinja2.compiler.CodeGenerator):
    """Jinja's code generator, with texts, slices and containers created by the functions of `data/bounded.py`."""

    def visit_Concat(self, node: nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.checked(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.checked(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: jinja2.compiler.Frame) -> None:
        if node.ctx == "store":  # the names of `for a, b in …`
            super().visit_Tuple(node, frame)
            return
        self.write("environment.checked(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: jinja2.compiler.Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            self.write(", ")
            if part is None:
                self.write("None")
            else:
                self.visit(part, frame)
        self.write(")")

    def _output_child_pre(self, node: nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> None:
        self.write("environment.text(")

    def _output_child_post(self, node: nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> None:
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for other libraries. Here it has no effect on its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace with a fixed text, because it may contain itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A Jinja environment with only the features that chat templates use."""

    code_generator_class = _CheckedCodeGenerator
    concat = staticmethod(bounded.concat)
    checked = staticmethod(bounded.checked)
    sliced = staticmethod(bounded.sliced)
    text = staticmethod(bounded.text_of)
    intercepted_binops = frozenset({"*", "**", "+", "-", "/", "//", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, _STATEMENTS):
                kind = type(node).__name__
                raise jinja2.TemplateSyntaxError(f"{kind} is not allowed in a chat template", node.lineno)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, _Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, BuiltinMethodType | MethodType):
            return self.is_safe_attribute(obj.__self__, obj.__name__, obj)
        kinds = (jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.Undefined)
        return isinstance(obj, kinds) or obj in (_raise_exception, _Namespace, jinja2.sandbox.safe_range)

    def wrap_str_format(self, value: Any) -> None:
        """Disable Jinja's sandboxed `str.format`, which can still pad to any width."""

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:  # the signature of Jinja
        arguments = {name: value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")}
        bounded.limit_deep(args)  # a macro may keep its arguments
        bounded.limit_deep(arguments)
        if isinstance(function, BuiltinMethodType | MethodType) and isinstance(function.__self__, str):
            check = bounded.CHECKS.get(function.__name__)
            if check is not None:
                check(function.__self__, *args, **{_PARAMETERS.get(name, name): value for name, value in arguments.items()})
        return bounded.checked(super().call(context, function, *args, **named))


def _sized(function: Callable[..., Any], *, lists: bool = False) -> Callable[..., Any]:
    """A filter with a checked result. With `lists`, text arguments are limited, since the filter iterates over characters."""

    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        if lists:
            value = args[1] if isinstance(args[0], jinja2.Environment | jinja2.runtime.Context) else args[0]
            bounded.limit_items(len(value) if isinstance(value, str) else 0)
        return bounded.checked(function(*args, **named))

    return checked


# --- custom filters -----------------------------------------------------------------------------------------------------


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    bounded.check_replace(bounded.text_of(text), bounded.text_of(old), bounded.text_of(new), count)
    return bounded.text_of(text).replace(bounded.text_of(old), bounded.text_of(new), count)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = bounded.listed(values)
    if attribute is not None:
        items = [environment.getitem(v, attribute) for v in items]
    separator = bounded.text_of(d)
    return bounded.concat(part for position, item in enumerate(items) for part in ((separator, item) if position else (item,)))


def _trim(text: Any, chars: str | None = None) -> str:
    bounded.limit_compared(bounded.text_of(text), chars)
    return bounded.text_of(text).strip(chars)


def _title(text: Any) -> str:
    bounded.limit_items(len(bounded.text_of(text)))  # it is split into words
    return jinja2.filters.do_title(bounded.text_of(text))


def _escape(text: Any) -> str:
    return str(markupsafe.escape(bounded.text_of(text)))


def _number(kind: Callable[..., Any]) -> Callable[..., Any]:
    def converted(value: Any, *args: Any, **named: Any) -> Any:
        return kind(value[:1000] if isinstance(value, str) else value, *args, **named)

    return converted


def _indent(text: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise ValueError("indent is 0 to 64 characters")
    bounded.check_lines(bounded.text_of(text))
    bounded.limit(len(bounded.text_of(text)) + bounded.lines_in(bounded.text_of(text)) * width)
    return jinja2.filters.do_indent(bounded.text_of(text), width, first, blank)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError("indent is 0 to 16 characters")
    bounded.limit(_json_size(value, indent or 0))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _json_size(value: Any, indent: int) -> int:
    """The minimum number of characters of the JSON; a character may need up to six."""
    size, pending = 0, [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            size += len(item) + 2
        elif isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
            size += len(item) * (4 + indent * depth)
        elif isinstance(item, list | tuple):
            pending += [(part, depth + 1) for part in item]
            size += len(item) * (2 + indent * depth)
        bounded.limit(size)
    return size


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def make_sandbox() -> Sandbox:
    """The environment that compiles and runs templates."""
    # optimized=False: constants folded at compile time would bypass the checks.
    extensions = [jinja2.ext.loopcontrols, _Generation]
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, optimized=False, extensions=extensions)
    sandbox.binop_table |= {"*": bounded.multiply, "**": bounded.power, "+": bounded.add, "%": bounded.modulo}
    custom_filters: dict[str, Callable[..., Any]] = {
        "replace": _replace, "join": _join, "indent": _indent, "tojson": _to_json, "trim": _trim, "title": _title,
        "e": _escape, "escape": _escape, "safe": bounded.text_of, "string": bounded.text_of, "list": bounded.listed,
        "int": _number(jinja2.filters.do_int), "float": _number(jinja2.filters.do_float),
    }  # fmt: skip
    jinja_filters: Any = jinja2.filters.FILTERS
    sandbox.filters = {name: _sized(jinja_filters[name], lists=name in _LISTS) for name in _FILTERS}
    sandbox.filters |= {name: _sized(function) for name, function in custom_filters.items()}
    sandbox.globals = {"raise_exception": _raise_exception, "namespace": _Namespace, "range": jinja2.sandbox.safe_range}
    return sandbox
