"""Random templates out of what has ever made something large, rendered in a process of their own.

    python fuzz_templates.py COUNT SEED

Prints how many were rendered, refused and not compiled, and by how many MiB the process grew at most. A template that
raises anything but the two errors of ours ends the process with a traceback.
"""
# ruff: noqa: E501 - a form of a template stays one line

import random
import resource
import sys
from collections import Counter

from posttrain.data.template import ChatTemplate
from posttrain.errors import DataError, ModelError
from posttrain.records import Message

NUMBERS = ("0", "1", "-1", "2", "7", "64", "999", "99999", "4000000", "10 ** 9", "4294967296", "1.5", "2 ** 4000", "1e308")
TEXTS = (
    "'a'",
    "'é'",
    "'漢'",
    "'\\n'",
    "'\\t'",
    "''",
    "' '",
    "'<a>'",
    "'{}'",
    "'%99999999d'",
    "bos_token",
    "messages[0].content",
    "'🙂'",
)
LISTS = ("[]", "[1]", "messages", "range(99999)", "['a', 'b']", "(1, 2)", "{'a': 1}", "messages[0]", "n", "n.x")
BINARY = ("+", "-", "*", "**", "%", "/", "//", "~", "and", "==", "<", "in", "is sameas", "if n else")
METHODS = (
    "ljust", "rjust", "center", "zfill", "expandtabs", "encode", "format", "format_map", "join", "replace", "split", "rsplit",
    "splitlines", "strip", "lstrip", "rfind", "rindex", "count", "title", "upper", "translate", "to_bytes", "from_bytes", "hex",
    "bit_length", "as_integer_ratio", "copy", "index", "get", "items", "keys", "fromkeys", "pop", "append", "extend", "update",
    "cycle", "changed", "__class__", "__mul__", "__format__", "__dict__", "partition", "casefold", "swapcase", "conjugate",
)  # fmt: skip
FILTERS = (
    "list", "join", "indent", "tojson", "map('upper')", "map('list')", "map('replace', 'a', n.x)", "sort", "unique", "reverse",
    "int", "int(0, 2)", "float", "string", "length", "first", "last", "max", "min", "title", "escape", "safe", "trim", "truncate",
    "items", "dictsort", "replace", "select", "map('string')", "upper", "abs", "default", "tojson(16)", "map('tojson')",
)  # fmt: skip
NO_FILTERS = (
    "batch",
    "slice",
    "center",
    "wordwrap",
    "format",
    "pprint",
    "xmlattr",
    "urlize",
    "round",
    "sum",
    "groupby",
    "attr('x')",
)


class Writer:
    """Random templates; the same seed writes the same ones."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def value(self, depth: int) -> str:
        """An expression."""
        pick = self.rng.choice
        if depth <= 0 or self.rng.random() < 0.2:
            return pick(pick((NUMBERS, TEXTS, LISTS, ("n.x", "n.y", "i", "m", "loop", "loop.index", "n"))))
        kind, one, two = self.rng.random(), self.value(depth - 1), self.value(depth - 2)
        if kind < 0.4:
            return f"({one} {pick(BINARY)} {two})"
        if kind < 0.6:
            return f"({one}).{pick(METHODS)}({', '.join(self.value(depth - 2) for _ in range(self.rng.randint(0, 2)))})"
        if kind < 0.85:
            name, given = pick(FILTERS if self.rng.random() < 0.98 else NO_FILTERS), self.rng.randint(0, 2)
            call = "" if "(" in name or not given else f"({', '.join(self.value(depth - 2) for _ in range(given))})"
            return f"({one} | {name}{call})"
        if kind < 0.93:
            return f"({one})[{two}:{self.value(0)}]"
        return pick(
            (
                f"[{one}, {two}]",
                f"({one}, {two})",
                "{" + f"{one}: {two}" + "}",
                f"namespace(x={one})",
                f"range({one})",
                f"f({one})",
            )
        )

    def statements(self, depth: int) -> str:
        """A few statements."""
        return "".join(self.statement(depth) for _ in range(self.rng.randint(1, 3)))

    def statement(self, depth: int) -> str:
        """One statement, with others inside of it."""
        kind, value = self.rng.random(), self.value(3)
        if depth <= 0 or kind < 0.25:
            return "{{ " + value + " }}"
        if kind < 0.55:
            return "{% set n." + self.rng.choice("xy") + " = " + value + " %}"
        inside = self.statements(depth - 1)
        if kind < 0.8:
            return (
                "{% for i in "
                + self.rng.choice(("range(30)", "range(99999)", "messages", value))
                + " %}"
                + inside
                + "{% endfor %}"
            )
        forms = (
            "{% set v %}" + inside + "{% endset %}{% set n.x = v %}",
            "{% filter "
            + self.rng.choice(("upper", "indent(64)", "escape", "replace('a', 'aa')"))
            + " %}"
            + inside
            + "{% endfilter %}",
            "{% if " + value + " %}" + inside + "{% endif %}",
            "{% call f(" + value + ") %}" + inside + "{% endcall %}",
            "{% macro f(a) %}" + inside + "{{ a }}{% endmacro %}{{ f(n.x) }}",
        )
        return self.rng.choice(forms)

    def template(self) -> str:
        """A template. Often a text or a list doubles first."""
        start = (
            "{% macro f(a) %}{{ a }}{{ caller() if caller }}{% endmacro %}{% set n = namespace(x="
            + self.rng.choice(TEXTS)
            + ", y=[1]) %}"
        )
        doubles = self.rng.choice((" n.x ~ n.x", "n.x + n.x", "n.x * 9", "[n.x, n.x]", "n.x", "n.x | string"))
        grows = "{% for i in range(" + str(self.rng.randint(1, 30)) + ") %}{% set n.x = " + doubles + " %}{% endfor %}"
        return start + grows + self.statements(3)


def main(count: int, seed: int) -> None:
    """Render so many templates."""
    writer, outcomes = Writer(seed), Counter[str]()
    talk = [Message("system", "Be brief."), Message("user", "Hello " * 50), Message("assistant", "Hi")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        source = writer.template()
        try:
            template = ChatTemplate(source)
        except ModelError:
            outcomes["not compiled"] += 1
            continue
        try:
            template.render(talk, generation_prompt=True, bos="<bos>", eos="<eos>")
            outcomes["rendered"] += 1
        except DataError as error:
            outcomes["out of memory" if "MemoryError" in str(error) else "refused"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(*(outcomes[name] for name in ("rendered", "refused", "not compiled", "out of memory")), grown)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
