"""Types of arguments of the command that more than one verb takes, for argparse."""

import argparse
from collections.abc import Callable


def whole(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A whole number of at least `lowest` and at most `highest`."""

    def read(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        if highest is not None and value > highest:
            raise argparse.ArgumentTypeError(f"{value} is more than {highest}")
        return value

    read.__name__ = "whole number"  # what argparse calls a text that int() refuses
    return read


def number(text: str) -> float:
    """A finite number from 0 upwards."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 upwards")
    return value


def seconds(text: str) -> float:
    """A time, more than 0."""
    value = number(text)
    if not value:
        raise argparse.ArgumentTypeError("0 seconds are no time")
    return value
