"""The sample prompts, answered by the base and by every policy side by side.

Input: samples.jsonl of each evaluation. Answers are escaped.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from posttrain.report.markup import el, section
from posttrain.report.run import RunRecord

_LONGEST = 6000


def samples(run: RunRecord) -> Markup:
    """The section of answers; empty if there are none."""
    answers = {policy.name: {str(row.get("prompt", "")): row for row in policy.samples} for policy in run.policies}
    prompts = list(dict.fromkeys(prompt for rows in answers.values() for prompt in rows))
    if not prompts:
        return Markup("")
    cards = []
    for prompt in prompts:
        answer_cards = [_answer(name, rows[prompt]) for name, rows in answers.items() if prompt in rows]
        cards.append(el("article.prompt", el("h3", prompt), el("div.answers", *answer_cards)))
    return section(
        "samples", "The same prompts, answered by every stage", *cards, lead="Greedy answers, not selected and not edited."
    )


def _answer(name: str, row: Mapping[str, Any]) -> Markup:
    text = str(row.get("answer", ""))
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    tokens = f"{row.get('tokens', 0):,} tokens"
    end = el("span.small", tokens) if row.get("ended") else el("span.small.cut", f"did not end in {tokens}")
    body = el("div.text", shown) if text.strip() else el("div.text.empty", "(only white space)" if text else "(empty)")
    return el("div.answer", el("p.who", el("strong", name), end), body)
