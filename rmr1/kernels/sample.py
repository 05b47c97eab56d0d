"""Sampling: one token a row, by the Gumbel trick with counter-based noise.

    z = (logits - max) / temperature,  p = softmax(z)
    token = argmax over the kept tokens of z + g,   g = -log(-log(1 - w)),  w uniform in (0, 1)

which draws a kept token with its probability among them. Kept is what passes three thresholds, each
on what the one before has left: `top_k` keeps the k largest; `top_p` the smallest set of the
largest whose mass reaches top_p of what is left; `min_p` what is at least min_p times as likely as
the likeliest. Logits equal to the last one that top_k or top_p keeps are kept too (as in Hugging
Face's and vLLM's top-k), so more than k may be left. Exact ties of z + g: the lowest token.

The noise of a token is a hash of its row's key and its number, so a row draws the same whatever
else is in the batch, and on any device but for rounding. A key is mixed first (the finaliser of
SplitMix64), so keys may be mere counters; its halves then enter the first two rounds of the hash.
The uniforms are odd multiples of 2^-32, in fp32 and below 1, so -2.82 < g < 22.19, and a token less
likely than some 1e-9 comes too rarely or never.

Shapes: B rows, V words.
Sources: Gumbel, "Statistical Theory of Extreme Values" (1954), for the trick; Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3" (2011), for counters; Chris Wellons, "Prospecting
for Hash Functions" (nullprogram.com/blog/2018/07/31), for triple32; Steele, Lea, Flood, "Fast
Splittable Pseudorandom Number Generators" (2014), for SplitMix64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels.dispatch import choose

# 1 / temperature stays within these: 0 * inf would be NaN.
INVERSE_MIN, INVERSE_MAX = 1e-30, 1e30
_BITS = 0xFFFFFFFF
_DTYPES = {"keys": torch.int64, "top_k": torch.int32}


class Drawn(NamedTuple):
    """Tokens [B] int64, their log-probabilities [B] fp32 under the full distribution, and under the
    one that the filters left, which they were drawn from.
    """

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor


@torch.no_grad()
def reference(
    logits: Tensor, keys: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Drawn:
    """The op in plain torch."""
    logits = logits.float()
    greedy = temperature == 0
    inverse = (1 / temperature).clamp(INVERSE_MIN, INVERSE_MAX).masked_fill(greedy, 1.0)
    z = (logits - logits.amax(-1, keepdim=True)) * inverse[:, None]  # [B, V]
    kept = _kept(logits, z, top_k, top_p, min_p)
    scores = (z + noise(keys, z.shape[1])).masked_fill(~kept, -torch.inf)
    tokens = torch.where(greedy, logits.argmax(-1), scores.argmax(-1))
    chosen = z.gather(1, tokens[:, None]).squeeze(1)
    full, left = z.logsumexp(-1), z.masked_fill(~kept, -torch.inf).logsumexp(-1)
    bad = full.isnan()  # NaN, +inf, or nothing finite
    return Drawn(
        tokens.masked_fill(bad, -1),
        chosen - full,
        (chosen - left).masked_fill(greedy, 0.0).masked_fill(bad, torch.nan),
    )


def _kept(logits: Tensor, z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What passes the filters: [B, V] bool."""
    words = z.shape[1]
    largest, order = logits.sort(-1, descending=True)
    mass = z.gather(1, order).double().exp()
    last = torch.where(top_k > 0, top_k.clamp(max=words), words)[:, None].long() - 1
    least = largest.gather(1, last)
    mass = mass.masked_fill(largest < least, 0.0)
    # A token stays while those before it have less than top_p of the mass.
    short = mass.cumsum(-1) - mass < top_p[:, None].double() * mass.sum(-1, keepdim=True)
    nucleus = largest.gather(1, short.sum(-1, keepdim=True).clamp(1, words) - 1)
    nucleus = nucleus.masked_fill(top_p[:, None] == 1, -torch.inf)
    return (logits >= least) & (logits >= nucleus) & (z >= min_p.log()[:, None])


