"""The policy loss with its gradient and statistics: one kernel against torch's autograd.

    python benchmarks/bench_policy_loss.py [--tokens 16384 262144] [--device cuda]

Providers: the op (native on a CPU, Triton on a GPU), and its reference, which is what trainers
write in plain torch (compiled too on a GPU). The yardstick is a copy of what must move: four
log-probabilities and the ids in, one slope out. Log-probabilities are float32 in every recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import harness
import torch
from check import Function, check
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss, reference, variant

OBJECTIVES = ("rm_r1", "gspo")


def case(tokens: int, device: str) -> list[Tensor]:
    """New, old, reference and rollout log-probabilities [T], advantages [S], ids [T]."""
    sequences = max(2, tokens // 800)  # RM-R1's judgments have about 800 tokens
    new = torch.randn(tokens) - 3
    others = [new + width * torch.randn(tokens) for width in (0.1, 0.3, 0.1)]
    ids = torch.arange(tokens) * sequences // tokens
    # Mean 0.5: with mean 0 the loss would be a small difference of large sums.
    return [x.to(device) for x in (new, *others, torch.randn(sequences) + 0.5, ids)]


def loss_of(config: PolicyLossConfig) -> Function:
    """The op as a function of `case`."""

    def loss(
        new: Tensor, old: Tensor, ref: Tensor, rollout: Tensor, advantages: Tensor, ids: Tensor
    ) -> tuple[Tensor, ...]:
        found, _ = policy_loss(
            new, old, advantages, ids, ref_logprobs=ref, rollout_logprobs=rollout, config=config
        )
        return (found,)

    return loss


def compiled(config: PolicyLossConfig) -> Callable[..., tuple[Tensor, ...]]:
    """torch.compile of the reference, with the weight of a token worked out outside."""

    def loss(
        new: Tensor, old: Tensor, ref: Tensor, rollout: Tensor, advantages: Tensor, ids: Tensor
    ) -> tuple[Tensor, ...]:
        weights = torch.full_like(advantages, 1 / len(new))
        return reference(new, old, advantages, ids, weights, ref, rollout, config)

    fast = harness.compiled(loss)
    return lambda *inputs: fast(*inputs)[:1]


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check each objective, then the rows of each size."""
    torch.manual_seed(0)
    rows = []
    tokens = options.tokens or ([1024] if options.quick else [4096, 16384, 262144])
    for name in OBJECTIVES:
        op = loss_of(variant(name))

        def plain(*inputs: Tensor, op: Function = op) -> tuple[Tensor, ...]:
            with use("reference"):
                return op(*inputs)

        error = check(f"policy_loss {name}", op, plain, case(2051, options.device), 1)
        for count in tokens:
            inputs = case(count, options.device)
            new = inputs[0].requires_grad_()
            functions: dict[str, Function] = {"rmr1 policy_loss": op, "plain torch": plain}
            if options.compile:
                functions["torch.compile"] = compiled(variant(name))
            work = Work(
                f"{name}, T={count}",
                # About: two ratios with an exp each, clip, minimum, KL, their slopes, statistics.
                30.0 * count,
                # Four fp32 log-probabilities and an int64 id in, an fp32 slope out; the
                # advantages, one in 800 tokens, do not count.
                (4 * 4 + 8 + 4.0) * count,
            )
            runs: dict[str, Run] = {
                "copy of the bytes": harness.copy_of(work.bytes, options.device)
            }
            for provider, function in functions.items():
                runs[provider] = lambda f=function, given=inputs, new=new: torch.autograd.grad(
                    f(*given)[0], new
                )
            rows += harness.measure(work, runs, options, limits, {"rmr1 policy_loss": error})
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "policy_loss", samples=30)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 4096 16384 262144")
    return harness.run(parser, "Policy loss, forward and backward", measure)


if __name__ == "__main__":
    sys.exit(main())
