"""Settings of a judge, and of every stage that asks one. `judge/open.py` opens the judge, `judge/trust.py` audits it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from posttrain.errors import RecipeError, nearest
from posttrain.settings import Settings
from posttrain.stages.kind import Earlier, Reads, RewardFunction
from posttrain.stages.shared_settings import AnsweringSettings

POLICY, REWARD, RULE = "policy:", "reward:", "rule:"
ENDPOINTS = ("http://", "https://")


class JudgeSettings(Settings):
    """A judge: a model, a rule or a server that compares or grades answers."""

    no_effect: ClassVar[frozenset[str]] = frozenset(
        {"key", "concurrency", "timeout", "retries", "max_requests", "max_tokens"}
    )  # fmt: skip

    name: Annotated[str, Field(min_length=1)]
    """`policy:NAME` or `reward:NAME` of this run, `rule:package.module:function`, the address of an OpenAI-compatible server
    (`http://host:port/v1`), or a model (a package, a folder, a `.gguf` file, a hub id)."""
    model: str = ""
    """The model's name at a server."""
    key: str = "POSTTRAIN_JUDGE_KEY"
    """The environment variable with the key of a server. The key itself is never written anywhere."""
    template: str = "auto"
    """Chat template of a model without one."""
    reasoning: Annotated[int, Field(ge=0, le=64)] = 0
    """Verdicts after step-by-step reasoning that are sampled and averaged; 0 reads the probability of the first token."""
    reasoning_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    """Longest reasoning in tokens."""
    clamp: Annotated[float, Field(ge=0, lt=0.5)] = 0.4
    """Probabilities after reasoning are limited to between `clamp` and 1 − `clamp` (Bai et al. 2022: 0.4); others never are."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests to a server at a time."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for a request to a server, or for a call of a rule."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Repetitions of a request that failed with a temporary error (no connection, a time-out, 429, 5xx, or a reply that
    is not a chat completion)."""
    max_requests: Annotated[int, Field(ge=0)] = 0
    """Largest number of requests that are sent to a server, repetitions included; 0 sets no limit."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Largest number of tokens that a server may count, prompts and replies together; 0 sets no limit."""


class JudgedSettings(AnsweringSettings):
    """Settings of a stage that asks a judge."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"allow_weak_judge"})

    judge: str | JudgeSettings
    """Who compares answers: a name as in `name` of the table, or the table."""
    gold: Annotated[str, Field(min_length=1)] = "starter"
    """Pairs whose better answer is known, for the audit of the judge: a preference file, or `starter`."""
    allow_weak_judge: bool = False
    """Go on with a judge that failed its audit. The manifest and the report say so."""


def judge_settings(judge: str | JudgeSettings) -> JudgeSettings:
    """The judge of a stage as a table."""
    return JudgeSettings(name=judge) if isinstance(judge, str) else judge


def judge_reads(judge: str | JudgeSettings) -> Reads:
    """What a judge reads of a run: a policy, a reward model or a function."""
    settings = judge_settings(judge)
    name = settings.name
    if name.startswith(POLICY):
        return Reads((name.removeprefix(POLICY),))
    if name.startswith(REWARD):
        return Reads((), (name.removeprefix(REWARD),))
    if name.startswith(RULE):
        return Reads((), (), (RewardFunction(name.removeprefix(RULE), settings.timeout),))
    return Reads()


def check_judge(judge: str | JudgeSettings, earlier: Earlier) -> None:
    """Raises RecipeError for a judge that is not in the run, a function's name that is none, or a server without a model."""
    settings = judge_settings(judge)
    name = settings.name
    if name.startswith(POLICY):
        earlier.check_policy("judge", name.removeprefix(POLICY), "base")
    elif name.startswith(REWARD):
        wanted = name.removeprefix(REWARD)
        if wanted not in earlier.reward_models:
            there = f"there is: {', '.join(earlier.reward_models)}" if earlier.reward_models else "there is none"
            found = f'judge = "{name}" is not an earlier reward stage'
            raise RecipeError(earlier.place, found, allowed=there, do=nearest(wanted, earlier.reward_models))
    elif name.startswith(RULE):
        module, colon, function = name.removeprefix(RULE).partition(":")
        if not (colon and all(map(str.isidentifier, [*module.split("."), function]))):
            found = f'judge = "{name}" does not name a function'
            raise RecipeError(earlier.place, found, allowed="rule:package.module:function")
    elif name.startswith(ENDPOINTS) and not settings.model:
        shown = re.sub(r"//[^/@]*@", "//…@", name)  # an address may have a key
        found = f'judge = "{shown}" without the name of a model'
        do = 'write judge = {name = "http://…", model = "…"}'
        raise RecipeError(earlier.place, found, allowed="a model that the server has", do=do)
    if settings.model and not name.startswith(ENDPOINTS):
        raise RecipeError(earlier.place, f'judge = "{name}" with model', allowed="model is for a server", do="remove it")
    if settings.reasoning and name.startswith((REWARD, RULE)):
        raise RecipeError(earlier.place, f'judge = "{name}" with reasoning', allowed="a language model", do="remove it")


def weak_judge(stage: JudgedSettings, manifest: Mapping[str, Any]) -> str:
    """Why rows that a weak judge made may not be used any more, or "": the recipe allowed it when they were made."""
    weak = manifest.get("judge", {}).get("allowed_weak") and not stage.allow_weak_judge
    return "its judge failed its audit, and allow_weak_judge is false" if weak else ""
