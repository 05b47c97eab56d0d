"""Sampling on a GPU, in Triton: a row a program, in passes over a row that the L2 cache holds.

One pass for the maximum, one for the sum, one for the draw. A filter looks for its threshold by
bisection, a pass a step, and no row pays for a filter that it has off: 10 to 20 passes with logits
in fp32, about 10 in 16 bits, which take fewer values. Masses are summed in fp32, lane by lane and
then as a tree, so the nucleus may end a token sooner or later where its mass meets top_p within
about 1e-6.

Shapes: B rows, V words.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

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
    """How many logits are at least `least`, their mass, the smallest of them, the largest other."""
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    mass = tl.zeros((BLOCK,), dtype=tl.float32)
    smallest = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        x = _load(at, start, V, BLOCK)
        kept = x >= least
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp((x - peak) * inverse), 0.0)
        smallest = tl.minimum(smallest, tl.where(kept, x, float("inf")))
        largest = tl.maximum(largest, tl.where(kept, float("-inf"), x))
    return (
        tl.sum(count, axis=0),
        tl.sum(mass, axis=0),
        tl.min(smallest, axis=0),
        tl.max(largest, axis=0),
    )


@triton.jit
def _boundary(
    at, least, target, V, peak, inverse, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest threshold that leaves `target` tokens, or the mass `target`; at least `least`.

    By bisection. Its ends are moved to the nearest logits, so ties, and numbers that were bf16,
    take no more steps than there are different values.
    """
    low = _ordered(least)
    high = _ordered(peak) + 1  # leaves too little
    step = 0
    while high - low > 1:
        # First what lies 40 below the peak; then halfway; later halfway among the floats, which
        # ends for sure.
        half = 0.5 * _from_ordered(low) + 0.5 * _from_ordered(high)
        guess = _ordered(tl.where(step == 0, peak - 40.0 / inverse, half))
        middle = tl.where(step < 16, guess, low + (high - low) // 2)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        count, mass, above, below = _above(at, _from_ordered(middle), V, peak, inverse, BLOCK)
        enough = (mass if BY_MASS else count) >= target
        # Not past the middle, which -0 would be, being no less than 0.
        low = tl.where(enough, tl.maximum(_ordered(above), middle), low)
        high = tl.where(enough, high, tl.minimum(_ordered(below) + 1, middle))
        step += 1
    return _from_ordered(low)


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
    BLOCK: tl.constexpr,
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
        least = _boundary(at, least, k, V, peak, inverse, False, BLOCK)
        _, mass, _, _ = _above(at, least, V, peak, inverse, BLOCK)
    if drawn & (p < 1.0):
        least = _boundary(at, least, p * mass, V, peak, inverse, True, BLOCK)
    # The largest logit is kept whatever the settings are: nobody has checked them.
    least = tl.minimum(least, peak)
    floor = tl.minimum(_log(tl.maximum(m, 1e-37)), 0.0)
    floor = tl.where((greedy == 0) & (m > 0.0), floor, float("-inf"))
    low, high = _key(keys, row)
    token, left = _draw(at, V, peak, inverse, least, floor, low, high, greedy, BLOCK)

    token = tl.where(bad, 0, token)
    z = (tl.load(at + token).to(tl.float32) - peak) * inverse
    nan = float("nan")
    tl.store(tokens + row, tl.where(bad, -1, token).to(tl.int64))
    tl.store(logprobs + row, tl.where(bad, nan, z - tl.log(total)))
    tl.store(sampled_logprobs + row, tl.where(bad, nan, tl.where(greedy, 0.0, z - tl.log(left))))


def sample(logits: Tensor, rows: list[Tensor], drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write tokens and log-probabilities, `drawn`; logits [B, V] have contiguous rows.

    rows: keys, temperature, top_k, top_p and min_p, [B] each.
    """
    count, words = logits.shape
    if count:
        _sample[(count,)](
            logits, *rows, *drawn, words, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS
        )


def _case(dtype: str) -> Case:
    types = {
        "logits": f"*{dtype}",
        **dict.fromkeys(("temperature", "top_p", "min_p"), "*fp32"),
        **dict.fromkeys(("logprobs", "sampled_logprobs"), "*fp32"),
        **dict.fromkeys(("keys", "tokens"), "*i64"),
        **dict.fromkeys(("V", "stride"), "i32"),
        "top_k": "*i32",
    }
    aligned = ("logits", "V", "stride")
    return Case(f"sample {dtype}", _sample, types, {"BLOCK": BLOCK}, aligned, warps=WARPS)


CASES = [_case(dtype) for dtype in ("bf16", "fp16", "fp32")]
