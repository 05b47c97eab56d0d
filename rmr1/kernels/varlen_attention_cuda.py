"""The op of `varlen_attention.py` on a GPU in 16 bits, by the flash-attention that torch brings.

Never run: no GPU has been there yet. The tests show the shapes that torch's own shape functions
give, and that it is asked for what its schema says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmr1.kernels.segments import Segments

_attend = torch.ops.aten._flash_attention_forward
_differentiate = torch.ops.aten._flash_attention_backward


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See `varlen_attention.forward`."""
    out, lse, *_ = _attend(q, k, v, *_places(q, segments), 0.0, segments.causal, False)
    return out, lse.T  # [N, Q]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See `varlen_attention.backward`."""
    state = torch.zeros(
        2, dtype=torch.uint64, device=q.device
    )  # of dropout, which there is none of
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    d_q, d_k, d_v = _differentiate(
        grad.contiguous(),
        q,
        k,
        v,
        out,
        lse.T.contiguous(),
        *_places(q, segments),
        0.0,
        segments.causal,
        state,
        unused,
    )
    return d_q, d_k, d_v


def _places(q: Tensor, segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    return *segments.starts(q.device), max(segments.queries), max(segments.keys)
