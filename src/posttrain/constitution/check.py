"""`posttrain constitution check`: the principles of a constitution, warnings, and the exact prompts made from it.

With a model, each prompt is rendered by its chat template, as a stage sends it.
"""

from collections.abc import Sequence
from typing import Any

from posttrain.constitution import prompts
from posttrain.constitution.principles import Constitution, Principle, warnings
from posttrain.data.chat import ChatFormat
from posttrain.judge.prompts import comparison
from posttrain.records import Message

PROMPT, ANSWER, OTHER = "(the prompt)", "(the answer)", "(another answer)"
CRITIQUE = "(the critique)"


def describe(
    constitution: Constitution, *, prompt: str = PROMPT, answer: str = ANSWER, chat: ChatFormat | None = None
) -> tuple[dict[str, Any], str]:
    """Data and text of a constitution. The prompts contain `prompt` and `answer`, rendered by `chat` if given.

    Raises DataError if the template rejects a conversation.
    """
    data = {
        "name": constitution.name, "version": constitution.version, "fingerprint": constitution.fingerprint,
        "warnings": warnings(constitution),
        "principles": [
            {
                "id": principle.id, "title": principle.title, "weight": principle.weight, "tags": list(principle.tags),
                "examples": len(principle.example),
                "prompts": {
                    name: _rendered(messages, chat) for name, messages in prompts_of(principle, prompt, answer).items()
                },
            }
            for principle in constitution.principle
        ],
    }  # fmt: skip
    return data, _text(data)


def prompts_of(principle: Principle, prompt: str, answer: str) -> dict[str, list[Message]]:
    """All conversations made from a principle, by name. Conversations whose request is missing are omitted."""
    conversations = {}
    if principle.critique is not None:
        conversations["detection"] = prompts.detection(principle, prompt, answer)
        conversations["critique"] = prompts.critique(principle, prompt, answer)
        if principle.revision is not None:
            conversations["revision"] = prompts.revision(principle, prompt, answer, CRITIQUE)
    conversations["contrast"] = prompts.contrast([principle], [Message("user", prompt)])
    if principle.comparison is not None:
        conversations["comparison"] = comparison(principle.comparison, prompt, answer, OTHER)
    return conversations


def _rendered(messages: Sequence[Message], chat: ChatFormat | None) -> str:
    if chat is not None:
        return chat.decode(chat.encode_prompt(messages), special=True)
    return "\n".join(f"[{message.role}]\n{message.content}" for message in messages)


def _text(data: dict[str, Any]) -> str:
    total = sum(principle["weight"] for principle in data["principles"])
    lines = [f"{data['name']} version {data['version']} · {len(data['principles'])} principles · {data['fingerprint']}", ""]
    for principle in data["principles"]:
        examples = f" · {principle['examples']} worked examples" if principle["examples"] else ""
        tags = f" · {', '.join(principle['tags'])}" if principle["tags"] else ""
        share = f"drawn in {principle['weight'] / total:.0%}"
        lines.append(f"{principle['id']}: {principle['title']} · {share}{tags}{examples}")
    for principle in data["principles"]:
        for name, text in principle["prompts"].items():
            lines += ["", f"=== {principle['id']} · {name} ===", text]
    lines += ["", *(f"warning: {warning}" for warning in data["warnings"])] if data["warnings"] else []
    return "\n".join(lines)
