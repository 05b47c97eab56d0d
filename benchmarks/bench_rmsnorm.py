"""RMSNorm of a residual sum: the op against plain torch, and on a GPU torch.compile and Liger.

python benchmarks/bench_rmsnorm.py [--tokens 32 8192] [--device cuda --dtype bfloat16]
"""

from __future__ import annotations

import sys

import torch
from check import Function
from model_op import ModelOp, run
from torch import Tensor

from rmr1.kernels.rmsnorm import add_rmsnorm, reference

EPS = 1e-5


def inputs(tokens: int, shape: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """x and what is added to it [T, H], and the weight [H]."""
    hidden = shape["hidden"]
    sizes = ((tokens, hidden), (tokens, hidden), (hidden,))
    return [torch.randn(*size, dtype=dtype) for size in sizes]


def op(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_rmsnorm(x, added, weight, EPS)


def plain(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + added
    return reference(total, weight, EPS), total


def traffic(tokens: int, shape: dict[str, int]) -> tuple[float, float]:
    """Forward: reads x, added, weight; writes both outputs. Backward: reads the gradients of both,
    their sum and the weight; writes one gradient, which x and added share, and the weight's.
    """
    hidden = shape["hidden"]
    return 4.0 * tokens * hidden + hidden, 4.0 * tokens * hidden + 2 * hidden


def liger(given: list[Tensor]) -> tuple[Function, list[Tensor]]:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    leaves = [x.requires_grad_() for x in given]
    return lambda x, added, w: LigerFusedAddRMSNormFunction.apply(x, added, w, EPS), leaves


OP = ModelOp(
    stem="rmsnorm",
    title="RMSNorm after a sum",
    op=op,
    reference=plain,
    leaves=3,
    inputs=inputs,
    workload=lambda tokens, shape: f"T={tokens} H={shape['hidden']}",
    traffic=traffic,
    # Per element of the sum, of which there are half as many as inputs: addition, square and its
    # sum, two products; in the backward twice a product and its sum, three products, a difference
    # and the gradient of the sum.
    operations=(2.5, 7.0),
    liger=liger,
)

if __name__ == "__main__":
    sys.exit(run(OP, __doc__))
