"""Attention of training, forward and backward: the native kernel against torch's fused attention.

    python benchmarks/bench_packed_attention.py [--shapes 1000x128x8 1128x0x8]

A shape is tokens of a prompt x tokens of a response x responses; responses of 0 tokens: so many
sequences that share nothing. torch: its fused attention in two calls that are merged through their
log-sum-exp (`merged`). Heads: of SmolLM2-135M. Checked before it is timed, in fp64.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import harness
import torch
from check import check
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.kernels import packed_attention
from rmr1.kernels.dispatch import use
from rmr1.kernels.packed_attention import Layout, merged, merged_backward

HEADS = (9, 3, 64)  # N, K, D
SHAPES = ["1000x128x8", "1128x0x8", "4096x0x1"]


def layout_of(shape: str) -> tuple[Layout, int]:
    """Who sees whom, and how many pairs of a token and one that it sees."""
    prompt, response, count = map(int, shape.split("x"))
    alone = prompt * (prompt + 1) // 2
    if response == 0:
        return Layout([(prompt, ())] * count), count * alone
    own = response * prompt + response * (response + 1) // 2
    return Layout([(prompt, [response] * count)]), alone + count * own


def tensors(layout: Layout, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient."""
    queries, keys, dim = HEADS
    return [torch.randn(layout.tokens, n, dim).to(dtype) for n in (queries, keys, keys, queries)]


def verify(shape: str) -> float:
    """The error in units of the definition's own in fp32."""
    layout, _ = layout_of(shape)

    def op(q: Tensor, k: Tensor, v: Tensor, on_out: Tensor) -> tuple[Tensor, ...]:
        out, lse = packed_attention.forward(q, k, v, layout)
        return out, *packed_attention.backward(on_out, q, k, v, out, lse, layout)

    def defined(q: Tensor, k: Tensor, v: Tensor, on_out: Tensor) -> tuple[Tensor, ...]:
        with use("reference"):
            return op(q, k, v, on_out)

    return check("packed_attention", op, defined, tensors(layout, torch.float32), 0)


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check at an awkward size, then the rows of each shape, both ways."""
    torch.manual_seed(0)
    errors = {"rmr1 packed_attention": verify("67x33x3")}
    rows = []
    for shape in ["100x20x4"] if options.quick else options.shapes:
        layout, pairs = layout_of(shape)
        q, k, v, on_out = tensors(layout, torch.float32)
        out, lse = packed_attention.forward(q, k, v, layout)
        queries, keys, dim = HEADS
        flops, moved = 4.0 * pairs * queries * dim, 4.0 * layout.tokens * (queries + keys) * 2 * dim
        forward: dict[str, Run] = {
            "rmr1 packed_attention": partial(packed_attention.forward, q, k, v, layout),
            "torch, merged": partial(merged, q, k, v, layout),
        }
        work = Work(f"{shape}, forward", flops, moved)
        rows += harness.measure(work, forward, options, limits, errors)
        given = (on_out, q, k, v, out, lse, layout)
        backward: dict[str, Run] = {
            "rmr1 packed_attention": partial(packed_attention.backward, *given),
            "torch, merged": partial(merged_backward, *given),
        }
        # Scores once more, and a product each for the gradients of weights, q, k and v.
        work = Work(f"{shape}, backward", 2.5 * flops, 2 * moved)
        rows += harness.measure(work, backward, options, limits, errors)
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "packed_attention", samples=7)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help=f"default {' '.join(SHAPES)}")
    return harness.run(parser, "Attention of training", measure)


if __name__ == "__main__":
    sys.exit(main())
