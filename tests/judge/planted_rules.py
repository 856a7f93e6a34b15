"""Rules that tests name as `rule:planted_rules:…`; processes of their own import them."""


def shorter(prompts: list[str], completions: list[str]) -> list[float]:
    """The shorter answer is better."""
    return [-float(len(completion)) for completion in completions]


def polite(prompts: list[str], completions: list[str]) -> list[float]:
    """1 if an answer says please."""
    return [float("please" in completion.lower()) for completion in completions]


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    """A mistake of the user."""
    raise ValueError("a message that may repeat an answer")
