"""Attention over packed sequences, with the log-sum-exp that lets several of them be merged.

Segment i is a run of queries with a run of keys: each query sees all keys of its segment or, with
`causal`, those up to its own place (then keys are as many as queries). Nothing is differentiated
here: `rmr1/engine/attention.py` puts segments together and calls `backward`, which takes the output
and the log-sum-exp of the whole softmax, of which a segment's keys may be only a part.

Shapes: Q queries and M keys in all, N query heads, K key/value heads, D head size; in a segment L
queries.
Source: Dao, "FlashAttention-2" (arXiv 2307.08691); merging: Milakov and Gimelshein (1805.02867).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rmr1.kernels import varlen_attention_cpu, varlen_attention_cuda
from rmr1.kernels.dispatch import choose
from rmr1.kernels.segments import Segments

# --- The definition ------------------------------------------------------------------------------


# Queries whose scores are held at a time. This runs on a GPU in fp32, for which flash-attention has
# no kernel: segments of many thousand tokens must fit.
ROWS = 256


def reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The op in plain torch, some queries at a time."""
    outs, totals = [], []
    for queries, keys in segments.tiles(ROWS):
        scores = _scores(q[queries], k[keys], segments.causal)  # [K, N/K, L, M]
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - total[..., None])
        out = torch.einsum("kglm,mkd->lkgd", weights, v[keys].to(weights.dtype))
        outs.append(out.flatten(1, 2).to(q.dtype))
        totals.append(total.permute(2, 0, 1).flatten(1))
    return torch.cat(outs), torch.cat(totals)


def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradient in plain torch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    d_q = torch.empty_like(q)
    d_k, d_v = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    width = k.shape[1], q.shape[1] // k.shape[1]
    for queries, keys in segments.tiles(ROWS):
        scores = _scores(q[queries], k[keys], segments.causal)
        total = lse[queries].unflatten(1, width).permute(1, 2, 0)
        weights = torch.exp(scores - total[..., None])  # [K, G, L, M]
        g = grad[queries].to(wide).unflatten(1, width)  # [L, K, G, D]
        d_v[keys] += torch.einsum("kglm,lkgd->mkd", weights, g)
        own = (g * out[queries].to(wide).unflatten(1, width)).sum(-1).permute(1, 2, 0)
        d_weights = torch.einsum("lkgd,mkd->kglm", g, v[keys].to(wide))
        d_scores = weights * (d_weights - own[..., None]) * q.shape[2] ** -0.5
        d_q[queries] = (
            torch.einsum("kglm,mkd->lkgd", d_scores, k[keys].to(wide)).flatten(1, 2).to(q)
        )
        d_k[keys] += torch.einsum(
            "kglm,lkgd->mkd", d_scores, q[queries].to(wide).unflatten(1, width)
        )
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[L, N, D], [M, K, D] -> [K, N/K, L, M], in fp32 at least; the last query sees all keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1)) * q.shape[2] ** -0.5
    scores = torch.einsum("lkgd,mkd->kglm", grouped, k.to(wide))
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(1 + len(k) - len(q)), -torch.inf)
    return scores


# --- The op --------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Attend: q [Q, N, D], k and v [M, K, D] -> [Q, N, D] and the log-sum-exp of scores, [Q, N].

    Scores are scaled by 1/sqrt(D). The log-sum-exp is natural, in fp32 (fp64 for fp64).

    Raises:
        ValueError: numbers of tokens that are not those of the segments.
    """
    if len(q) != sum(segments.queries) or not len(k) == len(v) == sum(segments.keys):
        raise ValueError(
            f"varlen_attention: these segments have {sum(segments.queries)} queries and"
            f" {sum(segments.keys)} keys, got {len(q)} and {len(k)}: the sum of the lengths must be"
            " the number of tokens."
        )
    library = _library(q)
    if library is None:
        return reference(q, k, v, segments)
    return library.forward(q, k, v, segments)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v that come through these segments.

    `out` and `lse` are those of the whole softmax, over all segments in which a query has keys.
    """
    library = _library(q)
    if library is None:
        return reference_backward(grad, q, k, v, out, lse, segments)
    return library.backward(grad, q, k, v, out, lse, segments)


def _library(q: Tensor) -> ModuleType | None:
    """Torch's own fused kernels for these tensors; None: the reference."""
    if choose("varlen_attention", q, native=True) == "reference":
        return None
    if q.device.type == "cpu":
        return varlen_attention_cpu
    return varlen_attention_cuda if q.dtype in (torch.float16, torch.bfloat16) else None
