"""The interface of a kind of stage: a record that each file of `stages/` fills in.

`pipeline.py`, `plan.py`, `recipe.py`, `estimate.py`, `data/doctor.py` and the report use only these records. Functions that
load torch or read data are written as "module:function" and imported when they are called, so that a recipe is checked in a
second.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from posttrain.errors import RecipeError, nearest
from posttrain.stages.shared_settings import StageSettings

# The artifact of a stage: a model that answers, a model that scores answers, or a data file.
Artifact = Literal["policy", "reward model", "rows"]
# The content of the rows of a data file.
Content = Literal["demonstrations", "preferences", "prompts"]
# The contents of data from which prompts are read.
PROMPTS: tuple[Content, ...] = ("prompts", "demonstrations", "preferences")


class RewardFunction(NamedTuple):
    """A Python function `package.module:function` that a stage calls, and the seconds that a call may take."""

    name: str
    timeout: float


class Input(NamedTuple):
    """A setting that names data, with the contents that the data may have."""

    field: str
    contents: tuple[Content, ...]


class Reads(NamedTuple):
    """Names of the earlier stages, and the functions, that a stage reads in addition to its data."""

    policies: tuple[str, ...] = ()
    reward_models: tuple[str, ...] = ()
    functions: tuple[RewardFunction, ...] = ()


class Earlier(NamedTuple):
    """The earlier stages of a recipe. `place` begins the errors of the stage; `full` means that full weights are trained."""

    place: str
    full: bool
    policies: tuple[str, ...]
    reward_models: tuple[str, ...]
    rows: Mapping[str, Content]

    def check_policy(self, field: str, name: str, *words: str) -> None:
        """Raises RecipeError if `name` is neither an earlier policy nor one of `words`."""
        if name not in words and name not in self.policies:
            there = [*words, *self.policies]
            found = f'{field} = "{name}" is not an earlier policy stage'
            raise RecipeError(self.place, found, allowed=f"there is: {', '.join(there)}", do=nearest(name, there))


class Preparation(NamedTuple):
    """How data is rendered: the run's seed, the prompts of its evaluations, and the context of the base in tokens.

    `allow_dropped` replaces the stage's own limit on dropped rows.
    """

    seed: int
    evaluation_prompts: Collection[str]
    context: int
    allow_dropped: float | None = None


class Prepared(Protocol):
    """Data as a stage will use it, with a report on it."""

    @property
    def report(self) -> dict[str, Any]: ...


class Outcome(Protocol):
    """The result of a stage: fields of its manifest, and warnings."""

    @property
    def manifest(self) -> dict[str, Any]: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...


class Result(NamedTuple):
    """The outcome of a stage that does not train."""

    manifest: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Sizes(NamedTuple):
    """Figures for an estimate: parameters of the body and of the head, and the operations of a token and of a target in
    training (forward and backward)."""

    body: int
    head: int
    token: int
    target: int
    full: bool


class Work(NamedTuple):
    """The computation of one step."""

    rows: int
    tokens: int
    targets: int
    operations: float


class Chart(NamedTuple):
    """A chart of the report: metrics by their full name or the part after the slash. `open` charts are expanded at first."""

    title: str
    names: tuple[str, ...]
    open: bool = True


class Iterations(NamedTuple):
    """How the metrics of steps are grouped into iterations.

    A new iteration begins at a step where one of `marks` changes. Metrics in `once` are measured once an iteration. Metrics
    whose names begin with a key of `parts` end in a name from the recipe. They share the chart in `parts` and are measured once
    too.
    """

    marks: tuple[str, ...] = ()
    once: frozenset[str] = frozenset()
    parts: Mapping[str, str] = {}


class Section(NamedTuple):
    """A section of the report: its anchor, its title, and the function from a loaded run to markup."""

    anchor: str
    title: str
    render: str


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _accepted(*_: Any) -> str:
    return ""


class StageKind(NamedTuple):
    """One kind of stage.

    `run(context, stage) -> Outcome` does the work and `prepare(stage, chat, preparation) -> Prepared` renders the data. Both
    are written as "module:function". Increase `code` when the code gives another result for the same input.
    """

    settings: type[StageSettings]
    makes: Artifact
    code: int
    inputs: tuple[Input, ...]
    prepare: str
    run: str
    reads: Callable[[Any], Reads]
    # The work, from the stage, the report on its prepared data, and the sizes of the base.
    estimate: Callable[[Any, dict[str, Any], Sizes], Work]
    # "module:function" of what else the stage reads: from a stage to fingerprints by name. Raises RecipeError.
    documents: str | None = None
    # Raises RecipeError for settings that contradict each other or the earlier stages.
    check: Callable[[Any, Earlier], object] = _nothing
    # Why a finished artifact with this manifest may not be used with these settings, or "".
    refuses: Callable[[Any, Mapping[str, Any]], str] = _accepted
    # The content of the rows that it makes.
    content: Content | None = None
    # Warnings about the settings alone.
    warnings: Callable[[Any], tuple[str, ...]] = _nothing
    charts: tuple[Chart, ...] = ()
    iterations: Iterations = Iterations()
    sections: tuple[Section, ...] = ()


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def training_work(stage: Any, report: dict[str, Any], sizes: Sizes) -> Work:
    """The work of passes over fixed rows. The head computes the loss of each target."""
    tokens, targets = round(report["tokens"] * stage.epochs), round(report["trained_tokens"] * stage.epochs)
    operations = float(tokens * sizes.token + targets * sizes.target)
    return Work(round(report["train_rows"] * stage.epochs), tokens, targets, operations)
