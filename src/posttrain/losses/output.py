"""What every loss returns."""

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """A scalar loss and detached metrics by their public names."""

    loss: Tensor
    metrics: dict[str, Tensor]
