"""The rotary turn of queries and keys: the op against plain torch, and on a GPU torch.compile and
Liger.

python benchmarks/bench_rope.py [--tokens 32 8192] [--device cuda --dtype bfloat16]
"""

from __future__ import annotations

import sys

import torch
from check import Function
from model_op import ModelOp, run
from torch import Tensor

from rmr1.kernels.rope import RopeScaling, inverse_frequencies, reference, rope, rope_tables


def inputs(tokens: int, shape: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """x [T, N, D], and the tables of cos and sin [T, 1, D / 2]."""
    x = torch.randn(tokens, shape["heads"], shape["head"], dtype=dtype)
    frequencies = inverse_frequencies(shape["head"], 10000.0, RopeScaling())
    return [x, *rope_tables(torch.arange(tokens), frequencies, 1.0, dtype)]


def traffic(tokens: int, shape: dict[str, int]) -> tuple[float, float]:
    """Each way: reads x (or a gradient) and both tables of half a head, writes as much as x."""
    each = 2.0 * tokens * shape["heads"] * shape["head"] + tokens * shape["head"]
    return each, each


def liger(given: list[Tensor]) -> tuple[Function, list[Tensor]]:
    """Liger turns queries and keys in one launch: the last quarter of the heads are its keys."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    x, cos, sin = given
    keys = max(1, x.shape[1] // 4)
    # [1, N, T, D] for it, as a view of [T, N, D]; its tables have a whole head's width.
    q, k = (
        part.contiguous()[None].transpose(1, 2).requires_grad_()
        for part in x.split((x.shape[1] - keys, keys), dim=1)
    )
    tables = [torch.cat((table, table), dim=-1).transpose(0, 1) for table in (cos, sin)]
    return liger_rotary_pos_emb, [q, k, *tables]


OP = ModelOp(
    stem="rope",
    title="RoPE",
    op=lambda x, cos, sin: (rope(x, cos, sin),),
    reference=lambda x, cos, sin: (reference(x, cos, sin),),
    leaves=1,
    inputs=inputs,
    workload=lambda tokens, shape: f"T={tokens} N={shape['heads']} D={shape['head']}",
    traffic=traffic,
    # A complex product is six operations on two elements.
    operations=(3.0, 6.0),
    liger=liger,
)

if __name__ == "__main__":
    sys.exit(run(OP, __doc__))
