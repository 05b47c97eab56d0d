"""Sampling on a GPU, in Triton: a row a program, in passes over a row that the L2 cache holds.

One pass for the maximum, one for the sum, one for the draw. A filter looks for its threshold by
bisection, a pass a step, and no row pays for a filter that it has off: with logits in fp32 some 20
passes, in 16 bits about 10, since there the candidates are fewer. Masses are summed in fp32, lane
by lane and then as a tree, so the nucleus may end a token sooner or later where its mass meets
top_p within about 1e-6.

Shapes: B rows, V words.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.dispatch import interpreted
from rmr1.kernels.tuning import Case

BLOCK = 1024 if interpreted() else 8192
WARPS = 16


@triton.jit
def _ordered(x):
    """fp32 -> int64 that are ordered as the floats are."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _from_ordered(image):
    bits = image.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(at, start, V, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < V - start
    return tl.load(at + start + column, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _above(at, least, V, peak, inverse, BLOCK: tl.constexpr):
    """How many logits are at least `least`, and their mass."""
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    mass = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        x = _load(at, start, V, BLOCK)
        kept = x >= least
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp((x - peak) * inverse), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _boundary(
    at, least, target, V, peak, inverse,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest threshold that leaves `target` tokens, or the mass `target`; at least `least`.

    Floats that differ in the last SHIFT bits alone count as one: no logit has such bits.
    """
    low = _ordered(least) >> SHIFT
    high = (_ordered(peak) >> SHIFT) + 1
    under = V
    over = 0
    step = 0
    # One token in between is the last one to be kept; neighbouring floats: all there are ties.
    while (high - low > 1) & (under - over > 1):
        # First what lies 40 below the peak; then halfway; later halfway among the floats, which
        # ends for sure.
        half = 0.5 * _from_ordered(low << SHIFT) + 0.5 * _from_ordered(high << SHIFT)
        guess = tl.where(step == 0, peak - 40.0 / inverse, half)
        near = _ordered(guess) >> SHIFT
        middle = tl.where(step < 16, near, low + (high - low) // 2)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        found, mass = _above(at, _from_ordered(middle << SHIFT), V, peak, inverse, BLOCK)
        enough = (mass if BY_MASS else found) >= target
        low = tl.where(enough, middle, low)
        under = tl.where(enough, found, under)
        high = tl.where(enough, high, middle)
        over = tl.where(enough, over, found)
        step += 1
    return _from_ordered(low << SHIFT)


@triton.jit
def _log(x):
    """log of normal numbers, 2 ulp, as in csrc/simd_log.h: the hardware's is not exact near 1."""
    apart = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (apart >> 23).to(tl.float32)
    f = ((apart & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    y = 7.0376836292e-2 * f - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    square = f * f
    y = y * (f * square) - n * 2.12194440e-4 - 0.5 * square
    return n * 0.693359375 + (f + y)


@triton.jit
def _noise(token, low, high):
    """As `sample.noise`: uint32 tokens and halves of the key -> fp32."""
    x = token ^ low
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) ^ high
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    w = (((x ^ (x >> 14)) >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    w = tl.minimum(w, 0.999999940395355224609375)
    rest = 1.0 - w
    return -_log((w - (1.0 - rest)) - _log(rest))


@triton.jit
def _key(keys, row):
    """The halves of the mixed key."""
    key = tl.load(keys + row).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _draw(at, V, peak, inverse, least, floor, low, high, greedy, BLOCK: tl.constexpr):
    """The kept token of the largest z + noise, and the mass of the kept."""
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    token = tl.full((BLOCK,), 2147483647, dtype=tl.int32)
    mass = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        x = _load(at, start, V, BLOCK)
        z = (x - peak) * inverse
        kept = (x >= least) & (z >= floor)
        column = start + tl.arange(0, BLOCK)
        g = tl.where(greedy, 0.0, _noise(column.to(tl.uint32), low, high))
        score = tl.where(kept, z + g, float("-inf"))
        token = tl.where(score > best, column, token)
        best = tl.maximum(score, best)
        mass += tl.where(kept, tl.exp(z), 0.0)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), token, 2147483647), axis=0)
    return winner, tl.sum(mass, axis=0)


@triton.jit
def _sample(
    logits, keys, temperature, top_k, top_p, min_p, tokens, logprobs, sampled_logprobs, V, stride,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    heat = tl.load(temperature + row)
    greedy = heat == 0.0
    inverse = tl.minimum(tl.maximum(1.0 / tl.where(greedy, 1.0, heat), 1e-30), 1e30)
    peaks = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        peaks = tl.maximum(peaks, _load(at, start, V, BLOCK))
    peak = tl.max(peaks, axis=0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        sums += tl.exp((_load(at, start, V, BLOCK) - peak) * inverse)
    total = tl.sum(sums, axis=0)
    bad = total != total  # NaN, +inf, or nothing finite

    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    m = tl.load(min_p + row)
    drawn = (greedy == 0) & (bad == 0)
    least = -3.4028234663852886e38
    mass = total
    if drawn & (k > 0) & (k < V):
        least = _boundary(at, least, k, V, peak, inverse, False, SHIFT, BLOCK)
        _, mass = _above(at, least, V, peak, inverse, BLOCK)
    if drawn & (p < 1.0):
        least = _boundary(at, least, p * mass, V, peak, inverse, True, SHIFT, BLOCK)
    floor = tl.where((greedy == 0) & (m > 0.0), _log(tl.maximum(m, 1e-37)), float("-inf"))
    low, high = _key(keys, row)
    token, left = _draw(at, V, peak, inverse, least, floor, low, high, greedy, BLOCK)

    token = tl.where(bad, 0, token)
    z = (tl.load(at + token).to(tl.float32) - peak) * inverse
    nan = float("nan")
    tl.store(tokens + row, tl.where(bad, -1, token).to(tl.int64))
    tl.store(logprobs + row, tl.where(bad, nan, z - tl.log(total)))
    tl.store(sampled_logprobs + row, tl.where(bad, nan, tl.where(greedy, 0.0, z - tl.log(left))))


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    sampled_logprobs: Tensor,
) -> None:
    """Write the last three, [B]; logits [B, V] have contiguous rows."""
    rows, words = logits.shape
    if rows:
        _sample[(rows,)](
            logits, keys, temperature, top_k, top_p, min_p, tokens, logprobs, sampled_logprobs,
            words, logits.stride(0), SHIFT=_SHIFTS[logits.dtype], BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


# Bits of fp32 that a number widened from this type leaves empty.
_SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def _case(dtype: str, shift: int) -> Case:
    types = {
        "logits": f"*{dtype}",
        **dict.fromkeys(("temperature", "top_p", "min_p", "logprobs"), "*fp32"),
        **dict.fromkeys(("keys", "tokens"), "*i64"),
        **dict.fromkeys(("V", "stride"), "i32"),
        "top_k": "*i32",
        "sampled_logprobs": "*fp32",
    }
    return Case(
        f"sample {dtype}",
        _sample,
        types,
        {"SHIFT": shift, "BLOCK": BLOCK},
        ("logits", "V", "stride"),
        warps=WARPS,
    )


CASES = [_case("bf16", 16), _case("fp16", 13), _case("fp32", 0)]
