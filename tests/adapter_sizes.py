"""The number of parameters of a low-rank adapter, by hand."""


def count_parameters(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """R inputs + R outputs of every adapted layer; `shapes` are (inputs, outputs) by name."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes.values())
