"""Group advantages with their broadcast to packed tokens: one launch against plain torch.

python benchmarks/bench_group_advantage.py [--prompts 64 1024] [--device cuda]

Rewards and advantages are float32 in every recipe. The op has no gradient.
"""

from __future__ import annotations

import argparse
import sys

import harness
import torch
from check import check
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.kernels.group_advantage import group_advantages, reference


def op(rewards: Tensor, groups: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return (group_advantages(rewards, groups, token_counts=tokens),)


def plain(rewards: Tensor, groups: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return (reference(rewards, groups, "std", "mean").repeat_interleave(tokens),)


def case(prompts: int, samples: int, device: str) -> list[Tensor]:
    """Rewards, group ids and token counts, [N] each: judgments of about 800 tokens."""
    count = prompts * samples
    rewards = torch.randint(0, 2, (count,)) * 2.0 - 1
    groups = torch.arange(prompts).repeat_interleave(samples)
    return [x.to(device) for x in (rewards, groups, torch.randint(400, 1200, (count,)))]


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check, then the rows of each size."""
    torch.manual_seed(0)
    # Rewards that are not all 1 or -1: their means are exact in fp32 and would hide a fault.
    rewards, groups, tokens = case(37, options.group, options.device)
    given = [rewards + torch.randn(len(rewards)).to(rewards), groups, tokens]
    error = check("group_advantages", op, plain, given, 0)
    rows = []
    for prompts in options.prompts or ([8] if options.quick else [16, 256, 1024]):
        inputs = case(prompts, options.group, options.device)
        total = int(inputs[2].sum())
        work = Work(
            f"{prompts} prompts x {options.group}",
            # Sum, sum of squares and the quotient of every sample.
            6.0 * len(inputs[0]),
            # An fp32 reward, an int64 group and an int64 count in, an fp32 advantage a token out.
            20.0 * len(inputs[0]) + 4 * total,
        )
        runs: dict[str, Run] = {
            "copy of the bytes": harness.copy_of(work.bytes, options.device),
            "rmr1 group_advantages": lambda given=inputs: op(*given),
            "plain torch": lambda given=inputs: plain(*given),
        }
        if options.compile:
            compiled = harness.compiled(plain)
            runs["torch.compile"] = lambda f=compiled, given=inputs: f(*given)
        errors = {"rmr1 group_advantages": error}
        rows += harness.measure(work, runs, options, limits, errors, results=4 * total)
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "group_advantage", samples=30)
    parser.add_argument("--prompts", type=int, nargs="+", help="default 16 256 1024")
    parser.add_argument("--group", type=int, default=7, help="samples of a prompt")
    return harness.run(parser, "Group advantage by token", measure)


if __name__ == "__main__":
    sys.exit(main())
