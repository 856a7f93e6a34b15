"""The report: one HTML file without scripts. It works offline, on a phone and in dark mode.

`pipeline.py` calls `write_report` at the end of a run; `posttrain report` calls it again. A section is a function from the run
to markup, listed in SECTIONS; an empty result omits the section. The page's policy allows no script and no request. The output
is deterministic.
"""

from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from posttrain import __version__
from posttrain.artifacts import write_bytes
from posttrain.report.data import data
from posttrain.report.headline import headline
from posttrain.report.markup import el, join
from posttrain.report.picture import picture
from posttrain.report.provenance import provenance
from posttrain.report.run import RunRecord, load_run
from posttrain.report.samples import samples
from posttrain.report.scores import scorecard, tax
from posttrain.report.training import training
from posttrain.stages import KINDS
from posttrain.stages.kind import load_function

SECTIONS: tuple[tuple[str, str, Callable[[RunRecord], Markup]], ...] = (
    ("pipeline", "Pipeline", picture),
    ("scorecard", "Scorecard", scorecard),
    ("tax", "Tax and gain", tax),
    *((s.anchor, s.title, load_function(s.render)) for kind in KINDS.values() for s in kind.sections),
    ("samples", "Answers", samples),
    ("training", "Training", training),
    ("data", "Data", data),
    ("provenance", "Provenance", provenance),
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = Path(__file__).with_name("style.css")
_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
{head}
{nav}
<main>
{body}
</main>
<footer>{foot}</footer>
</body>
</html>
""")


def write_report(run: Path) -> Path:
    """Write report.html into a run folder, from its artifacts only.

    Raises ArtifactError if the folder is not a run, nothing was evaluated yet, or a file is missing or damaged.
    """
    path = run / "report.html"
    write_bytes(path, render(load_run(run)).encode(errors="replace"))
    return path


def render(run: RunRecord) -> str:
    """The page as HTML."""
    parts = [(anchor, title, part) for anchor, title, make in SECTIONS if (part := make(run))]
    links = [el("a", title, attrs={"href": f"#{anchor}"}) for anchor, title, _ in parts]
    return _PAGE.format(
        policy=POLICY, title=f"{run.name} · posttrain report", style=Markup(_STYLE.read_text(encoding="utf-8").strip()),
        head=headline(run), nav=el("nav", *links, attrs={"aria-label": "sections"}),
        body=join([part for _, _, part in parts]), foot=f"posttrain {__version__}",
    )  # fmt: skip
