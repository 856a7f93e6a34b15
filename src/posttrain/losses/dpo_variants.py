"""The variants of the DPO loss, a function each; a new one is a function and a line of `VARIANTS` (docs/extending.md).

    h = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) - log ref(rejected)],   margin m = beta h,   e: smoothing

    sigmoid   -(1 - e) log s(m) - e log s(-m)               DPO, Rafailov et al. 2023 eq. 7; e > 0: cDPO, Mitchell 2023
    robust    [-(1 - e) log s(m) + e log s(-m)] / (1 - 2 e) rDPO, Chowdhury et al. 2024 eq. 9: unbiased under flips
    ipo       (h - 1 / (2 beta))^2                          IPO, Azar et al. 2023 eq. 17
    hinge     max(0, 1 - m)                                 SLiC-HF, Zhao et al. 2023, on log-ratios

IPO takes the summed h of the paper and of its derivation: 1 / (2 beta) is then a gap in nats of whole completions.
Libraries that average h per token (TRL does) solve another problem with another beta; a beta does not carry over.
TRL reads label smoothing for `robust` only and drops it for `sigmoid`; here it is applied to both.

The functions import torch when they are called: a recipe reads the names of the table and is checked without torch.

B: preference pairs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Gaps(NamedTuple):
    """The gap h of each pair [B] in nats, beta, and the label smoothing e."""

    gap_B: "Tensor"
    beta: float
    smoothing: float

    @property
    def margin_B(self) -> "Tensor":
        """beta h [B]."""
        return self.beta * self.gap_B


def sigmoid(gaps: Gaps) -> "Tensor":
    """DPO, and cDPO with label smoothing: a loss a pair [B]."""
    from torch.nn.functional import logsigmoid

    return -(1 - gaps.smoothing) * logsigmoid(gaps.margin_B) - gaps.smoothing * logsigmoid(-gaps.margin_B)


def robust(gaps: Gaps) -> "Tensor":
    """rDPO: a loss a pair [B]."""
    from torch.nn.functional import logsigmoid

    e = gaps.smoothing
    return (-(1 - e) * logsigmoid(gaps.margin_B) + e * logsigmoid(-gaps.margin_B)) / (1 - 2 * e)


def ipo(gaps: Gaps) -> "Tensor":
    """IPO: a loss a pair [B]."""
    return (gaps.gap_B - 1 / (2 * gaps.beta)) ** 2


def hinge(gaps: Gaps) -> "Tensor":
    """SLiC-HF on log-ratios: a loss a pair [B]."""
    return (1 - gaps.margin_B).relu()


class Variant(NamedTuple):
    """A loss a pair, and whether label smoothing has a meaning for it, or must be above 0."""

    loss: Callable[[Gaps], "Tensor"]
    smoothing: Literal["none", "optional", "required"] = "none"


VARIANTS: dict[str, Variant] = {
    "sigmoid": Variant(sigmoid, "optional"),
    "robust": Variant(robust, "required"),
    "ipo": Variant(ipo),
    "hinge": Variant(hinge),
}
