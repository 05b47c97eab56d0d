"""The fused log-probability on a GPU, in Triton.

Forward: a program takes BLOCK_T rows and walks over a share of the vocabulary, tile by tile, with
an online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867). Programs with the same share
stand next to each other in the grid, so its part of the weight is read from memory once and then
from the second-level cache. The few partial results of a row are merged by torch.

Backward: a strip of the vocabulary at a time. One kernel makes the strip's logits again and writes
their gradient [R, strip] in the dtype of the inputs; two library GEMMs turn that into the strip of
the weight's gradient, written once, and into the hidden states' gradient, summed in fp32. No
atomics: the result does not depend on the order in which programs run.

Shapes: T tokens, R of them with a gradient, H hidden size, V words, S shares of the vocabulary.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case, configs

# What autotuning may choose from: no target that the compile gate knows spills with these
# (128 x 256 does, everywhere). The interpreter takes small tiles, so that a test has several.
_INTERPRETED = {"BLOCK_T": 32, "BLOCK_V": 64, "BLOCK_H": 32}
WIDE = configs(
    {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 32, "num_warps": 8, "num_stages": 4},
    {"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_H": 64, "num_warps": 4, "num_stages": 3},
    interpreted=_INTERPRETED,
)
# For fp32, which is multiplied exactly and therefore not by tensor cores, and for a hidden size
# that is no multiple of 64, whose loads need masks: both take more registers.
NARROW = configs(
    {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
    interpreted=_INTERPRETED,
)
# A share of the vocabulary is a multiple of this, so that no tile lies across two.
SHARE = 512
# Logits of one strip in the backward: bounds the memory, and wide enough for full-speed GEMMs.
STRIP_BYTES = 256 * 1024**2


@triton.jit
def _logits(
    x, w, first_row, first_word, T, V, H, x_stride, w_stride, scale,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """A tile of logits [BLOCK_T, BLOCK_V] in fp32; rows past T and words past V hold copies of
    the last one (an address in range costs no registers for a mask).

    The tile's corner is a 64-bit address, since rows * H passes 2^31 within one large batch;
    within a tile 32 bits are enough.
    """
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_T), T - 1) - first_row
    words = tl.minimum(first_word + tl.arange(0, BLOCK_V), V - 1) - first_word
    column = tl.arange(0, BLOCK_H)
    a_at = x + tl.cast(first_row, tl.int64) * x_stride + rows[:, None] * x_stride + column[None, :]
    b_at = (
        w + tl.cast(first_word, tl.int64) * w_stride + words[None, :] * w_stride + column[:, None]
    )
    tile = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(column < H - start)[None, :], other=0.0)
            b = tl.load(b_at, mask=(column < H - start)[:, None], other=0.0)
        tile = tl.dot(a, b, tile, input_precision="ieee")
        a_at += BLOCK_H
        b_at += BLOCK_H
    return tile * scale


@triton.jit
def _forward(
    x, w, targets, peak, total, dot, target,
    T, V, H, x_stride, w_stride, share, scale,
    WITH_ENTROPY: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_T rows over one share of the vocabulary, into [S, T] each."""
    row_blocks = tl.cdiv(T, BLOCK_T)
    part = tl.program_id(0) // row_blocks
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_T
    rows = first_row + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    wanted = tl.load(targets + rows, mask=row_mask, other=-1)
    # Not 0: logits may all be far below it.
    m = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_T,), dtype=tl.float32)
    d = tl.zeros((BLOCK_T,), dtype=tl.float32)
    hit = tl.zeros((BLOCK_T,), dtype=tl.float32)
    first = part * share
    for start in range(first, tl.minimum(first + share, V), BLOCK_V):
        words = start + tl.arange(0, BLOCK_V)
        z = _logits(
            x, w, first_row, start, T, V, H, x_stride, w_stride, scale,
            BLOCK_T, BLOCK_V, BLOCK_H, EVEN_H,
        )  # fmt: skip
        hit += tl.sum(tl.where(words[None, :] == wanted[:, None], z, 0.0), axis=1)
        higher = tl.maximum(m, tl.max(z, axis=1))  # of copies too, which change no maximum
        fall = tl.where(m == float("-inf"), 0.0, m - higher)  # nothing yet: s and d are 0
        shrink = tl.exp(fall)
        z -= higher[:, None]
        # A vocabulary that is no multiple of the tile: what is past it must not count.
        e = tl.where((words < V)[None, :], tl.exp(z), 0.0)
        if WITH_ENTROPY:
            d = shrink * (d + s * fall) + tl.sum(e * z, axis=1)
        s = s * shrink + tl.sum(e, axis=1)
        m = higher
    place = part.to(tl.int64) * T + rows
    tl.store(peak + place, m, mask=row_mask)
    tl.store(total + place, s, mask=row_mask)
    tl.store(target + place, hit, mask=row_mask)
    if WITH_ENTROPY:
        tl.store(dot + place, d, mask=row_mask)


