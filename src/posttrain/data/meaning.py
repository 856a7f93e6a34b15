"""Detect fields of rows and turns that change what should be trained and that are not supported.

Ignoring them would change the meaning of a row: without its call a tool-call turn trains the model to announce a call and stop,
a turn with weight 0 should not be trained, and neither should an answer labelled bad. Rows with such a field are dropped and
counted under its name.

Sources: the layouts of TRL, Axolotl, LLaMA-Factory, ms-swift, OpenAI's and Mistral's fine-tuning, Argilla, UltraFeedback, KTO.
"""

import math
from typing import Any

_TOOLS = (
    "tools", "functions", "tool_calls", "function_call", "tool_call_id", "tool_responses", "tool_results",
)  # fmt: skip
_REASONING = (
    "reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks", "thinking_content", "thought",
    "thoughts",
)  # fmt: skip
_MEDIA = (
    "image", "images", "image_url", "video", "videos", "audio", "audios",
)  # fmt: skip
# Settings of a chat template in the row.
_RENDERING = ("chat_template_kwargs", "documents")
_OF_TURNS = (*_TOOLS, *_REASONING, *_MEDIA, "attachments", "files", "refusal", "prefix", "train_detail", "training_detail")
# Whether an assistant turn is trained: numbers that must be 1, flags that must be true, flags that must be false.
_TURN_WEIGHTS = ("weight", "loss_weight", "loss_scale")
_TURN_TRAINED = ("train", "trained", "training", "loss", "train_on_turn")
_TURN_MASKED = ("mask", "masked")
_ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight", "loss_scale")
# Flags of a row: an answer is good if these are true and those in _BAD are false.
_LABELS = ("label", "kto_tag")  # also as 1 and 0; in other columns a number may be an index
_GOOD = (
    *_LABELS, "desirable", "is_desirable", "accepted", "is_accepted", "approved", "is_approved", "good", "is_good", "correct",
    "is_correct", "valid", "is_valid", "preferred", "is_preferred", "chosen", "is_chosen", "review_result", "thumbs_up",
    "train",
)  # fmt: skip
_BAD = (
    "rejected", "is_rejected", "undesirable", "is_undesirable", "bad", "is_bad", "deleted", "is_deleted", "discarded",
    "is_discarded", "excluded", "exclude", "flagged", "is_flagged", "thumbs_down", "masked", "mask",
)  # fmt: skip
_BAD_WORDS = frozenset({"bad", "rejected", "undesirable", "discarded"})
_TIES = ("tie", "is_tie")
# Names of prompt columns that no layout reads next to two whole texts.
_PROMPTS = ("question", "instruction", "query", "input", "context", "post", "history")
_SPEAKERS = frozenset(
    {"tool", "function", "function_call", "tool_call", "tool_calls", "tool_response", "observation", "ipython", "developer"}
)
_EMPTY_TEXTS = frozenset({"", "[]", "{}", "null", "none", "nan", "false"})
# All columns of a row that are checked here.
COLUMNS = frozenset(
    {
        *_TOOLS,
        *_REASONING,
        *_MEDIA,
        *_RENDERING,
        *_ROW_WEIGHTS,
        *_GOOD,
        *_BAD,
        *_TIES,
        *_PROMPTS,
        "status",
        "system",
        "system_prompt",
    }
)


def unsupported_in_turn(turn: dict[str, Any], speaker: str, content_key: str) -> str | None:
    """The name of an unsupported field or content of a turn, or None."""
    role = turn.get(speaker)
    if isinstance(role, str) and role in _SPEAKERS:
        return f'a turn of "{role}"'
    for name in _OF_TURNS:
        if not is_empty(turn.get(name)):
            return name
    content = turn.get(content_key)
    if isinstance(content, list) and content:
        kinds = {str(part.get("type", "object"))[:20] if isinstance(part, dict) else type(part).__name__ for part in content}
        return f"content in parts ({', '.join(sorted(kinds))})"
    return None


def untrained_reason(turn: dict[str, Any]) -> str | None:
    """The field that excludes an answer from training, or None."""
    for name in _TURN_WEIGHTS:
        weight = _number(turn.get(name))
        if weight is not None and weight != 1:
            return f"{name} = {weight:g}"
    for name in _TURN_TRAINED:
        if _flag(turn.get(name)) is False:
            return f"{name} = false"
    return next((f"{name} = true" for name in _TURN_MASKED if _flag(turn.get(name))), None)


def unsupported_in_row(row: dict[str, Any], *, pairs: bool) -> str | None:
    """The name of an unsupported column that changes the meaning of a row, or None. `pairs`: the row is a preference."""
    names: tuple[str, ...] = (*_TOOLS, *_MEDIA, *_RENDERING, *(() if pairs else _REASONING))
    for name in names:
        if not is_empty(row.get(name)):
            return name
    weight = next(((name, value) for name in _ROW_WEIGHTS if (value := _number(row.get(name))) is not None), None)
    if weight is not None and weight[1] == 0:
        return f"{weight[0]} = 0"
    if pairs:
        ties = [f"{name} = true" for name in _TIES if _flag(row.get(name))]
        ties += ["status = tie"] if isinstance(row.get("status"), str) and row["status"] == "tie" else []
        return ties[0] if ties else None
    for name in _GOOD:
        value = row.get(name)
        if _flag(value, numbers=name in _LABELS) is False:
            return f"{name} = false"
        if isinstance(value, str) and value.strip().lower() in _BAD_WORDS:
            return f"{name} = {value.strip().lower()}"
    return next((f"{name} = true" for name in _BAD if _flag(row.get(name), numbers=False)), None)


def prompt_beside(row: dict[str, Any]) -> str | None:
    """The name of a prompt column with another name, or None."""
    return next((name for name in _PROMPTS if not is_empty(row.get(name))), None)


def is_empty(value: Any) -> bool:
    """Whether a cell is empty: no value, no text, or lists and objects of only empty values."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            pending += part.values()
        elif isinstance(part, list | tuple):
            pending += part
        elif isinstance(part, str):
            if part.strip().lower() not in _EMPTY_TEXTS:
                return False
        elif part and not (isinstance(part, float) and math.isnan(part)):
            return False
    return True


def _number(value: Any) -> float | None:
    """A number or numeral; None for other values."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    try:
        return float(value) if isinstance(value, int | float) and not math.isnan(value) else None
    except OverflowError:
        return math.inf


def _flag(value: Any, *, numbers: bool = True) -> bool | None:
    """A boolean, with `numbers` also 1 or 0 (or -1), each also as text; None for other values."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), _number(value))
    if isinstance(value, bool):
        return value
    return {1.0: True, 0.0: False, -1.0: False}.get(value) if numbers and isinstance(value, int | float) else None
