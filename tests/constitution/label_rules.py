"""A rule that judges in tests of the label stage. It runs in a process of its own, as a user's does."""


def words(prompts: list[str], completions: list[str]) -> list[int]:
    """More words are better."""
    return [len(text.split()) for text in completions]
