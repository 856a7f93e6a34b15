"""The records that packages exchange: plain frozen data without behaviour. No torch.

`Conversation` is the data of SFT, `PreferencePair` that of DPO and reward models, `Rollout` a sampled completion, `Score` an
evaluated item.
"""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
# Why a completion stopped: the end-of-turn token, a stop id, a stop string, `max_new_tokens`, a cancellation, NaN logits.
Finish = Literal["end", "stop id", "stop string", "length", "cancelled", "not finite"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A demonstration with at least one assistant turn. All assistant turns are trained."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, the first preferred. `prompt` ends before an assistant turn.

    `probability` is the probability of the label (1 for a human choice), which reward models and DPO use; `margin` is the
    intended difference of scores, which only reward models use. Accuracy is reported by `category`. `authors` are those of the
    chosen and the rejected completion, "" where unknown; only the audit of a judge uses them.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str = ""
    reason: str = ""
    margin: float = 0.0
    probability: float = 1.0
    category: str = ""
    authors: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion.

    `logprobs[i]` is log p(completion_ids[i]) under the sampling distribution, `model_logprobs[i]` under the model's own
    distribution at temperature 1. `ended` says that the last token is an end token, which `text` omits. `finish` is the reason
    for stopping. With a stop string, `text` ends before it and the ids include the token that completed it.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool
    adapter: str
    model_logprobs: tuple[float, ...] = ()
    finish: Finish = "length"


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one evaluation item for one policy. `value` is in the unit of the measure (share, nats, tokens)."""

    item: str
    task: str
    measure: str
    policy: str
    value: float
    answer: str = ""
    prompt: str = ""
    detail: dict[str, float | str | bool] = field(default_factory=dict)
