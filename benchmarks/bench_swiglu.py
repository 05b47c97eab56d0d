"""SwiGLU, inner size of SmolLM2-135M: the op against plain torch.

python benchmarks/bench_swiglu.py [--tokens 32 8192] [--device cuda --dtype bfloat16]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from model_op import run
from torch import Tensor

from rmr1.kernels.swiglu import swiglu


def make(
    tokens: int, dtype: torch.dtype, device: str
) -> tuple[str, list[Tensor], Callable[[], Tensor]]:
    gate, up = (
        torch.randn(tokens, 1536, dtype=dtype, device=device).requires_grad_() for _ in range(2)
    )
    return f"T={tokens} I=1536", [gate, up], lambda: swiglu(gate, up)


if __name__ == "__main__":
    run(make, "SwiGLU", "swiglu", __doc__)
