"""Group advantages with their broadcast to packed tokens: one launch against plain torch.

python benchmarks/bench_group_advantage.py [--prompts 64 1024] [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, row, save, show

from rmr1.kernels.dispatch import use
from rmr1.kernels.group_advantage import group_advantages


def measure(prompts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size: `samples` judgments a prompt, about 800 tokens each."""
    torch.manual_seed(0)
    count = prompts * options.samples
    rewards = torch.randint(0, 2, (count,), device=options.device) * 2.0 - 1
    groups = torch.arange(prompts, device=options.device).repeat_interleave(options.samples)
    tokens = torch.randint(400, 1200, (count,), device=options.device)

    def op() -> object:
        return group_advantages(rewards, groups, token_counts=tokens)

    def plain() -> object:
        with use("reference"):
            return op()

    runs: dict[str, Callable[[], object]] = {
        "write of the bytes": lambda: torch.zeros(int(tokens.sum()), device=options.device),
        "rmr1 group_advantages": op,
        "plain torch": plain,
    }
    seconds = in_turn(runs, options.repeats, options.device)
    workload = f"{prompts} prompts x {options.samples}"
    return [row(workload, name, seconds[name], options.device) for name in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("results/bench_group_advantage.json"))
    options = parser.parse_args()
    rows = [one for prompts in options.prompts for one in measure(prompts, options)]
    show(
        f"Group advantage by token, {rows[0]['device']}, {rows[0]['threads']} threads",
        rows,
        {
            "workload": lambda one: one["workload"],
            "provider": lambda one: one["provider"],
            "microseconds": lambda one: f"{1e6 * one['median']:.0f}",
        },
    )
    save(rows, options.output)


if __name__ == "__main__":
    main()
