"""Values at the edge of what a number can be: minus infinity among logits, and what is no number where it is rounded."""

import ctypes
import math
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.build import FLAGS, NATIVE, library

if library() is None:
    pytest.skip("no C compiler here, or POSTTRAIN_COMPILE=0: plain operations decode", allow_module_level=True)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("tokens", [16, 32])
def test_logits_that_begin_with_tokens_that_cannot_be(tokens: int) -> None:
    """As many as are looked at together, and more of them; of a token that has no other, the sum is zero."""
    logits, head = numbers(300, tokens), numbers(300, 8, seed=1)
    logits[:64, 2], logits[:200, 3], logits[:, 5] = -math.inf, -math.inf, -math.inf
    total, mean = bindings.head_mean(logits, head, -20.0)
    wanted = torch.logsumexp(logits.double(), 0)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(bindings.log_sum_exp(logits), total)
    shares = (logits[:, 2].double() - wanted[2]).exp()
    torch.testing.assert_close(mean[2].double(), shares @ head.double(), rtol=2**-7, atol=2e-3)


def test_what_is_no_number_stays_none_when_it_is_rounded(tmp_path: Path) -> None:
    """Whatever its bits are: rounded up, those of the last one would be a zero."""
    (tmp_path / "round.c").write_text('#include "vectors.h"\nvoid round_all(const float *x, bf16 *y) '
                                      "{ store_halves(y, narrowed(load(x))); }\n")  # fmt: skip
    compiler = shlex.split(os.environ.get("CC", "cc"))
    made = tmp_path / "round.so"
    subprocess.run(
        [*compiler, *FLAGS, "-I", str(NATIVE), "-shared", str(tmp_path / "round.c"), "-o", str(made)], check=True, timeout=60
    )
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000] * 2)
    x, y = bits.to(torch.int32).view(torch.float32), torch.empty(16, dtype=torch.bfloat16)
    ctypes.CDLL(str(made)).round_all(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    assert y.isnan().tolist() == x.isnan().tolist()
    assert torch.equal(y[4:8], x[4:8].bfloat16())
