"""The command `posttrain audit`. Heavy imports happen inside its functions."""

import argparse
import json
from pathlib import Path

from posttrain.terminal import show_text

EXAMPLE = "posttrain audit runs/constitution red-3/r1"
ABOUT = "why a row was trained, and what each principle did"


def add_options(verb: argparse.ArgumentParser) -> None:
    """Options of `posttrain audit`."""
    verb.add_argument("run", type=Path, help="a run folder")
    verb.add_argument("row", nargs="?", help="the id of a row or of a prompt; without it, the figures of all stages")
    verb.add_argument("--stage", metavar="NAME", help="only rows that this stage made or read")
    verb.add_argument("--json", action="store_true", help="print JSON")


def audit(options: argparse.Namespace) -> int:
    """Print where a row comes from, or the figures of the stages that make rows. Raises ArtifactError for an unknown row."""
    from posttrain.artifacts import read_recipe
    from posttrain.constitution.trail import open_trail, summary, trace
    from posttrain.constitution.trail_text import summary_text, trace_text

    recipe, _ = read_recipe(options.run)
    trail = open_trail(options.run, recipe, stage=options.stage)
    if options.row is None:
        data = summary(trail)
        text = "" if options.json else summary_text(data)
    else:
        data = trace(trail, options.row, stage=options.stage)
        text = "" if options.json else trace_text(data)
    show_text(json.dumps(data, indent=2, ensure_ascii=False) if options.json else text)
    return 0