def noise(keys: Tensor, words: int) -> Tensor:
    """The Gumbel noise of the first `words` tokens under each key: [B] int64 -> [B, V] fp32."""
    key = keys + (0x9E3779B97F4A7C15 - (1 << 64))  # int64 wraps as uint64 does
    key = (key ^ _shift(key, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    key = (key ^ _shift(key, 27)) * (0x94D049BB133111EB - (1 << 64))
    key = (key ^ _shift(key, 31))[:, None]
    x = torch.arange(words, device=keys.device) ^ (key & _BITS)  # 32-bit numbers in int64
    x = (x ^ (x >> 17)) * 0xED5AD4BB & _BITS ^ _shift(key, 32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51 & _BITS
    x = (x ^ (x >> 15)) * 0x31848BAB & _BITS
    w = ((((x ^ (x >> 14)) >> 1).float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    rest = 1 - w
    # -log(1 - w), exact for small w, where the winners are: what `rest` rounds away is added.
    return -((w - (1 - rest)) - rest.log()).log()


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample(
    logits: Tensor,
    keys: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Drawn:
    """Draw one token a row.

    A row that cannot be drawn from (NaN or +inf among its logits, or nothing finite) gets token -1
    and NaN; -inf alone is fine and never drawn.

    Args:
        logits: [B, V], any floating dtype, rows at any stride; read as fp32, not changed.
        keys: [B] int64, the key of each row's noise: another one for every draw.
        temperature: [B] fp32. At 0 the largest logit is taken (the lowest token of several), the
            filters are ignored, and the log-probabilities are those at temperature 1 and 0.
        top_k: [B] int32; 0 is off.
        top_p: [B] fp32 above 0; 1 is off.
        min_p: [B] fp32 from 0 to 1; 0 is off.

    Returns:
        Tokens and their two log-probabilities, `Drawn`. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; on a CPU also values that
            cannot be meant. A GPU's values are not read, which would make the host wait.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    _check(logits, keys, settings)
    backend = choose("sample", logits, native=logits.dtype == torch.float32)
    if logits.device.type == "cpu":
        _check_values(**settings)
    if backend == "reference":
        return reference(logits, keys, **settings)
    logits = logits.detach()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows = [x.contiguous() for x in (keys, *settings.values())]
    drawn = Drawn(torch.empty_like(rows[0]), torch.empty_like(rows[1]), torch.empty_like(rows[1]))
    if backend == "triton":
        from rmr1.kernels import sample_triton

        sample_triton.sample(logits, rows, drawn)
    else:
        # As numpy's arrays, which cost a third of what tensors do, and a decoding step calls often.
        arguments: list[Any] = [x.numpy() for x in (logits, *rows, *drawn)]
        arguments.append(torch.get_num_threads())
        _C.sample(*arguments)
    return drawn


def _check(logits: Tensor, keys: Tensor, settings: dict[str, Tensor]) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"sample: logits must be floating [B, V] with V above 0, got {logits.dtype} of shape"
            f" {list(logits.shape)}."
        )
    shape, device = logits.shape[:1], logits.device
    for name, one in (("keys", keys), *settings.items()):
        dtype = _DTYPES.get(name, torch.float32)
        if one.shape != shape or one.dtype != dtype or one.device != device:
            raise ValueError(
                f"sample: {name} must be [B] {dtype} beside logits {list(logits.shape)} on"
                f" {device}, got {list(one.shape)} {one.dtype} on {one.device}."
            )


def _check_values(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """In numpy, whose calls on a few numbers cost less than torch's."""
    t, k, p, m = (x.detach().numpy() for x in (temperature, top_k, top_p, min_p))
    good = (t >= 0) & (t < np.inf) & (k >= 0) & (p > 0) & (p <= 1) & (m >= 0) & (m <= 1)
    if good.all():
        return
    row = int(good.argmin())  # the first bad one
    t, k, p, m = (x[row].item() for x in (t, k, p, m))
    for name, value, fine, words in (
        ("temperature", t, 0 <= t < np.inf, "finite and at least 0"),
        ("top_k", k, k >= 0, "at least 0"),
        ("top_p", p, 0 < p <= 1, "above 0 and at most 1"),
        ("min_p", m, 0 <= m <= 1, "between 0 and 1"),
    ):
        if not fine:
            raise ValueError(f"sample: {name} must be {words}, got {value} in row {row}.")
