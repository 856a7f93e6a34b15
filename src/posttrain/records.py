"""The records that flow between the parts: plain frozen data, no behaviour, no torch.

`Message` and `Conversation` are what SFT learns from, `PreferencePair` what DPO learns from, `Rollout` what a policy
answered, `Score` what an evaluation made of it.
"""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
# Why a completion stopped: the model's end of a turn, a stop id, a stop string, `max_new_tokens`, or somebody who left.
Finish = Literal["end", "stop id", "stop string", "length", "cancelled", "not finite"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A demonstration: at least one assistant turn; every assistant turn is learned from."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, the first preferred. `prompt` ends before an assistant turn.

    `probability` says how sure the preference is (1 for a person's choice), `margin` by how much the scores should differ;
    only reward models read them. `category` is what accuracy is told by.
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


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion.

    `logprobs[i]` is log p(completion_ids[i]) under the distribution sampled from, `model_logprobs[i]` the model's own at
    temperature 1 with nothing cut or moved. `ended`: the last token is one that ends, and `text` is without it. `finish` says
    why it stopped; a `text` that met a stop string ends before it, and the ids go on to the token that completed it.
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
    """One evaluation item answered by one policy. `value` is in the measure's own unit (share, nats, tokens)."""

    item: str
    task: str
    measure: str
    policy: str
    value: float
    answer: str = ""
    prompt: str = ""
    detail: dict[str, float | str | bool] = field(default_factory=dict)
