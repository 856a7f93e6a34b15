"""The Python interface: run a recipe, open a run, generate text with its policies, compare them.

It calls the same functions as the commands, so numbers and files are the same. Heavy imports are lazy: `import posttrain` does
not import torch, and reading scores does not load a model.

    import posttrain

    run = posttrain.run("recipes/quickstart.toml")
    run.scores["dpo"]["harmful_refused"].value
    run.generate(["What is the capital of Peru?"], policy="dpo")[0].text
    run.compare("sft", "dpo").verdict

Serving, judging and planning are available only as commands.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.artifacts import EVALUATIONS, read_manifest
from posttrain.errors import ArtifactError, RecipeError
from posttrain.evaluate.table import format_table
from posttrain.pipeline import run_folder, run_recipe
from posttrain.recipe import Recipe, load_recipe, parse_recipe, to_toml
from posttrain.records import ROLES, Message, Rollout
from posttrain.report.compare import compare as compare_stages
from posttrain.report.run import read_scorecard
from posttrain.stages import makes

if TYPE_CHECKING:
    from posttrain.models.target import Target

Conversation = str | Sequence[Mapping[str, str]]


class Estimate(NamedTuple):
    """A mean over `n` items with its 95 % interval, in the unit of its measure (share, nats, tokens)."""

    value: float
    low: float
    high: float
    n: int
    unit: str


class Change(NamedTuple):
    """The paired change of one measure from policy `a` to policy `b` over `n` shared items, with its 95 % interval.

    `verdict` is "better", "worse" or "not shown", in the direction of the measure.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str
    verdict: str


class Comparison(NamedTuple):
    """The comparison of two policies on their common items. `verdict`: "B dominates A", "A dominates B", "trade-off" or "not
    shown to differ"; `text` is what `posttrain compare` prints."""

    verdict: str
    changes: dict[str, Change]
    text: str


class Stage(NamedTuple):
    """One stage of a run. `manifest` is None until the stage is finished."""

    name: str
    kind: str
    init: str
    folder: Path
    manifest: dict[str, Any] | None


