"""The fused log-probability, forward and backward, against three bare GEMMs and against peers.

    python benchmarks/bench_token_logprob.py [--tokens 1024 4096] [--device cuda --dtype bfloat16]

Providers: three GEMMs of the same shapes (the least any implementation must do), the op and the
callback form of rmr1, naive torch, torch's linear_cross_entropy plain and chunked, and Liger's
fused linear cross-entropy where it is installed and a GPU is there. All get the same inputs and
give the gradient of the mean negative log-likelihood. Peak memory does not count the gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, peak_bytes, row, save, show
from torch import Tensor
from torch.nn import functional as F

from rmr1.kernels.token_logprob import token_logprobs
from rmr1.kernels.token_loss import token_loss

GEMMS = "three bare GEMMs"


def providers(x: Tensor, w: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """Every way to the gradients of x [T, H] and w [V, H]."""
    count = len(y)

    def gemms() -> None:
        # A slice of rows at a time: the whole [T, V] would measure the memory and not the GEMM.
        for start in range(0, count, 512):
            part = x.detach()[start : start + 512]
            z = part @ w.detach().T
            z @ w.detach()
            z.T @ part

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, (x, w))

    def naive() -> None:
        z = (x @ w.T).float()
        backward(-z.log_softmax(dim=1).gather(1, y[:, None]).mean())

    found: dict[str, Callable[[], object]] = {
        GEMMS: gemms,
        "rmr1 token_logprobs": lambda: backward(-token_logprobs(x, w, y).mean()),
        "rmr1 token_loss": lambda: backward(
            token_loss(x, w, y, lambda logprobs, _rows: -logprobs.sum() / count)[0]
        ),
        "naive torch": naive,
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda: backward(F.linear_cross_entropy(x, w, y))
        found["torch linear_cross_entropy, chunked"] = lambda: backward(
            F.linear_cross_entropy(x, w, y, options=options)
        )
    liger = _liger() if x.device.type == "cuda" else None
    if liger is not None:
        found["Liger fused linear cross-entropy"] = lambda: backward(liger(w, x, y))
    return found


def _liger() -> Any:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss()


def measure(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size."""
    torch.manual_seed(0)
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    x = torch.randn(tokens, options.hidden, **kind).requires_grad_()
    w = (torch.randn(options.vocabulary, options.hidden, **kind) * 0.02).requires_grad_()
    y = torch.randint(0, options.vocabulary, (tokens,), device=options.device)
    runs = providers(x, w, y)
    logits = 4 * tokens * options.vocabulary
    if 3 * logits > options.most_gb * 1e9:
        runs = {name: run for name, run in runs.items() if "naive" not in name}
        runs.pop("torch linear_cross_entropy", None)
    seconds = in_turn(runs, options.samples, options.device)
    gradients = (x.numel() + w.numel()) * x.element_size()
    bare = sorted(seconds[GEMMS])[options.samples // 2]
    flops = 6.0 * tokens * options.hidden * options.vocabulary
    found = []
    for name, run in runs.items():
        one = row(
            f"T={tokens} H={options.hidden} V={options.vocabulary} {options.dtype}",
            name,
            seconds[name],
            options.device,
            peak_memory_mb=max(0, peak_bytes(run, options.device) - gradients) / 2**20,
        )
        # Pair by pair: a slow moment of the machine meets neighbours alike.
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds[GEMMS], strict=True))
        one |= {"gflops": flops / bare / 1e9, "x_gemms": ratios[len(ratios) // 2]}
        found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--hidden", type=int, default=576, help="of SmolLM2-135M")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--most_gb", type=float, default=6.0, help="skip naive ways beyond this")
    parser.add_argument("--output", type=Path, default=Path("results/bench_token_logprob.json"))
    options = parser.parse_args()
    rows = [one for tokens in options.tokens for one in measure(tokens, options)]
    show(
        f"Log-probability, forward and backward, {rows[0]['device']}, {rows[0]['threads']} threads",
        rows,
        {
            "workload": lambda one: one["workload"],
            "provider": lambda one: one["provider"],
            "seconds": lambda one: f"{one['median']:.3f}",
            "x GEMMs": lambda one: f"{one['x_gemms']:.2f}",
            "extra MB": lambda one: f"{one['peak_memory_mb']:.0f}",
        },
    )
    save(rows, options.output)


if __name__ == "__main__":
    main()
