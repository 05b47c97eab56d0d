"""The rotary turn, heads of SmolLM2-135M: the op against plain torch.

python benchmarks/bench_rope.py [--tokens 32 8192] [--device cuda --dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from model_op import run
from torch import Tensor

from rmr1.kernels.rope import RopeScaling, inverse_frequencies, rope, rope_tables


def make(
    tokens: int, dtype: torch.dtype, device: str
) -> tuple[str, list[Tensor], Callable[[], Tensor]]:
    x = torch.randn(tokens, 9, 64, dtype=dtype, device=device).requires_grad_()
    frequencies = inverse_frequencies(64, 10000.0, RopeScaling()).to(device)
    cos, sin = rope_tables(torch.arange(tokens, device=device), frequencies, 1.0, dtype)
    return f"T={tokens} N=9 D=64", [x], lambda: rope(x, cos, sin)


if __name__ == "__main__":
    run(make, "RoPE", "rope", __doc__)
