"""Training on groups whose prompt lies there once, against a prompt for every sample.

    python benchmarks/bench_pack.py [--shapes 1000x128x8] [--sweep]

A shape is tokens of the prompt x tokens of an answer x answers; one group of it is one update of
the whole model, GRPO with a KL term, optimiser step included, in micro-batches of at most the
group's shared tokens for both. Both are given the same tokens, and before anything is timed their
log-probabilities and gradients are compared. The tokens are random: that costs as much as text.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import harness
import torch
from check import WrongResult
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.engine.balance import shares
from rmr1.engine.flops import body_size, head_size, training_flops
from rmr1.engine.model import CausalLM
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import Batch, Counts, Responses, pack
from rmr1.engine.scorer import Scorer
from rmr1.engine.trainer import Trainer
from rmr1.engine.weights import load_model
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss
from rmr1.models import resolve_model

SWEEP = ["250x128x8", "1000x128x8", "2000x128x8", "1000x64x8", "1000x512x8", "1000x128x2"]
# Largest difference of two log-probabilities, and of two gradients in units of their norm.
LOGPROBS_APART, GRADIENTS_APART = 1e-4, 1e-4
OBJECTIVE = PolicyLossConfig(beta=1e-3)


def batches(shape: tuple[int, int, int], words: int) -> tuple[Batch, Batch]:
    """One group, a prompt for every answer, and the prompt once."""
    prompt_tokens, answer_tokens, answers = shape
    draw = partial(torch.randint, words, generator=torch.Generator().manual_seed(0))
    prompt = draw((prompt_tokens,)).tolist()
    responses = [draw((answer_tokens,)).tolist() for _ in range(answers)]
    advantages = torch.linspace(-1, 1, answers)
    figures = [[-5.0] * answer_tokens] * answers
    made = []
    for prompts, samples in (([prompt] * answers, 1), ([prompt], answers)):
        one = pack(
            prompts, responses, samples=samples, advantages=advantages, rollout_logprobs=figures
        )
        made.append(one)
    return made[0], made[1]


def gradient(model: CausalLM, batch: Batch, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the gradient of their weighted sum in one vector."""
    scores = []
    for run in shares(batch.groups, max_tokens)[0]:
        assert run is not None
        part = batch.slice(*run)
        scored = Scorer(model)(part)[0]
        (scored * torch.linspace(-1, 1, len(scored))).sum().backward()
        scores.append(scored.detach())
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return torch.cat(scores), flat


def verify(model: CausalLM, alone: Batch, shared: Batch, max_tokens: int) -> None:
    """The weights of the sum depend on how an update is cut, so it is cut sample by sample."""
    one, first = gradient(model, alone, 1)
    other, second = gradient(model, shared, 1)
    whole, _ = gradient(model, shared, max_tokens)
    apart = max(float((one - x).abs().max()) for x in (other, whole))
    turned = float((first - second).norm() / first.norm())
    if not (apart < LOGPROBS_APART and turned < GRADIENTS_APART and float(first.norm()) > 0):
        raise WrongResult(
            f"pack: log-probabilities are {apart:.2g} apart and gradients {turned:.2g} of their"
            " norm; nothing was timed."
        )


def loss(logprobs: Tensor, tokens: Responses, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO, as the trainer asks for it."""
    assert tokens.old_logprobs is not None
    return policy_loss(
        logprobs,
        tokens.old_logprobs,
        tokens.advantages,
        tokens.sequence_ids,
        ref_logprobs=tokens.ref_logprobs,
        config=OBJECTIVE,
        token_count=counts.tokens,
    )


def work(config: ModelConfig, batch: Batch, name: str) -> Work:
    """The operations of forward and backward over a batch as it lies there.

    The bytes are the weights', read twice, and gradients and optimiser state, read and written.
    """
    weights = body_size(config) + head_size(config)
    return Work(name, training_flops(config, batch.groups), 4.0 * weights * 9)


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check, then time both on every shape."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    name = "pocket" if options.quick else options.model
    dtype = options.dtype
    rows = []
    for text in ["40x8x4"] if options.quick else SWEEP if options.sweep else options.shapes:
        shape = tuple(int(one) for one in text.split("x"))
        assert len(shape) == 3
        model = load_model(resolve_model(name), dtype=dtype, device=options.device)
        alone, shared = (
            b.to(torch.device(options.device)) for b in batches(shape, model.config.vocab_size)
        )
        verify(model, alone, shared, shared.tokens)
        trainer = Trainer(
            model, OptimConfig(), total_updates=1000, max_micro_tokens=max(shared.tokens, 1)
        )

        def update(batch: Batch, trainer: Trainer = trainer) -> object:
            known = batch.with_logprobs(old=batch.rollout_logprobs, ref=batch.rollout_logprobs)
            return trainer.update(known, loss, per_token=OBJECTIVE.per_token)

        runs: dict[str, Run] = {
            "rmr1, a prompt for every sample": partial(update, alone),
            "rmr1, shared prompts": partial(update, shared),
        }
        measured = harness.measure(
            work(model.config, shared, f"{name} {text}, {alone.tokens} / {shared.tokens} tokens"),
            runs,
            options,
            limits,
            {},
        )
        for row, batch in zip(measured, (alone, shared), strict=True):
            row["tokens"] = batch.tokens
            print(f"{row['provider']}: {batch.tokens} tokens, {row['median']:.2f} s", flush=True)
        rows += measured
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "pack", samples=3)
    parser.add_argument("--model", default="smollm2", help="a directory, or a name that rmr1 knows")
    parser.add_argument("--shapes", nargs="+", default=["1000x128x8"], help="default 1000x128x8")
    parser.add_argument("--sweep", action="store_true", help=f"instead {' '.join(SWEEP)}")
    parser.add_argument("--threads", type=int, help="default: torch's")
    return harness.run(parser, "Shared prompts, one update", measure)


if __name__ == "__main__":
    sys.exit(main())
