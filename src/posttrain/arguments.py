"""Argument types for argparse that several commands use."""

import argparse
from collections.abc import Callable


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `lowest` to `highest`."""

    def read(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        if highest is not None and value > highest:
            raise argparse.ArgumentTypeError(f"{value} is more than {highest}")
        return value

    read.__name__ = "whole number"  # argparse uses this name for text that int() rejects
    return read


def number(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def seconds(text: str) -> float:
    """An argparse type: a time in seconds, greater than 0."""
    value = number(text)
    if not value:
        raise argparse.ArgumentTypeError("must be greater than 0 seconds")
    return value
