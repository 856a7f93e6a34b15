"""What the rest of the program knows of a kind of stage: a record that each file of `stages/` fills in.

`pipeline.py`, `plan.py`, `recipe.py`, `estimate.py`, `data/doctor.py` and the report work on these records alone. What loads
torch or reads data is named as "module:function" and imported when it is called, so that a recipe is checked in a second.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from posttrain.errors import RecipeError, nearest
from posttrain.stages.shared_settings import StageSettings

# What a stage leaves behind: something that answers, something that scores answers, or a data file.
Artifact = Literal["policy", "reward model", "rows"]
# What the rows of a data file hold.
Content = Literal["demonstrations", "preferences"]


class RewardFunction(NamedTuple):
    """A Python function `package.module:function` that a stage calls, and the seconds that a call may take."""

    name: str
    timeout: float


class Input(NamedTuple):
    """A setting that names data, with the contents that it may have."""

    field: str
    contents: tuple[Content, ...]


class Reads(NamedTuple):
    """Names of the earlier stages, and the functions, that a stage reads beside its data."""

    policies: tuple[str, ...] = ()
    reward_models: tuple[str, ...] = ()
    functions: tuple[RewardFunction, ...] = ()


class Earlier(NamedTuple):
    """What stands before a stage in its recipe. `place` begins its errors, `full` says that full weights are trained."""

    place: str
    full: bool
    policies: tuple[str, ...]
    reward_models: tuple[str, ...]
    rows: Mapping[str, Content]

    def check_policy(self, field: str, name: str, *words: str) -> None:
        """Raises RecipeError where `name` is neither an earlier policy nor one of `words`."""
        if name not in words and name not in self.policies:
            there = [*words, *self.policies]
            found = f'{field} = "{name}" is not an earlier policy stage'
            raise RecipeError(self.place, found, allowed=f"there is: {', '.join(there)}", do=nearest(name, there))


class Preparation(NamedTuple):
    """How data is rendered: the run's seed, the prompts of its evaluations, the tokens that the base can hold.

    `allow_dropped` replaces the stage's own limit on dropped rows.
    """

    seed: int
    evaluation_prompts: Collection[str]
    context: int
    allow_dropped: float | None = None


class Prepared(Protocol):
    """Data as a stage will use it, with a report about it."""

    @property
    def report(self) -> dict[str, Any]: ...


class Outcome(Protocol):
    """What the work of a stage returns: what its manifest says of it, and warnings."""

    @property
    def manifest(self) -> dict[str, Any]: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...


class Result(NamedTuple):
    """The outcome of a stage that does not train."""

    manifest: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Sizes(NamedTuple):
    """Operations that an estimate counts with: parameters of the body and of the head, and what a token and a target cost in
    training (forward and backward)."""

    body: int
    head: int
    token: int
    target: int
    full: bool


class Work(NamedTuple):
    """What one step will compute."""

    rows: int
    tokens: int
    targets: int
    operations: float


class Chart(NamedTuple):
    """Curves of the report: metrics by their whole name or by the part after the slash. `open` ones are seen without a tap."""

    title: str
    names: tuple[str, ...]
    open: bool = True


class Iterations(NamedTuple):
    """How metrics of single steps tell of iterations.

    A new iteration begins where one of `marks` changes. `once` are measured once an iteration. Names that begin with one of
    `parts` end in a name of the recipe's; they share the chart that `parts` names, and are measured once too.
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


class StageKind(NamedTuple):
    """One kind of stage.

    `run(context, stage) -> Outcome` does the work and `prepare(stage, chat, preparation) -> Prepared` renders the data; both
    are "module:function". Raise `code` when the code would make something else of the same input.
    """

    settings: type[StageSettings]
    makes: Artifact
    code: int
    inputs: tuple[Input, ...]
    prepare: str
    run: str
    reads: Callable[[Any], Reads]
    # Raises RecipeError for settings that contradict each other or what stands before.
    check: Callable[[Any, Earlier], object]
    # Work from the stage, the report of its prepared data, and the sizes of the base.
    estimate: Callable[[Any, dict[str, Any], Sizes], Work]
    # What the rows hold that it makes.
    content: Content | None = None
    # Warnings that the settings alone give.
    warnings: Callable[[Any], tuple[str, ...]] = _nothing
    charts: tuple[Chart, ...] = ()
    iterations: Iterations = Iterations()
    sections: tuple[Section, ...] = ()


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def training_work(stage: Any, report: dict[str, Any], sizes: Sizes) -> Work:
    """Passes over fixed rows, each target's loss computed by the head."""
    tokens, targets = round(report["tokens"] * stage.epochs), round(report["trained_tokens"] * stage.epochs)
    operations = float(tokens * sizes.token + targets * sizes.target)
    return Work(round(report["train_rows"] * stage.epochs), tokens, targets, operations)
