"""SwiGLU: the op against plain torch, and on a GPU torch.compile and Liger.

python benchmarks/bench_swiglu.py [--tokens 32 8192] [--device cuda --dtype bfloat16]
"""

from __future__ import annotations

import sys

import torch
from check import Function
from model_op import ModelOp, run
from torch import Tensor

from rmr1.kernels.swiglu import reference, swiglu


def inputs(tokens: int, shape: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """The gate and what it gates, [T, I] each."""
    return [torch.randn(tokens, shape["inner"], dtype=dtype) for _ in range(2)]


def traffic(tokens: int, shape: dict[str, int]) -> tuple[float, float]:
    """Forward: reads two tensors, writes one. Backward: reads three, writes two."""
    return 3.0 * tokens * shape["inner"], 5.0 * tokens * shape["inner"]


def liger(given: list[Tensor]) -> tuple[Function, list[Tensor]]:
    from liger_kernel.ops import LigerSiLUMulFunction

    leaves = [x.requires_grad_() for x in given]
    return lambda gate, up: (LigerSiLUMulFunction.apply(gate, up),), leaves


OP = ModelOp(
    stem="swiglu",
    title="SwiGLU",
    op=lambda gate, up: (swiglu(gate, up),),
    reference=lambda gate, up: (reference(gate, up),),
    leaves=2,
    inputs=inputs,
    workload=lambda tokens, shape: f"T={tokens} I={shape['inner']}",
    traffic=traffic,
    # Per element of the output, of which there are half as many as inputs: exp (as one), sum,
    # quotient, two products; the backward makes the gate again and needs seven more.
    operations=(2.5, 8.0),
    liger=liger,
)

if __name__ == "__main__":
    sys.exit(run(OP, __doc__))
