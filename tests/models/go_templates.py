"""What Ollama makes of a Modelfile, as far as ours go: its instructions, and Go templates of a few constructs."""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from posttrain.records import Message

_ACTION = re.compile(r"\{\{ (.*?) \}\}")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Instructions and their values. A value in three quotes or in one goes on until they close, over lines too."""
    found = []
    pattern = r'(?:^#[^\n]*\n)|(?:^([A-Z]+(?: [a-z_]+)?) (?:"""(.*?)"""|"([^"\n]*)"|([^\s"]+))\n)'
    position = 0
    while position < len(text):
        match = re.compile(pattern, re.DOTALL | re.MULTILINE).match(text, position)
        assert match, f"not an instruction: {text[position : position + 80]!r}"
        if match[1]:
            found.append((match[1], next(group for group in match.groups()[1:] if group is not None)))
        position = match.end()
    return found


class Node(NamedTuple):
    """An action with what stands inside of it: of an `if` also its branches, each with its condition."""

    action: str
    branches: list[tuple[str, list["Node | str"]]]


def render(template: str, messages: Sequence[Message]) -> str:
    """The template with `.Messages`: text, range, if, else if, else, eq, printf, variables, fields and quoted texts."""
    nodes, end = _parse(iter(_ACTION.split(template)), text=True)
    assert end == "", f"{end} without a beginning"
    variables: dict[str, str] = {}
    return "".join(_run(nodes, list(messages), None, variables))


def _parse(parts: Iterator[str], *, text: bool) -> tuple[list["Node | str"], str]:
    """Nodes up to an `else` or `end`, and which it was."""
    nodes: list[Node | str] = []
    for part in parts:
        if text:
            nodes.append(part)
        elif part == "end" or part.split()[0] == "else":
            return nodes, part
        elif part.split()[0] in ("if", "range"):
            branches, condition = [], part
            while condition != "end":
                inside, following = _parse(parts, text=True)
                branches.append((condition, inside))
                condition = following
            nodes.append(Node(part, branches))
        else:
            nodes.append(Node(part, []))
        text = not text
    return nodes, ""


def _run(nodes: list["Node | str"], messages: list[Message], dot: Message | None, variables: dict[str, str]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif node.action == "range .Messages":
            for message in messages:
                yield from _run(node.branches[0][1], messages, message, variables)
        elif node.branches:
            for condition, inside in node.branches:
                test = condition.removeprefix("else").strip().removeprefix("if").strip()
                if not test or _value(test, dot, variables):
                    yield from _run(inside, messages, dot, variables)
                    break
        elif (assigned := re.fullmatch(r"(\$\w+) (:?=) (.*)", node.action)) is not None:
            assert (assigned[1] in variables) == (assigned[2] == "="), f"{node.action}: declared once, before it is set"
            variables[assigned[1]] = _value(assigned[3], dot, variables)
        else:
            yield _value(node.action, dot, variables)


def _value(expression: str, dot: Message | None, variables: dict[str, str]) -> str:
    if expression.startswith("eq "):
        _, left, right = re.fullmatch(r"(eq) (\S+) (\S+)", expression).groups()  # type: ignore[union-attr]
        return "true" if _value(left, dot, variables) == _value(right, dot, variables) else ""
    if expression.startswith("printf "):
        form, *given = shlex.split(expression)[1:]
        return form.replace("\\n", "\n") % tuple(_value(one, dot, variables) for one in given)
    if expression.startswith('"'):
        return expression[1:-1]
    if expression.startswith("$"):
        return variables[expression]
    assert dot is not None
    return {".Role": dot.role, ".Content": dot.content}[expression]
