"""The fused log-probability, forward and backward, against three bare GEMMs and against peers.

    python benchmarks/bench_token_logprob.py [--tokens 1024 4096] [--device cuda --dtype bfloat16]

Providers: three GEMMs of the same shapes (the least any implementation must do), the op and the
callback form of rmr1, naive torch (compiled too on a GPU), torch's linear_cross_entropy plain and
chunked, and where liger-kernel is installed its chunked GRPO loss and, on a GPU, its fused linear
cross-entropy. All get the same inputs and give the gradient of the mean negative log-likelihood.
Peak memory does not count the gradients. Shapes: of SmolLM2-135M on a CPU, of Qwen2.5-7B on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import harness
import torch
from check import check
from harness import Limits, Row, Run, Work
from torch import Tensor
from torch.nn import functional as F

from rmr1.kernels.token_logprob import reference, token_logprobs
from rmr1.kernels.token_loss import token_loss

SHAPES = {"cpu": (576, 49152), "cuda": (3584, 152064)}
TOKENS = {"cpu": [256, 1024, 4096, 16384], "cuda": [1024, 4096, 16384]}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def op_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return -token_logprobs(x, w, y).mean()


def callback_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return token_loss(x, w, y, lambda logprobs, _rows: -logprobs.sum() / len(y))[0]


def naive_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What is written in plain torch: the logits [T, V] in the dtype of the model."""
    return -(x @ w.T).float().log_softmax(dim=1).gather(1, y[:, None]).mean()


def gemms(x: Tensor, w: Tensor) -> None:
    # A slice of rows at a time: the whole [T, V] would measure the memory and not the GEMM.
    slices = 512 if x.device.type == "cpu" else 4096
    for start in range(0, len(x), slices):
        part = x[start : start + slices]
        z = part @ w.T
        z @ w
        z.T @ part


def losses(options: argparse.Namespace) -> dict[str, Loss]:
    """Every way to the mean negative log-likelihood."""
    found: dict[str, Loss] = {
        "rmr1 token_logprobs": op_loss,
        "rmr1 token_loss": callback_loss,
        "naive torch": naive_loss,
    }
    if options.compile:
        found["torch.compile"] = harness.compiled(naive_loss)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        chunked = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = F.linear_cross_entropy
        found["torch linear_cross_entropy, chunked"] = lambda x, w, y: F.linear_cross_entropy(
            x, w, y, options=chunked
        )
    return found | _liger(options.device)


def _liger(device: str) -> dict[str, Loss]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return {}
    # Without old log-probabilities and with advantages of 1 its gradient is that of the mean
    # log-probability ("bnpo" divides by all tokens). It is torch code in chunks, so a CPU runs it;
    # what it would compile is the arithmetic on [T] only.
    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=device == "cuda", use_ref_model=False, loss_type="bnpo"
    )

    def chunked(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        ones = torch.ones(1, len(y), device=x.device)
        return grpo(x[None], w, y[None], ones, ones[:, 0])[0]

    found: dict[str, Loss] = {"Liger chunked GRPO loss": chunked}
    if device == "cuda":  # a Triton kernel
        fused = LigerFusedLinearCrossEntropyLoss()
        found["Liger fused linear cross-entropy"] = lambda x, w, y: fused(w, x, y)
    return found


def case(tokens: int, hidden: int, words: int, options: argparse.Namespace) -> list[Tensor]:
    """x [T, H], w [V, H], y [T]."""
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    x, w = torch.randn(tokens, hidden, **kind), torch.randn(words, hidden, **kind) * 0.02
    return [x, w, torch.randint(0, words, (tokens,), device=options.device)]


def errors_of(options: argparse.Namespace) -> dict[str, float]:
    """Both forms at a size where no tile is full, the op with its entropy."""
    inputs = case(67, 136, 1061, options)

    def naive(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logs = (x @ w.T).float().log_softmax(dim=1)
        return logs.gather(1, y[:, None]).squeeze(1), -(logs.exp() * logs).sum(dim=1)

    return {
        "rmr1 token_logprobs": check(
            "token_logprobs",
            lambda x, w, y: token_logprobs(x, w, y, return_entropy=True),
            reference,
            inputs,
            2,
            torchs=naive,
        ),
        "rmr1 token_loss": check(
            "token_loss",
            lambda x, w, y: (callback_loss(x, w, y),),
            lambda x, w, y: (-reference(x, w, y)[0].mean(),),
            inputs,
            2,
            torchs=lambda x, w, y: (naive_loss(x, w, y),),
        ),
    }


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check, then the rows of each size."""
    torch.manual_seed(0)
    errors = errors_of(options)
    hidden, words = SHAPES[options.device]
    hidden, words = options.hidden or hidden, options.vocabulary or words
    if options.quick:
        hidden, words = 64, 1000
    most = 1e9 * (options.most_gb or (60 if options.device == "cuda" else 6))
    rows = []
    for tokens in options.tokens or ([96] if options.quick else TOKENS[options.device]):
        x, w, y = case(tokens, hidden, words, options)
        runs: dict[str, Run] = {"three bare GEMMs": lambda x=x, w=w: gemms(x, w)}
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        ways = losses(options)
        if 12 * tokens * words > most:  # logits, their softmax and its gradient
            for name in ("naive torch", "torch.compile", "torch linear_cross_entropy"):
                ways.pop(name, None)
        for name, loss in ways.items():
            runs[name] = lambda loss=loss, x=x, w=w, y=y: torch.autograd.grad(loss(x, w, y), (x, w))
        size = x.element_size()
        work = Work(
            f"T={tokens} H={hidden} V={words} {options.dtype}",
            # Logits, gradient of x, gradient of w: a GEMM each, two operations per product.
            6.0 * tokens * hidden * words,
            # x and w in, their gradients out, and the targets.
            2.0 * size * (tokens + words) * hidden + 8 * tokens,
        )
        results = (x.numel() + w.numel()) * size
        rows += harness.measure(work, runs, options, limits, errors, results=results)
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "token_logprob", samples=5)
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}")
    parser.add_argument("--hidden", type=int, help="default: of the model")
    parser.add_argument("--vocabulary", type=int, help="default: of the model")
    parser.add_argument(
        "--most_gb", type=float, help="skip naive ways beyond this (default 6, on a GPU 60)"
    )
    return harness.run(parser, "Log-probability, forward and backward", measure)


if __name__ == "__main__":
    sys.exit(main())
