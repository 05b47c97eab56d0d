"""Products of few or many rows with a weight matrix: the op against torch's own linear.

    python benchmarks/bench_linear.py [--rows 1 16 256]

The products of a SmolLM2-135M: MLP and q, k, v together at 4,608 outputs, the MLP's way back, the
head. In a model a layer's weights come from memory, not from a cache, so the calls take turns over
copies of them. On a GPU the op is torch's own. It has no gradient.
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle

import harness
import torch
from check import check
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.kernels.linear import linear, reference

SHAPES = {"layer": (576, 4608), "down": (1536, 576), "head": (576, 49_152)}  # K, N
QUICK = {"layer": (576, 160)}
ROWS = [1, 4, 16, 32, 64, 256, 1024]
COLD = 256e6  # bytes of all copies: more than a processor's caches hold


def verify(dtype: torch.dtype, device: str) -> float:
    """The error in units of torch's own, at an awkward size, with a bias and without."""
    x, weight, bias = torch.randn(67, 337), torch.randn(1025, 337), torch.randn(1025)
    given = [one.to(device, dtype) for one in (x, weight, bias)]
    return max(
        check("linear", lambda *x: (linear(*x),), lambda *x: (reference(*x),), given[:count], 0)
        for count in (2, 3)
    )


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check the op, then the rows of each product."""
    dtype, device = getattr(torch, options.dtype), options.device
    torch.manual_seed(0)
    error = verify(dtype, device)
    found = []
    for name, (inputs, outputs) in (QUICK if options.quick else SHAPES).items():
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        size = weight.numel() * weight.element_size()
        copies = [
            weight,
            *(weight.clone() for _ in range(0 if options.quick else int(COLD / size))),
        ]
        for rows in options.rows or ([17] if options.quick else ROWS):
            x = torch.randn(rows, inputs, device=device).to(dtype)
            work = Work(
                f"{name} M={rows} K={inputs} N={outputs} {options.dtype}",
                2.0 * rows * inputs * outputs,
                float(size + (rows * (inputs + outputs)) * weight.element_size()),
            )
            turns = {"torch linear": cycle(copies), "rmr1 linear": cycle(copies)}

            def torchs(x: Tensor = x, turn: cycle[Tensor] = turns["torch linear"]) -> Tensor:
                return reference(x, next(turn))

            def op(x: Tensor = x, turn: cycle[Tensor] = turns["rmr1 linear"]) -> Tensor:
                return linear(x, next(turn))

            runs: dict[str, Run] = {"torch linear": torchs, "rmr1 linear": op}
            results = rows * outputs * weight.element_size()
            errors = {"rmr1 linear": error}
            found += harness.measure(work, runs, options, limits, errors, results=results)
    return found


def main() -> int:
    parser = harness.arguments(__doc__, "linear", samples=15)
    parser.add_argument("--rows", type=int, nargs="+", help=f"default {ROWS}")
    return harness.run(parser, "Linear", measure)


if __name__ == "__main__":
    sys.exit(main())
