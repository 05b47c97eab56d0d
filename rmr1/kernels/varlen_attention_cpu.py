"""The op of `varlen_attention.py` on a CPU, by torch's fused attention.

That wants rectangles and as many key heads as query heads, and hands out the log-sum-exp only below
`scaled_dot_product_attention`, which is why its inner ops are called.

Shapes: B sequences of L tokens, N query heads, K key/value heads, G = N/K, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rmr1.kernels.segments import Segments

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See `varlen_attention.forward`."""
    if not segments.causal:
        return _joined([_alone(q[rows], k[keys], v[keys], False) for rows, keys in segments.runs()])
    found = []
    for (batch, _), cells in _rectangles(segments, q, k, v):
        if batch == 1:
            found.append(_alone(cells[0], cells[1], cells[2], True))
            continue
        wide = _widened(cells, batch, q.shape[1])
        got, total = _attend(*wide, 0.0, True)
        found.append((_flat(got), _flat(total)))
    out, lse = (segments.buckets.take(cells) for cells in _joined(found))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See `varlen_attention.backward`."""
    if not segments.causal:
        alone = [
            _alone_backward(
                grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], causal=False
            )
            for rows, keys in segments.runs()
        ]
        return _joined(alone)
    found = []
    for (batch, _), cells in _rectangles(segments, grad, q, k, v, out, lse):
        if batch == 1:
            found.append(_alone_backward(*cells, causal=True))
            continue
        wide = _widened(cells, batch, q.shape[1])
        d_q, d_k, d_v = (_flat(x) for x in _differentiate(*wide, 0.0, True))
        groups = q.shape[1] // k.shape[1]
        found.append((d_q, *(x.unflatten(1, (-1, groups)).sum(2) for x in (d_k, d_v))))
    d_q, d_k, d_v = (segments.buckets.take(cells) for cells in _joined(found))
    return d_q, d_k, d_v


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> Any:
    """Results of several calls, one after the other."""
    return tuple(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))


def _rectangles(
    segments: Segments, *tensors: Tensor
) -> Iterator[tuple[tuple[int, int], tuple[Tensor, ...]]]:
    """Of each bucket its B and L, and its cells of these tensors: [B*L, ...]."""
    buckets = segments.buckets
    sizes = [batch * longest for batch, longest in buckets.shapes]
    cells = zip(*(buckets.lay(x).split(sizes) for x in tensors), strict=True)
    return zip(buckets.shapes, cells, strict=True)


def _widened(cells: tuple[Tensor, ...], batch: int, heads: int) -> list[Tensor]:
    """[B*L, H, ...] -> [B, N, L, ...] each; where there are fewer heads they are repeated."""
    return [
        x.repeat_interleave(heads // x.shape[1], dim=1).unflatten(0, (batch, -1)).transpose(1, 2)
        if x.shape[1] < heads
        else x.unflatten(0, (batch, -1)).transpose(1, 2)
        for x in cells
    ]


def _flat(x: Tensor) -> Tensor:
    """[B, N, L, ...] -> [B*L, N, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _alone(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One segment. The heads that share a key stand in the batch, so that no key is copied."""
    groups = q.shape[1] // k.shape[1]
    out, lse = _attend(_by_group(q, groups), *_shared(k, v, groups), 0.0, causal)
    return _ungroup(out), _ungroup(lse)


def _alone_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    d_q, d_k, d_v = _differentiate(
        _by_group(grad, groups),
        _by_group(q, groups),
        *_shared(k, v, groups),
        _by_group(out, groups),
        _by_group(lse, groups),
        0.0,
        causal,
    )
    return _ungroup(d_q), d_k.sum(0).transpose(0, 1), d_v.sum(0).transpose(0, 1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[L, N, ...] -> [G, K, L, ...], a view."""
    return x.unflatten(1, (-1, groups)).movedim(2, 0).transpose(1, 2)


def _ungroup(x: Tensor) -> Tensor:
    """[G, K, L, ...] -> [L, N, ...]."""
    return x.transpose(1, 2).movedim(0, 2).flatten(1, 2)


def _shared(k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """[M, K, D] -> [G, K, M, D], views."""
    first, second = (x.transpose(0, 1).expand(groups, -1, -1, -1) for x in (k, v))
    return first, second