@triton.jit
def _gradient(
    x, w, targets, peak, log_sum, entropy, on_logprob, on_entropy, out,
    R, V, H, x_stride, w_stride, out_stride, first, scale,
    WITH_ENTROPY: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of one tile of the strip that begins at word `first`, into out [R, strip].

    V is the end of the strip.
    """
    row_blocks = tl.cdiv(R, BLOCK_T)
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_T
    start = first + (tl.program_id(0) // row_blocks) * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_T)
    words = start + tl.arange(0, BLOCK_V)
    row_mask, word_mask = rows < R, words < V
    z = _logits(
        x, w, first_row, start, R, V, H, x_stride, w_stride, scale,
        BLOCK_T, BLOCK_V, BLOCK_H, EVEN_H,
    )  # fmt: skip
    wanted = tl.load(targets + rows, mask=row_mask, other=-1)
    m = tl.load(peak + rows, mask=row_mask, other=0.0)
    log_s = tl.load(log_sum + rows, mask=row_mask, other=0.0)
    slope = tl.load(on_logprob + rows, mask=row_mask, other=0.0)
    logp = z - m[:, None] - log_s[:, None]
    p = tl.exp(logp)
    grad = slope[:, None] * (tl.where(words[None, :] == wanted[:, None], 1.0, 0.0) - p)
    if WITH_ENTROPY:
        h = tl.load(entropy + rows, mask=row_mask, other=0.0)
        on_h = tl.load(on_entropy + rows, mask=row_mask, other=0.0)
        grad -= on_h[:, None] * p * (logp + h[:, None])
    place = rows.to(tl.int64)[:, None] * out_stride + (words - first)[None, :]
    tl.store(
        out + place, grad.to(out.dtype.element_ty), mask=row_mask[:, None] & word_mask[None, :]
    )


# By whether the wide tiles do.
FORWARD = {
    wide: triton.autotune(choice, key=["V", "H", "WITH_ENTROPY"])(_forward)
    for wide, choice in ((True, WIDE), (False, NARROW))
}
GRADIENT = {
    wide: triton.autotune(choice, key=["H", "WITH_ENTROPY"])(_gradient)
    for wide, choice in ((True, WIDE), (False, NARROW))
}


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy (empty unless wanted), peak and log_sum, fp32 [T] each."""
    hidden, weight = rows_contiguous(hidden), rows_contiguous(weight)
    (count, width), words = hidden.shape, weight.shape[0]
    shares, share = vocabulary_shares(count, words, hidden.device)
    peak, total, dot, target = hidden.new_zeros(4, shares, count, dtype=torch.float32)
    if count:
        even = width % 64 == 0
        FORWARD[even and hidden.dtype != torch.float32][
            lambda meta: (triton.cdiv(count, meta["BLOCK_T"]) * shares,)
        ](
            hidden, weight, targets, peak, total, dot, target,
            count, words, width, hidden.stride(0), weight.stride(0), share, 1.0 / temperature,
            WITH_ENTROPY=with_entropy, EVEN_H=even,
        )  # fmt: skip
    return merge(peak, total, dot, target, with_entropy)


def merge(
    peak: Tensor, total: Tensor, dot: Tensor, target: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics of whole rows from those of their shares, [S, T] each."""
    top = peak.amax(dim=0)  # [T]
    fall = peak - top
    shrink = fall.exp()
    whole = (total * shrink).sum(dim=0)
    log_sum = whole.log()
    entropy = top.new_empty(0)
    if with_entropy:
        entropy = log_sum - (shrink * (dot + total * fall)).sum(dim=0) / whole
    return (target.sum(dim=0) - top) - log_sum, entropy, top, log_sum


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    live: Tensor,
    *,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """As `token_logprob_cpu.backward`."""
    every = len(live) == len(hidden)  # then nothing is copied
    x, weight = rows_contiguous(hidden if every else hidden[live]), rows_contiguous(weight)
    peak, log_sum = (value[live] for value in saved[:2])
    on_logprob, on_entropy = (None if grad is None else grad[live].float() for grad in grads)
    if on_logprob is None:
        on_logprob = torch.zeros_like(peak)
    with_entropy = on_entropy is not None
    entropy = saved[2][live] if with_entropy else peak
    count, words = len(live), weight.shape[0]
    grad_x = torch.zeros_like(x, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    strip = strip_width(count, words, x.element_size())
    buffer = x.new_empty(count, min(strip, words))
    wanted = targets[live]
    even = x.shape[1] % 64 == 0
    kernel = GRADIENT[even and x.dtype != torch.float32]
    for first in range(0, words if count else 0, strip):
        last = min(first + strip, words)
        d = buffer[:, : last - first]
        kernel[
            lambda meta, width=last - first: (
                triton.cdiv(count, meta["BLOCK_T"]) * triton.cdiv(width, meta["BLOCK_V"]),
            )
        ](
            x, weight, wanted, peak, log_sum, entropy, on_logprob,
            on_entropy if on_entropy is not None else peak, d,
            count, last, x.shape[1], x.stride(0), weight.stride(0), d.stride(0), first,
            1.0 / temperature, WITH_ENTROPY=with_entropy, EVEN_H=even,
        )  # fmt: skip
        if need_hidden:
            add_product(grad_x, d, weight[first:last])
        if need_weight:
            # z = x w / temperature: one factor of the chain rule for both.
            grad_weight[first:last] = product(d.T, x).div_(temperature)
    grad_hidden = hidden.new_empty(0)
    if need_hidden:
        grad_x = grad_x.div_(temperature).to(hidden.dtype)
        grad_hidden = grad_x
        if not every:
            grad_hidden = hidden.new_zeros(hidden.shape).index_copy_(0, live, grad_x)
    return grad_hidden, grad_weight


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, whatever the dtype of the factors."""
    options: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(a, b, **options)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a b, with `into` in fp32."""
    if a.dtype == torch.float32:
        into.addmm_(a, b)
    else:
        into += product(a, b)


def rows_contiguous(x: Tensor) -> Tensor:
    """x with adjacent columns."""
    return x if x.stride(-1) == 1 else x.contiguous()


def vocabulary_shares(rows: int, words: int, device: torch.device) -> tuple[int, int]:
    """Into how many shares the vocabulary is cut, and how many words a share has: so many that
    every multiprocessor has a few programs to run.
    """
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    shares = max(1, triton.cdiv(4 * processors, max(1, triton.cdiv(rows, 128))))
    share = triton.cdiv(triton.cdiv(words, shares), SHARE) * SHARE
    return triton.cdiv(words, share), share


def strip_width(rows: int, words: int, element_size: int) -> int:
    """Words of a strip in the backward: a multiple of 512 within STRIP_BYTES, at least 512."""
    fitting = STRIP_BYTES // max(1, rows * element_size)
    return min(max(fitting // 512 * 512, 512), triton.cdiv(words, 512) * 512)


_VECTORS = dict.fromkeys(("peak", "total", "dot", "target", "log_sum", "entropy"), "*fp32")
_NUMBERS = dict.fromkeys(("T", "R", "V", "H", "x_stride", "w_stride", "out_stride", "share"), "i32")
_GRADS = {"on_logprob": "*fp32", "on_entropy": "*fp32", "first": "i32", "scale": "fp32"}
_ALIGNED = ("x", "w", "targets", "H", "x_stride", "w_stride")


def _case(kernel: Any, name: str, dtype: str, outputs: tuple[str, ...], even: bool) -> Case:
    types = {**_VECTORS, **_NUMBERS, **_GRADS, "targets": "*i64"}
    types |= dict.fromkeys(("x", "w", "out"), f"*{dtype}")
    names = kernel.fn.arg_names
    return Case(
        f"token_logprob {name} {dtype}{'' if even else ' odd H'}",
        kernel,
        {key: value for key, value in types.items() if key in names},
        {"WITH_ENTROPY": True, "EVEN_H": even},
        tuple(key for key in (*_ALIGNED, *outputs) if key in names and (even or key in "xw")),
        matmul=dtype != "fp32",
        streams=even,
    )


CASES = [
    _case(kernels[even and dtype != "fp32"], name, dtype, outputs, even)
    for dtype, even in (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", True))
    for kernels, name, outputs in (
        (FORWARD, "forward", ("peak", "total", "dot", "target")),
        (GRADIENT, "gradient", ("out", "out_stride", "first")),
    )
]
