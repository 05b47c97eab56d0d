"""The policy loss on a GPU, in Triton: one pass over the tokens makes loss, slope and statistics.

A program takes BLOCK tokens, gathers what their sequences share, and writes its own sums, which
torch adds up: no atomics, so the same inputs give the same bits. What a whole sequence decides (its
mean log-ratio, whether it is kept, the mean of its corrections) is made before, by torch, and only
where an option asks for it.

Shapes: T tokens, S sequences, P programs.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case

BLOCK = 1024
# Loss, and the sums of policy_loss.STATS.
_SUMS = 10


@triton.jit
def _held(x, low, high):
    """x within the bounds; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _load(pointers, live, MASKED: tl.constexpr):
    """Whole blocks need no mask, and without one a load takes 128 bits at a time."""
    if MASKED:
        return tl.load(pointers, mask=live, other=0)
    return tl.load(pointers)


@triton.jit
def _kernel(
    logprobs, old, ids, advantages, weights, ref, rollout, sequence_log_ratio, sequence_correction,
    slope, sums, T, first, low, high, dual, beta, correction_low, correction_high,
    SEQUENCE: tl.constexpr, CISPO: tl.constexpr, REF: tl.constexpr, ROLLOUT: tl.constexpr,
    KL: tl.constexpr, CORRECTION: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of tokens; the options that change the formula are constants."""
    LIMIT: tl.constexpr = 20.0
    program = tl.program_id(0) + first
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < T
    logp = _load(logprobs + at, live, MASKED)
    before = _load(old + at, live, MASKED)
    sequence = _load(ids + at, live, MASKED)
    a = _load(advantages + sequence, live, MASKED)
    weight = _load(weights + sequence, live, MASKED)

    d = logp - before
    if SEQUENCE:
        d = _load(sequence_log_ratio + sequence, live, MASKED)
    ratio = tl.exp(_held(d, -LIMIT, LIMIT))
    clipped = _held(ratio, low, high)
    if CISPO:
        gradient = -clipped * a
        loss = gradient * logp
    else:
        free = ratio * a
        bound = clipped * a
        loss = -tl.where(free < bound, free, bound)
        gradient = tl.where(free <= bound, -free, 0.0)
        cap = -dual * a
        capped = (dual > 0) & (a < 0) & (loss > cap)
        gradient = tl.where(capped, 0.0, gradient)
        loss = tl.where(capped, cap, loss)
        gradient = tl.where((d >= -LIMIT) & (d <= LIMIT), gradient, 0.0)

    apart = tl.zeros((BLOCK,), dtype=tl.float32)
    correction = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if ROLLOUT:
        apart = before - _load(rollout + at, live, MASKED)
        w = tl.exp(_held(apart, -LIMIT, LIMIT))
        if CORRECTION == 1:
            correction = tl.where(w > correction_high, correction_high, w)
        elif CORRECTION == 2:
            correction = tl.where((w < correction_low) | (w > correction_high), 0.0, w)
        elif CORRECTION == 3:
            correction = _load(sequence_correction + sequence, live, MASKED)
        loss *= correction
        if SEQUENCE and CORRECTION > 0:
            # The ratio is that of all tokens of the sequence, so each one moves the loss of all.
            gradient *= _load(sequence_correction + sequence, live, MASKED)
        else:
            gradient *= correction

    kl = tl.zeros((BLOCK,), dtype=tl.float32)
    if REF:
        e = _load(ref + at, live, MASKED) - logp
        inside = (e >= -LIMIT) & (e <= LIMIT)
        e = _held(e, -LIMIT, LIMIT)
        if KL == 1:
            kl = -e
            kl_slope = tl.full((BLOCK,), 1.0, dtype=tl.float32)
        elif KL == 2:
            kl = 0.5 * e * e
            kl_slope = -e
        else:
            kl = tl.exp(e) - 1.0 - e
            kl_slope = 1.0 - tl.exp(e)
        loss += beta * kl
        gradient += beta * tl.where(inside, kl_slope, 0.0)

    loss *= weight
    if MASKED:
        tl.store(slope + at, gradient * weight, mask=live)
    else:
        tl.store(slope + at, gradient * weight)
    bad = tl.where((loss - loss) == 0.0, 0.0, 1.0)
    place = sums + program.to(tl.int64) * 10
    tl.store(place, tl.sum(tl.where(live, loss, 0.0)))
    tl.store(place + 1, tl.sum(tl.where(live & (ratio < low) & (a < 0), 1.0, 0.0)))
    tl.store(place + 2, tl.sum(tl.where(live & (ratio > high) & (a > 0), 1.0, 0.0)))
    tl.store(place + 3, tl.sum(tl.where(live, kl, 0.0)))
    tl.store(place + 4, tl.sum(tl.where(live, ratio, 0.0)))
    tl.store(place + 5, tl.max(tl.where(live, ratio, 0.0)))
    tl.store(place + 6, tl.min(tl.where(live, ratio, float("inf"))))
    tl.store(place + 7, tl.sum(tl.where(live, tl.abs(apart), 0.0)))
    tl.store(place + 8, tl.sum(tl.where(live, correction, 0.0)))
    tl.store(place + 9, tl.sum(tl.where(live, bad, 0.0)))


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    ids: Tensor,
    starts: Tensor,
    weights: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, slope [T], and the sums of STATS, fp64 [9].

    `starts` [S + 1] and `settings` are the offsets and the settings of csrc/policy_loss.h.
    """
    sequence, cispo, low, high, dual, beta, kl, correction, least, most = settings
    logprobs, old, ids = logprobs.contiguous(), old.contiguous(), ids.contiguous()
    programs = max(1, triton.cdiv(len(logprobs), BLOCK))
    slope = torch.empty_like(logprobs)
    sums = logprobs.new_zeros(programs, _SUMS)
    unused = logprobs
    mean, of_sequence = unused, unused
    if sequence:
        mean = _means(logprobs - old, starts)
    if rollout is not None and (correction == 3 or (sequence and correction)):
        of_sequence = _corrections(old - rollout, starts, int(correction), least, most)
    whole = len(logprobs) // BLOCK
    for first, count, masked in ((0, whole, False), (whole, programs - whole, True)):
        if not count:
            continue
        _kernel[(count,)](
            logprobs, old, ids, advantages.contiguous(), weights.contiguous(),
            unused if ref is None else ref.contiguous(),
            unused if rollout is None else rollout.contiguous(), mean, of_sequence, slope, sums,
            len(logprobs), first, low, high, dual, beta, least, most,
            SEQUENCE=bool(sequence), CISPO=bool(cispo), REF=ref is not None,
            ROLLOUT=rollout is not None, KL=int(kl), CORRECTION=int(correction), MASKED=masked,
            BLOCK=BLOCK,
        )  # fmt: skip
    total = sums.double().sum(dim=0)
    total[5], total[6] = sums[:, 5].max(), sums[:, 6].min()
    # A copy: an op hands out no part of a larger tensor.
    return total[0].float(), slope, total[1:].clone()


def _corrections(apart: Tensor, starts: Tensor, kind: int, low: float, high: float) -> Tensor:
    """Of each sequence whether it is kept, or else the mean of its tokens' corrections, [S]."""
    if kind == 3:
        w = _means(apart, starts).exp()
        keep = torch.where(w.isnan(), w, 1.0)  # NaN stays, and shows in the loss
        return torch.where((w < low) | (w > high), 0.0, keep)
    w = apart.clamp(-20.0, 20.0).exp()
    w = w.clamp(max=high) if kind == 1 else torch.where((w < low) | (w > high), 0.0, w)
    return _means(w, starts)


def _means(values: Tensor, starts: Tensor) -> Tensor:
    """Mean of the tokens of each sequence, fp32 [S]; without atomics, and no wait for the GPU."""
    return torch.segment_reduce(values, "mean", lengths=starts.diff(), unsafe=True)


def _case(name: str, **constants: Any) -> Case:
    floats = ("logprobs", "old", "advantages", "weights", "ref", "rollout", "slope", "sums")
    types = dict.fromkeys((*floats, "sequence_log_ratio", "sequence_correction"), "*fp32")
    numbers = ("low", "high", "dual", "beta", "correction_low", "correction_high")
    types |= {"ids": "*i64", "T": "i32", "first": "i32", **dict.fromkeys(numbers, "fp32")}
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return Case(f"policy_loss {name}", _kernel, types, constants, aligned)


_PLAIN = {"SEQUENCE": False, "CISPO": False, "KL": 3, "MASKED": False, "BLOCK": BLOCK}
CASES = [
    _case("clip, k3", **{**_PLAIN, "REF": True, "ROLLOUT": True, "CORRECTION": 1}),
    *[
        _case(
            name,
            **{**_PLAIN, "SEQUENCE": True, "REF": False, "ROLLOUT": True, "CORRECTION": correction},
        )
        for name, correction in (("sequence", 3), ("sequence, truncate", 1))
    ],
    _case("cispo", **{**_PLAIN, "CISPO": True, "REF": False, "ROLLOUT": False, "CORRECTION": 0}),
]