class Run:
    """A run folder. Files are read on access; the first `generate` loads the base model."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self._target: Target | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {', '.join(s.name for s in self.stages if s.manifest is not None) or 'no stage'})"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of the recipe, in order."""
        return tuple(
            Stage(s.name, s.kind, s.init, self.folder / s.name, read_manifest(self.folder / s.name)) for s in self.recipe.stage
        )

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies: the base and every finished stage that makes one."""
        return ("base", *(s.name for s in self.stages if s.manifest is not None and makes(s.kind) == "policy"))

    @property
    def report(self) -> Path:
        """The path of report.html."""
        return self.folder / "report.html"

    @property
    def scorecard(self) -> dict[str, Any]:
        """The content of scorecard.json. Raises ArtifactError if no evaluation is finished."""
        return read_scorecard(self.folder)

    @property
    def scores(self) -> dict[str, dict[str, Estimate]]:
        """Policy -> measure -> estimate. Raises ArtifactError if no evaluation is finished."""
        return {
            stage["name"]: {
                name: Estimate(m["value"], m["low"], m["high"], m["n"], m["unit"]) for name, m in stage["measures"].items()
            }
            for stage in self.scorecard["stages"]
        }

    def table(self, width: int = 120) -> str:
        """The scorecard as text of at most `width` columns, as `posttrain run` prints it."""
        return format_table(self.scorecard, width=width)

    def compare(self, a: str, b: str) -> Comparison:
        """Policy `b` against policy `a` on the same items. Raises ArtifactError if one was not evaluated."""
        evaluated = [name for name in self.policies if read_manifest(self.folder / EVALUATIONS / name) is not None]
        for name in (a, b):
            if name not in evaluated:
                raise ArtifactError(f'compare "{name}"', "not evaluated", allowed=f"there is: {', '.join(evaluated)}")
        comparison, text = compare_stages(self.folder / a, self.folder / b)
        changes = {
            name: Change(
                row["change"]["value"], row["change"]["low"], row["change"]["high"], row["n"], row["unit"],
                row["change"]["verdict"],
            )
            for name, row in comparison["measures"].items()
        }  # fmt: skip
        return Comparison(comparison["verdict"], changes, text)

    def generate(
        self, prompts: Sequence[Conversation], *, policy: str | None = None, max_new_tokens: int = 256,
        temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, completions: int = 1,
    ) -> list[Rollout]:  # fmt: skip
        """`completions` answers to each prompt, in the order of the prompts, in one batch.

        A prompt is a text or a list of messages, `{"role": …, "content": …}`, that ends with a user message. `policy` is one of
        `policies`; None is the last one. Temperature 0 is greedy. Raises RecipeError for an unknown policy or an invalid
        prompt, ModelError for a prompt that leaves no room in the context.
        """
        from posttrain.generate.engine import SamplingSettings, generate

        names = self.policies
        policy = names[-1] if policy is None else policy
        if policy not in names:
            raise RecipeError("policy", f'"{policy}" is not a finished policy', allowed=f"there is: {', '.join(names)}")
        if isinstance(prompts, str):
            raise RecipeError("prompts", "one text", allowed="a list of prompts", do="write [prompt]")
        conversations = [_messages(prompt, number) for number, prompt in enumerate(prompts, 1)]
        target = self._loaded()
        adapter = target.policies.activate(policy)
        ids = [target.base.chat.encode_prompt(messages) for messages in conversations]
        settings = SamplingSettings(max_new_tokens, temperature, top_p, seed)
        return generate(target.base, ids, settings, adapter, completions=completions)

    def _loaded(self) -> "Target":
        """The base and its policies, loaded once."""
        from posttrain.models.target import open_target

        if self._target is None:
            self._target = open_target(str(self.folder))
        return self._target


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    until: str | None = None,
) -> Run:
    """Run or resume a recipe, as `posttrain run` does. `recipe` is a file or its content as a dict.

    `settings` overrides settings of a recipe file as `--set` does, for example `["dpo.beta=0.3"]`. `until` stops after a stage
    and its evaluation. Raises PosttrainError for a mistake of the user, Interrupted after a stop signal (the state is saved;
    the same call continues).
    """
    if isinstance(recipe, Mapping):
        if settings:
            raise RecipeError("settings", "given with a recipe that is a dict", do="change the dict")
        loaded = parse_recipe(dict(recipe))
    else:
        loaded = load_recipe(Path(recipe), tuple(settings))
    folder = run_folder(loaded, None if out is None else Path(out))
    run_recipe(loaded, to_toml(loaded), folder, until=until)
    return Run(folder, loaded)


def open_run(folder: str | Path) -> Run:
    """Open an existing run. Raises ArtifactError if the folder is not a run, RecipeError if its recipe is damaged."""
    path = Path(folder)
    if not (path / "recipe.toml").is_file():
        raise ArtifactError(str(path), "not a run folder", do="name a folder made by posttrain.run")
    return Run(path, load_recipe(path / "recipe.toml"))


def _messages(prompt: Conversation, number: int) -> list[Message]:
    """A prompt as messages. Raises RecipeError, with its number, if it is invalid."""
    where = f"prompt {number}"
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    messages = []
    for message in prompt:
        role = next((name for name in ROLES if name == message.get("role")), None)
        content = message.get("content")
        if role is None or not isinstance(content, str):
            problem = f"a message with role {message.get('role')!r} and content of type {type(content).__name__}"
            raise RecipeError(where, problem, allowed='{"role": "system", "user" or "assistant", "content": text}')
        messages.append(Message(role, content))
    if not messages or messages[-1].role != "user":
        raise RecipeError(where, "does not end with a user message", do="add one")
    return messages
