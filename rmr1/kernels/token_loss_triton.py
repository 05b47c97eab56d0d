"""A chunk of `token_loss` on a GPU: library GEMMs make its logits in fp32, two streaming kernels
take the statistics of its rows and turn them into gradients in the dtype of the inputs.

Shapes: C rows, R of them with a gradient, H hidden size, V words.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.dispatch import interpreted
from rmr1.kernels.token_logprob_triton import add_product, product, rows_contiguous
from rmr1.kernels.tuning import Case

# Logits of one chunk, fp32. Every chunk reads and writes the whole gradient of the weight, so it
# must have rows enough to hide that behind its GEMMs: 3,500 at V = 152k.
CHUNK_BYTES = 2 * 1024**3
# Words whose part of the weight's gradient is made at once: bounds the copy that is added.
STRIP = 8192
BLOCK = 64 if interpreted() else 4096


@triton.jit
def _stats(
    z, targets, peak, log_sum, logprob, entropy, V, z_stride, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: maximum, log of the sum, log-probability of the target, entropy."""
    row = tl.program_id(0).to(tl.int64)
    at = z + row * z_stride
    column = tl.arange(0, BLOCK)
    m = float("-inf")
    s = 0.0
    d = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(at + start + column, mask=column < V - start, other=float("-inf")) * scale
        higher = tl.maximum(m, tl.max(x, axis=0))
        # Only -inf so far: a difference would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fall = tl.where(m == float("-inf"), 0.0, m - shift)
        x -= shift
        e = tl.exp(x)
        # 0 * -inf would be NaN.
        d = tl.exp(fall) * (d + s * fall) + tl.sum(e * tl.maximum(x, -1e4), axis=0)
        s = s * tl.exp(fall) + tl.sum(e, axis=0)
        m = higher
    wanted = tl.load(at + tl.load(targets + row)) * scale
    log_s = tl.log(s)
    tl.store(peak + row, m)
    tl.store(log_sum + row, log_s)
    tl.store(logprob + row, (wanted - m) - log_s)
    tl.store(entropy + row, log_s - d / s)


@triton.jit
def _gradient(
    z, targets, peak, log_sum, slope, live, out, V, z_stride, out_stride, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d (x w) of BLOCK words of one row that has a gradient, row live[r] of z."""
    blocks = tl.cdiv(V, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.load(live + r)
    words = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + row * z_stride + words, mask=words < V, other=0.0) * scale
    p = tl.exp(x - tl.load(peak + row) - tl.load(log_sum + row))
    hit = tl.where(words == tl.load(targets + row), 1.0, 0.0)
    grad = tl.load(slope + row) * scale * (hit - p)
    tl.store(out + r * out_stride + words, grad.to(out.dtype.element_ty), mask=words < V)


class Chunk:
    """As `token_loss_cpu.Chunk`."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, buffer: Tensor
    ) -> None:
        self.x, self.weight, self.targets = rows_contiguous(hidden), weight, targets
        self.scale = 1.0 / temperature
        self.z = buffer[: len(hidden)]
        if self.x.dtype == torch.float32:
            torch.mm(self.x, weight.T, out=self.z)
        else:
            torch.mm(self.x, weight.T, out_dtype=torch.float32, out=self.z)
        self.peak, self.log_sum, self.logprobs, self.entropy = self.z.new_empty(4, len(hidden))
        _stats[(len(hidden),)](
            self.z, targets, self.peak, self.log_sum, self.logprobs, self.entropy,
            len(weight), self.z.stride(0), self.scale, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip

    def backward(
        self, slope: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
    ) -> None:
        """As `token_loss_cpu.Chunk.backward`."""
        live = slope.nonzero().squeeze(1)  # [R]; NaN counts
        count, words = len(live), len(self.weight)
        if not count:
            return
        # Not in place: a row without a gradient is left out, so the rows move up.
        d = _aligned(count, words, self.x)
        _gradient[(count * triton.cdiv(words, BLOCK),)](
            self.z, self.targets, self.peak, self.log_sum, slope, live, d,
            words, self.z.stride(0), d.stride(0), self.scale, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        if grad_hidden is not None:
            grad_hidden[live] = product(d, self.weight).to(grad_hidden.dtype)
        if grad_weight is not None:
            x = self.x if count == len(self.x) else self.x[live]
            for first in range(0, words, STRIP):
                columns = slice(first, first + STRIP)
                add_product(grad_weight[columns], d[:, columns].T, x)


def buffer(rows: int, weight: Tensor) -> Tensor:
    """Room for the logits of one chunk of at most `rows` rows, fp32 [C, V]."""
    words = max(1, len(weight))
    size = min(max(1, CHUNK_BYTES // (4 * words)), max(1, rows))
    return _aligned(size, words, weight, torch.float32)


def _aligned(rows: int, words: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, words], uninitialised; a row begins at a multiple of 16 elements, so that any
    vocabulary is read 128 bits at a time.
    """
    return like.new_empty(rows, triton.cdiv(words, 16) * 16, dtype=dtype)[:, :words]


_TYPES = {
    **dict.fromkeys(("z", "peak", "log_sum", "logprob", "entropy", "slope"), "*fp32"),
    **dict.fromkeys(("targets", "live"), "*i64"),
    **dict.fromkeys(("V", "z_stride", "out_stride"), "i32"),
    "scale": "fp32",
}


def _case(name: str, kernel, dtype: str) -> Case:
    types = {**_TYPES, "out": f"*{dtype}"}
    names = kernel.arg_names
    vectors = ("z", "out", "V", "z_stride", "out_stride")
    return Case(
        f"token_loss {name}",
        kernel,
        {key: value for key, value in types.items() if key in names},
        {"BLOCK": BLOCK},
        tuple(key for key in vectors if key in names),
        warps=8,
    )


CASES = [
    _case("stats", _stats, "fp32"),
    _case("gradient bf16", _gradient, "bf16"),
    _case("gradient fp32", _gradient, "fp32"),
]
