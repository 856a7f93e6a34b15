"""Constitutions: files of principles, each with up to three requests to a model.

    critique     asks for a fault in an answer                    (stage `critique`)
    revision     asks for a better answer                         (stage `critique`)
    comparison   asks which of two answers is better              (stage `label`, judges)

Each request is optional. A stage that needs a request raises an error that names the principles without it. The format follows
Bai et al. 2022, arXiv 2212.08073, sections 3 and 4. Not included: principles that depend on each other.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from posttrain.artifacts import fingerprint
from posttrain.errors import RecipeError, nearest
from posttrain.file_types import invalid_setting
from posttrain.reading import Unreadable, decode_text, parse_toml

BUILT_IN = {path.stem: path for path in sorted((Path(__file__).parents[1] / "constitutions").glob("*.toml"))}
MAX_BYTES = 2**20
_Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]


class _ConstitutionTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Example(_ConstitutionTable):
    """A worked example of a critique and, if the critique finds a fault, of a revision."""

    prompt: _Text
    answer: _Text
    critique: _Text
    revision: _Text | None = None


class Principle(_ConstitutionTable):
    """A principle and its requests. `weight` is its relative frequency in sampling and in votes."""

    id: _Id
    title: _Text
    critique: _Text | None = None
    revision: _Text | None = None
    comparison: _Text | None = None
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    tags: tuple[_Id, ...] = ()
    example: tuple[Example, ...] = ()


class Constitution(_ConstitutionTable):
    """A named, versioned list of principles."""

    name: _Id
    version: _Text
    principle: tuple[Principle, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of all texts, weights and tags."""
        return fingerprint(self.model_dump(mode="json"))

    @property
    def identity(self) -> dict[str, str]:
        """Name, version and fingerprint, for manifests."""
        return {"name": self.name, "version": self.version, "fingerprint": self.fingerprint}

    def without(self, names: Sequence[str], where: str) -> "Constitution":
        """The constitution without the principles that have one of these ids or tags.

        Raises RecipeError for a name that no principle has, and if no principle is left.
        """
        known = [p.id for p in self.principle] + sorted({tag for p in self.principle for tag in p.tags})
        for name in names:
            if name not in known:
                found, there = f'leave_out = "{name}" is neither an id nor a tag', f"there is: {', '.join(known)}"
                raise RecipeError(where, found, allowed=there, do=nearest(name, known))
        left = tuple(p for p in self.principle if not {p.id, *p.tags} & set(names))
        if not left:
            raise RecipeError(where, "leave_out removes every principle", do="keep at least one")
        return self.model_copy(update={"principle": left})

    def having(self, request: str, where: str) -> tuple[Principle, ...]:
        """All principles, after checking that each has `request`: "critique", "revision" or "comparison".

        Raises RecipeError if a principle lacks it.
        """
        lacking = [p.id for p in self.principle if p.model_dump()[request] is None]
        if lacking:
            raise RecipeError(
                where, f'principle "{lacking[0]}" has no {request}{_more(lacking)}',
                allowed=f"a {request} for each of {len(self.principle)} principles", do="add it, or remove the principle",
            )  # fmt: skip
        return self.principle


def load_constitution(name: str) -> Constitution:
    """Load a built-in constitution by name, or a file (.toml).

    Raises RecipeError for an unknown name, a missing file or an invalid file.
    """
    path = BUILT_IN.get(name, Path(name))
    where = f"constitution {path.name}"
    if not path.is_file():
        raise RecipeError(
            f'constitution "{name}"', "there is no such file", allowed=f"there is: {', '.join(BUILT_IN)}",
            do="or name a constitution file (.toml)",
        )  # fmt: skip
    raw = _read(path, where)
    try:
        constitution = Constitution.model_validate(_tuples(raw))
    except ValidationError as error:
        raise _invalid_constitution(error, raw, where) from None
    if not constitution.principle:
        raise RecipeError(where, "no principle", do="add a [[principle]] table")
    duplicates = [name for name, count in Counter(p.id for p in constitution.principle).items() if count > 1]
    if duplicates:
        raise RecipeError(where, f'a second principle with id "{duplicates[0]}"', do="give each a different id")
    return constitution


