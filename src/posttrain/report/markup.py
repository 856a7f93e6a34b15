"""HTML and SVG elements as values: whatever is not markup already is escaped, so data can never become markup.

Where it stands: every section builds its part with `el`; `render.py` puts the parts into the page. Model output, data,
recipe text and names come in as plain `str` and leave escaped.
"""

from collections.abc import Iterable, Mapping

from markupsafe import Markup, escape

Content = str | Markup


def el(tag: str, *children: Content, attrs: Mapping[str, object] | None = None) -> Markup:
    """An element. `tag` may carry classes: `el("td.value.wide", "3")`. Children and attribute values are escaped."""
    name, *classes = tag.split(".")
    values = {"class": " ".join(classes)} if classes else {}
    written = "".join(f' {key}="{escape(_control_free(str(value)))}"' for key, value in {**values, **(attrs or {})}.items())
    return Markup(f"<{name}{written}>") + join(children) + Markup(f"</{name}>")


def join(children: Iterable[Content]) -> Markup:
    """Pieces end to end, each escaped unless it is markup."""
    return Markup("").join(c if isinstance(c, Markup) else escape(_control_free(c)) for c in children)


def section(anchor: str, title: str, *children: Content, lead: Content = "") -> Markup:
    """A section of the page with its heading and an optional line that says how to read it."""
    head = [el("h2", title), el("p.lead", lead)] if lead else [el("h2", title)]
    return el("section", *head, *children, attrs={"id": anchor})


def details(summary: Content, *children: Content) -> Markup:
    """Something that is opened by a tap."""
    return el("details", el("summary", summary), el("div.inside", *children))


def facts(rows: Iterable[tuple[Content, Content]]) -> Markup:
    """Names and values below each other."""
    return el("dl.facts", *(el("div", el("dt", name), el("dd", value)) for name, value in rows))


def scroll(*children: Content, label: str) -> Markup:
    """A box that scrolls sideways on its own, so that the page never does."""
    return el("div.scroll", *children, attrs={"tabindex": "0", "role": "region", "aria-label": label})


def _control_free(text: str) -> str:
    """Characters that HTML does not allow, shown as the replacement character."""
    if text.isprintable():
        return text
    return "".join(
        "�" if (ord(c) < 32 and c not in "\t\n\r") or 0xD800 <= ord(c) <= 0xDFFF or ord(c) == 127 else c for c in text
    )
