"""RMSNorm of a residual sum, hidden size of SmolLM2-135M: the op against plain torch.

python benchmarks/bench_rmsnorm.py [--tokens 32 8192] [--device cuda --dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from model_op import run
from torch import Tensor

from rmr1.kernels.rmsnorm import add_rmsnorm


def make(
    tokens: int, dtype: torch.dtype, device: str
) -> tuple[str, list[Tensor], Callable[[], Tensor]]:
    kind = {"dtype": dtype, "device": device}
    x, added = (torch.randn(tokens, 576, **kind).requires_grad_() for _ in range(2))
    weight = torch.randn(576, **kind).requires_grad_()
    return f"T={tokens} H=576", [x, added, weight], lambda: add_rmsnorm(x, added, weight, 1e-5)[0]


if __name__ == "__main__":
    run(make, "RMSNorm after a sum", "rmsnorm", __doc__)
