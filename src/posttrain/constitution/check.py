"""`posttrain constitution check`: what a constitution holds, what looks wrong about it, and the exact prompts that it makes.

With a model, each prompt is rendered by its chat template, as a stage would send it.
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
    """Data and text. The prompts show `prompt` and `answer`, rendered by `chat` where it is given.

    Raises DataError where the template refuses a conversation.
    """
    found = {
        "name": constitution.name, "version": constitution.version, "fingerprint": constitution.fingerprint,
        "warnings": warnings(constitution),
        "principles": [
            {
                "id": principle.id, "title": principle.title, "weight": principle.weight, "tags": list(principle.tags),
                "examples": len(principle.example),
                "prompts": {
                    name: _shown(messages, chat) for name, messages in prompts_of(principle, prompt, answer).items()
                },
            }
            for principle in constitution.principle
        ],
    }  # fmt: skip
    return found, _text(found)


def prompts_of(principle: Principle, prompt: str, answer: str) -> dict[str, list[Message]]:
    """Every conversation that a principle makes, by name; those whose request it lacks are left out."""
    made = {}
    if principle.critique is not None:
        made["detection"] = prompts.detection(principle, prompt, answer)
        made["critique"] = prompts.critique(principle, prompt, answer)
        if principle.revision is not None:
            made["revision"] = prompts.revision(principle, prompt, answer, CRITIQUE)
    made["contrast"] = prompts.contrast([principle], [Message("user", prompt)])
    if principle.comparison is not None:
        made["comparison"] = comparison(principle.comparison, prompt, answer, OTHER)
    return made


def _shown(messages: Sequence[Message], chat: ChatFormat | None) -> str:
    if chat is not None:
        return chat.decode(chat.encode_prompt(messages), special=True)
    return "\n".join(f"[{message.role}]\n{message.content}" for message in messages)


def _text(found: dict[str, Any]) -> str:
    total = sum(principle["weight"] for principle in found["principles"])
    lines = [f"{found['name']} version {found['version']} · {len(found['principles'])} principles · {found['fingerprint']}", ""]
    for principle in found["principles"]:
        examples = f" · {principle['examples']} worked examples" if principle["examples"] else ""
        tags = f" · {', '.join(principle['tags'])}" if principle["tags"] else ""
        share = f"drawn in {principle['weight'] / total:.0%}"
        lines.append(f"{principle['id']}: {principle['title']} · {share}{tags}{examples}")
    for principle in found["principles"]:
        for name, text in principle["prompts"].items():
            lines += ["", f"=== {principle['id']} · {name} ===", text]
    lines += ["", *(f"warning: {warning}" for warning in found["warnings"])] if found["warnings"] else []
    return "\n".join(lines)
