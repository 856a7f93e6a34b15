"""The settings that all runs share: typed, frozen, documented.

`recipe.py` reads TOML into these tables. `stages/` has the settings of each kind of stage. `docs/configuration.md` is generated
from the text under each field.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

# Limits of every number in a recipe; a setting may have narrower limits. Integers fit 32 bits, other numbers fit float32.
SMALLEST, LARGEST_WHOLE, LARGEST = 1e-12, 2**31, 1e37

# The prefix of data that an earlier stage makes.
ROWS_OF = "stage:"
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class Settings(BaseModel):
    """A table of a recipe: unknown settings are errors, types are strict, numbers have a usual size."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    # Settings of this class that change where, when or whether the work is done, but not its result.
    no_effect: ClassVar[frozenset[str]] = frozenset()

    def effective(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON data, without those that are not set."""
        ignored = frozenset().union(*(vars(table).get("no_effect", ()) for table in type(self).__mro__))
        written = self.model_dump(mode="json", exclude=set(ignored), exclude_none=True)
        tables = {name: value for name in written if isinstance(value := getattr(self, name), Settings)}
        return written | {name: table.effective() for name, table in tables.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _of_a_usual_size(cls, value: Any) -> Any:
        """Limit numbers so that their products and quotients stay finite. Replace −0.0 by 0.0."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        largest = LARGEST_WHOLE if isinstance(value, int) else LARGEST
        if abs(value) > largest or 0 < abs(value) < SMALLEST:
            raise PydanticCustomError("size", f"0, or {SMALLEST:g} to {largest:g} in size")
        return 0.0 if isinstance(value, float) and value == 0 else value


class Base(Settings):
    """The pretrained model that everything starts from."""

    model: str
    """A hub id, a folder, a `.gguf` file, `package:gemma3-270m`, `package:smollm2-135m-instruct` or `random:tiny`."""
    template: Literal["auto", "gemma", "chatml", "llama3", "plain"] = "auto"
    """Chat template: `auto` (the model's own), `gemma`, `chatml`, `llama3` or `plain`."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the frozen weights; `auto` is bfloat16 if the processor multiplies it natively, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a CUDA device if there is one."""
    recompute: bool = False
    """Whether training stores only the input of each layer and computes the rest again in the backward pass. This takes less
    memory and one more forward pass a step. No result depends on it, so it may be changed between a stop and a resume."""


class Adapter(Settings):
    """What is trained on top of the frozen base."""

    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank matrices; `full` trains and stores every weight."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank R of the low-rank matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the low-rank product is multiplied by alpha / R."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training; ppo stages train without dropout."""
    targets: Literal["all", "attention", "mlp"] | tuple[str, ...] = "all"
    """Linear layers that get an adapter: `all`, `attention`, `mlp`, or a list of layer names such as `q_proj`."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard` scales by alpha / R, `rslora` by alpha / sqrt(R) (Kalajdzievski 2023)."""
    train_tokens: tuple[str, ...] = ()
    """Tokens whose embedding rows are trained with the adapter, for template tokens that the base never saw."""


class Source(Settings):
    """One of several data files that are mixed."""

    path: str
    """A file (.jsonl .json .parquet .csv), a `save_to_disk` folder, a hub dataset id, `starter/<file>`, or `stage:<name>`: the
    rows that an earlier stage made."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share of this source's rows that is used: 0.5 takes half of them, 2 takes each row twice."""
    # The file with the rows of `stage:<name>`. Not a setting, because a fingerprint must not depend on the path of the run.
    _file: Path | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def stage(self) -> str | None:
        """The stage that makes these rows, or None if they come from a file or a hub."""
        return self.path.removeprefix(ROWS_OF) if self.path.startswith(ROWS_OF) else None

    @property
    def file(self) -> Path | None:
        """The file that `stage:<name>` refers to, once the run folder is known."""
        return self._file

    def at(self, file: Path) -> Self:
        """This source with the file that it refers to."""
        located = self.model_copy()
        located._file = file
        return located


Data = str | tuple[Source, ...]


def as_sources(data: Data) -> tuple[Source, ...]:
    """The recipe's `data` as a list of sources."""
    return (Source(path=data),) if isinstance(data, str) else data


class Evaluation(Settings):
    """How the base and every policy are measured."""

    suites: tuple[str, ...] = ("starter",)
    """Names of built-in suites, or paths of suite files (TOML)."""
    limit: Annotated[int, Field(ge=0)] = 0
    """The number of items of each task that are used, from the first; 0 uses all."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    """Longest answer in tokens; an answer of this length without an end token counts as not stopping."""
    sample_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    """Longest answer to a sample prompt in tokens."""
    samples: tuple[str, ...] = ()
    """Prompts that every policy answers side by side in the report; an empty list takes the six of the starter suite."""
