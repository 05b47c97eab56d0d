"""The policy loss with its gradient and statistics: one kernel against torch's autograd.

    python benchmarks/bench_policy_loss.py [--tokens 16384 262144] [--device cuda]

Providers: the op (native on a CPU, Triton on a GPU), and its reference, which is what trainers
write in plain torch. The bound is the time to copy what must move: four inputs in, one slope out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, peak_bytes, row, save, show

from rmr1.kernels.dispatch import use
from rmr1.kernels.policy_loss import policy_loss, variant

BOUND = "copy of the bytes"


def measure(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size, for two objectives."""
    torch.manual_seed(0)
    sequences = max(1, tokens // 800)  # RM-R1's judgments have about 800 tokens
    new = (torch.randn(tokens, device=options.device) - 3).requires_grad_()
    given = {
        "logprobs": new,
        "old_logprobs": new.detach() + 0.1 * torch.randn_like(new),
        "ref_logprobs": new.detach() + 0.3 * torch.randn_like(new),
        "rollout_logprobs": new.detach() + 0.1 * torch.randn_like(new),
        "advantages": torch.randn(sequences, device=options.device),
        "sequence_ids": torch.arange(tokens, device=options.device) * sequences // tokens,
    }
    source = torch.randn(4, tokens, device=options.device)
    target = torch.empty(tokens, device=options.device)
    found = []
    for name in ("rm_r1", "gspo"):
        config = variant(name)

        def op(config: Any = config) -> None:
            loss, _ = policy_loss(**given, config=config)
            torch.autograd.grad(loss, new)

        def plain(op: Callable[[], None] = op) -> None:
            with use("reference"):
                op()

        runs: dict[str, Callable[[], object]] = {
            BOUND: lambda: torch.sum(source, 0, out=target),
            "rmr1 policy_loss": op,
            "plain torch": plain,
        }
        seconds = in_turn(runs, options.samples, options.device)
        for provider, run in runs.items():
            found.append(
                row(
                    f"{name}, T={tokens}",
                    provider,
                    seconds[provider],
                    options.device,
                    peak_memory_mb=peak_bytes(run, options.device) / 2**20,
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 262144])
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("results/bench_policy_loss.json"))
    options = parser.parse_args()
    rows = [one for tokens in options.tokens for one in measure(tokens, options)]
    show(
        f"Policy loss, forward and backward, {rows[0]['device']}, {rows[0]['threads']} threads",
        rows,
        {
            "workload": lambda one: one["workload"],
            "provider": lambda one: one["provider"],
            "microseconds": lambda one: f"{1e6 * one['median']:.0f}",
            "extra MB": lambda one: f"{one['peak_memory_mb']:.1f}",
        },
    )
    save(rows, options.output)


if __name__ == "__main__":
    main()
