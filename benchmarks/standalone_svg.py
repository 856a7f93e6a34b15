"""An inline chart of the report as an SVG file: in light mode, with its own colours and fonts."""

import re

from markupsafe import Markup

# The light colours of report/style.css.
_LIGHT = {
    "ink": "#1a1d21", "soft": "#5a626c", "line": "#dddfe2", "better": "#00735a", "c0": "#6b7280", "c1": "#0072b2",
    "c2": "#d55e00", "c3": "#009e73", "c4": "#b0528c", "c5": "#b07d00", "c6": "#2b9fd8", "c7": "#7a5195",
    "font": "Helvetica, Arial, sans-serif",
}  # fmt: skip


def standalone_svg(chart: Markup) -> str:
    """The text of the SVG file."""
    text = str(chart)
    for name, value in _LIGHT.items():
        text = text.replace(f"var(--{name})", value)
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', text)[0]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" height="{height}" '
    )
    text = text.replace("<svg ", head, 1)
    start = text.index(">") + 1
    style = "<style>.hover circle { fill: transparent }</style>"
    return f'{text[:start]}{style}<rect width="100%" height="100%" fill="#ffffff"/>{text[start:]}\n'
