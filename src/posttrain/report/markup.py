"""HTML and SVG elements. Every plain `str` is escaped, so data cannot become markup.

Every section builds its part with `el`; `render.py` assembles the page. Model output, data, recipe text and names are plain
`str`.
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
    """Concatenate pieces. Each is escaped unless it is markup."""
    return Markup("").join(c if isinstance(c, Markup) else escape(_control_free(c)) for c in children)


def section(anchor: str, title: str, *children: Content, lead: Content = "") -> Markup:
    """A section of the page with its heading and an optional introduction."""
    head = [el("h2", title), el("p.lead", lead)] if lead else [el("h2", title)]
    return el("section", *head, *children, attrs={"id": anchor})


def details(summary: Content, *children: Content) -> Markup:
    """A collapsed block."""
    return el("details", el("summary", summary), el("div.inside", *children))


def facts(rows: Iterable[tuple[Content, Content]]) -> Markup:
    """A list of names and values."""
    return el("dl.facts", *(el("div", el("dt", name), el("dd", value)) for name, value in rows))


def scroll(*children: Content, label: str) -> Markup:
    """A box that scrolls horizontally, so that the page does not."""
    return el("div.scroll", *children, attrs={"tabindex": "0", "role": "region", "aria-label": label})


def _control_free(text: str) -> str:
    """Replace the characters that HTML does not allow with the replacement character."""
    if text.isprintable():
        return text
    return "".join(
        "�" if (ord(c) < 32 and c not in "\t\n\r") or 0xD800 <= ord(c) <= 0xDFFF or ord(c) == 127 else c for c in text
    )
