"""docs/models.md says of each kind what comes of it, and none of transformers' kinds is left out."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

from make_models import judge, judge_apart  # noqa: E402
from tiny_models import KINDS  # noqa: E402

# Right ones that add to head or attention, and a refused one of each sort.
SAMPLE = (
    "cohere",
    "granite",
    "phi",
    "nanochat",
    "minimax_m2",
    "diffllama",
    "lfm2",
    "stablelm",
    "bloom",
    "falcon",
    "openai-gpt",
)


def said() -> dict[str, str]:
    """The verdict on each kind."""
    rows = [
        line.split(" | ") for line in (DOCS / "models.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("| `"): row[2] for row in rows if row[0] != "| `model_type`"}


def test_every_kind_is_in_the_page_and_none_is_wrong() -> None:
    assert said().keys() == KINDS.keys()
    assert set(said().values()) == {"right", "refused", "not tried"}
    assert list(said().values()).count("right") > 80


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_kinds_is_what_the_page_says(kind: str, own_cache: None) -> None:
    assert judge(kind).word == said()[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_are_what_the_page_says(kind: str, own_cache: None) -> None:
    assert judge_apart(kind).word == said()[kind]
