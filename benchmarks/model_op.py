"""What the benchmarks of the model's own ops share: op, reference and bound at a few sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, row, save, show
from torch import Tensor

from rmr1.kernels.dispatch import use

# tokens, dtype, device -> (workload, leaves with a gradient, the op on them)
Make = Callable[[int, torch.dtype, str], tuple[str, list[Tensor], Callable[[], Tensor]]]


def measure(make: Make, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of op and reference; in seconds and in copies."""
    torch.manual_seed(0)
    workload, leaves, op = make(tokens, getattr(torch, options.dtype), options.device)
    out = op()
    grad = torch.randn_like(out)

    def forward() -> None:
        with torch.no_grad():
            op()

    def both() -> None:
        torch.autograd.grad(op(), leaves, grad)

    def plain(run: Callable[[], None]) -> Callable[[], None]:
        def forced() -> None:
            with use("reference"):
                run()

        return forced

    compiled = torch.compile(plain(forward)) if options.compile else None
    target = torch.empty_like(out)
    runs: dict[str, Callable[[], object]] = {
        "copy of the output": lambda: target.copy_(grad),
        "rmr1, forward": forward,
        "plain torch, forward": plain(forward),
        "rmr1, forward and backward": both,
        "plain torch, forward and backward": plain(both),
    }
    if compiled is not None:
        runs["torch.compile, forward"] = compiled
    seconds = in_turn(runs, options.samples, options.device)
    return [row(workload, name, seconds[name], options.device) for name in runs]


def run(make: Make, title: str, stem: str, description: str) -> None:
    """The command line of such a benchmark."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 1024, 8192])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--output", type=Path, default=Path(f"results/bench_{stem}.json"))
    options = parser.parse_args()
    rows = [one for tokens in options.tokens for one in measure(make, tokens, options)]
    show(
        f"{title}, {rows[0]['device']}, {rows[0]['threads']} threads",
        rows,
        {
            "workload": lambda one: one["workload"],
            "provider": lambda one: one["provider"],
            "microseconds": lambda one: f"{1e6 * one['median']:.0f}",
        },
    )
    save(rows, options.output)