def fingerprints_of(stage: Any) -> dict[str, str]:
    """The fingerprint of a stage's constitution. Raises RecipeError as `load_constitution` does."""
    return {f"constitution {stage.constitution}": load_constitution(stage.constitution).fingerprint}


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        if len(data) > MAX_BYTES:
            raise RecipeError(where, f"{len(data)} bytes", allowed=f"at most {MAX_BYTES}")
        return parse_toml(decode_text(data))
    except OSError as error:
        raise RecipeError(where, f"cannot be read ({error.strerror or error})", do="name a readable file") from None
    except Unreadable as bad:
        raise RecipeError(where, bad.found[:200], do=bad.do) from None


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _invalid_constitution(error: ValidationError, raw: dict[str, Any], where: str) -> RecipeError:
    """The first validation error as a RecipeError that names the table."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    table: type[_ConstitutionTable] = Constitution
    where_table = where
    if len(loc) > 1 and loc[0] == "principle" and isinstance(loc[1], int):
        value = raw["principle"][loc[1]]
        where_table = f"{where} · principle {value.get('id', loc[1] + 1) if isinstance(value, dict) else loc[1] + 1}"
        table = Principle
        if len(loc) > 3 and loc[2] == "example" and isinstance(loc[3], int):
            where_table, table = f"{where_table} · example {loc[3] + 1}", Example
    return invalid_setting(first, where_table, table.model_fields)


# --- warnings ---------------------------------------------------------------------------------------------------------

# Pairs of opposite words. Two principles that share most of their other words and differ in one of these pairs give a warning.
# This heuristic finds neither paraphrases nor conflicts that occur only for some prompts.
_OPPOSITES = tuple(
    frozenset(pair.split("/"))
    for pair in (
        "always/never", "more/less", "more/fewer", "longer/shorter", "long/short", "refuse/answer", "refuses/answers",
        "refuse/help", "formal/informal", "polite/blunt", "polite/rude", "simple/technical", "many/few",
        "include/exclude", "add/remove",
        "with/without", "detailed/brief", "friendlier/stricter", "cautious/bold", "certain/uncertain",
    )
)  # fmt: skip
_SMALL_WORDS = frozenset(
    """a an and any are as at be by does for from has have in into is it its of on or out that the their them they this to was
    which who with would answer answers person people point rewrite so where""".split()  # noqa: SIM905 - readable as text
)
_DUPLICATE, _OPPOSED = 0.8, 0.5


def warnings(constitution: Constitution) -> list[str]:
    """Warnings about principles that are nearly equal or seem to contradict each other."""
    conflicts = []
    for a, b in combinations(constitution.principle, 2):
        for request in ("critique", "revision", "comparison"):
            texts = a.model_dump()[request], b.model_dump()[request]
            if None in texts:
                continue
            problem = _relation(_words(texts[0]), _words(texts[1]))
            if problem:
                conflicts.append(f"{a.id} and {b.id}: their {request} requests {problem}")
                break
    return conflicts


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower()))


def _relation(a: frozenset[str], b: frozenset[str]) -> str:
    opposed = sorted("/".join(sorted(pair)) for pair in _OPPOSITES if _divides(pair, a, b))
    negated = bool({"not", "never", "no"} & a) != bool({"not", "never", "no"} & b)
    rest = [words - _SMALL_WORDS - {"not", "never", "no"} - frozenset().union(*_OPPOSITES) for words in (a, b)]
    shared = _overlap(*rest)
    if opposed and shared >= _OPPOSED:
        return f"seem to ask for opposite things ({opposed[0]})"
    if negated and shared >= _DUPLICATE:
        return "seem to ask for opposite things (one says not)"
    return "are nearly the same" if _overlap(a - _SMALL_WORDS, b - _SMALL_WORDS) >= _DUPLICATE else ""


def _divides(pair: frozenset[str], a: frozenset[str], b: frozenset[str]) -> bool:
    """Whether each text has exactly one word of the pair, and a different one."""
    return len(pair & a) == len(pair & b) == 1 and pair & a != pair & b


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard's index; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
