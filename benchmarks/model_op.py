"""What the benchmarks of the model's own ops share: op, torch's ways and Liger's, at a few sizes.

Timed are the forward alone, as in rollouts, and forward with backward, as in training. Shapes: of
SmolLM2-135M on a CPU, of Qwen2.5-7B, which RM-R1 trains, on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import harness
import torch
from check import Function, check
from harness import Limits, Row, Run, Work
from torch import Tensor

# Heads of queries and keys together.
SHAPES = {
    "cpu": {"hidden": 576, "inner": 1536, "heads": 12, "head": 64},
    "cuda": {"hidden": 3584, "inner": 18944, "heads": 32, "head": 128},
}
TOKENS = {"cpu": [32, 1024, 8192], "cuda": [32, 8192, 65536]}


@dataclass(frozen=True, slots=True)
class ModelOp:
    """An op of the model.

    inputs: (tokens, a shape, a dtype) -> tensors on the CPU, of which the first `leaves` get a
        gradient.
    traffic: (tokens, a shape) -> elements that the forward must move, and the backward.
    operations: floating-point operations per element of the output, forward and both.
    liger: inputs -> Liger's function and the inputs it gets; ImportError where it is missing.
    """

    stem: str
    title: str
    op: Function
    reference: Function
    leaves: int
    inputs: Callable[[int, dict[str, int], torch.dtype], list[Tensor]]
    workload: Callable[[int, dict[str, int]], str]
    traffic: Callable[[int, dict[str, int]], tuple[float, float]]
    operations: tuple[float, float]
    liger: Callable[[list[Tensor]], tuple[Function, list[Tensor]]]


def run(op: ModelOp, description: str | None) -> int:
    """The command line of such a benchmark."""
    parser = harness.arguments(description, op.stem, samples=20)
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}")
    return harness.run(parser, op.title, partial(measure, op))


def measure(op: ModelOp, options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check the op at an awkward size, then time it at each size."""
    shape, dtype = SHAPES[options.device], getattr(torch, options.dtype)
    # Sizes that are no multiple of a tile; the head stays, the model has it as it is.
    odd = {**shape, "hidden": 337, "inner": 1025, "heads": 5}
    torch.manual_seed(0)
    small = [x.to(options.device) for x in op.inputs(67, odd, dtype)]
    error = check(op.stem, op.op, op.reference, small, op.leaves)
    tokens = options.tokens or ([17] if options.quick else TOKENS[options.device])
    rows = []
    for count in tokens:
        inputs = [x.to(options.device) for x in op.inputs(count, shape, dtype)]
        ways = _ways(op, inputs, options)
        forward, backward = op.traffic(count, shape)
        size = inputs[0].element_size()
        name = f"{op.workload(count, shape)} {options.dtype}"
        numbers = sum(x.numel() for x in inputs[: op.leaves])
        for back, moved in ((False, forward), (True, forward + backward)):
            work = Work(
                f"{name}, {'forward and backward' if back else 'forward'}",
                op.operations[back] * numbers,
                moved * size,
            )
            runs: dict[str, Run] = {
                "copy of the bytes": harness.copy_of(work.bytes, options.device)
            }
            runs |= {
                provider: timed(function, given, leaves, back)
                for provider, (function, given, leaves) in ways.items()
            }
            errors = {f"rmr1 {op.stem}": error}
            rows += harness.measure(work, runs, options, limits, errors)
    return rows


def _ways(
    op: ModelOp, inputs: list[Tensor], options: argparse.Namespace
) -> dict[str, tuple[Function, list[Tensor], int]]:
    """Provider -> function, its inputs and how many of them get a gradient."""
    found = {
        f"rmr1 {op.stem}": (op.op, inputs, op.leaves),
        "plain torch": (op.reference, inputs, op.leaves),
    }
    if options.compile:
        found["torch.compile"] = (harness.compiled(op.reference), inputs, op.leaves)
    if options.device == "cuda":  # Liger's are Triton kernels
        try:
            # Copies: Liger's kernels overwrite their inputs, in the backward or the forward.
            function, given = op.liger([x.clone() for x in inputs])
            found["Liger"] = (function, given, sum(x.requires_grad for x in given))
        except ImportError:
            pass
    return found


def timed(function: Function, inputs: Sequence[Tensor], leaves: int, back: bool) -> Run:
    """A call with no arguments; with `back` it makes the gradients of the first inputs too."""
    given = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    if not back:
        return torch.no_grad()(lambda: function(*given))
    with torch.no_grad():
        grads = [torch.randn_like(x) for x in function(*given)]

    def both() -> None:
        torch.autograd.grad(function(*given), given[:leaves], grads)

    return both
