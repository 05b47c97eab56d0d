"""Attention of training and scoring, with its gradient, as a model calls it.

Who sees whom is in a `Layout`; what is computed, and by which kernel, in
`rmr1/kernels/packed_attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmr1.engine.packing import Group
from rmr1.kernels import packed_attention
from rmr1.kernels.packed_attention import Layout


class PackedAttention:
    """The `Attend` of training and scoring: sequences lie one after the other in [T, N, D].

    Build one per packed batch: its indices are made once and serve all layers.

    Args:
        lengths: token counts of sequences that share nothing, in order.

    Raises:
        ValueError: an empty sequence, or (when called) a T that is not the sum of `lengths`.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._layout = Layout([(int(length), ()) for length in lengths])

    @classmethod
    def of_groups(cls, groups: Sequence[Group]) -> PackedAttention:
        """For the tokens of a `Batch`."""
        made = cls.__new__(cls)
        made._layout = Layout([(group.prompt, group.responses) for group in groups])
        return made

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, N, D], k and v [T, K, D] -> [T, N, D]."""
        if not torch.is_grad_enabled():
            return packed_attention.forward(q, k, v, self._layout)[0]
        out = _Attention.apply(q, k, v, self._layout)
        assert isinstance(out, Tensor)
        return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        out, lse = packed_attention.forward(q, k, v, layout)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = layout
        # On a GPU the backward runs in a thread of autograd's, where `dispatch.use` is not known.
        ctx.context = copy_context()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        given = on_out, q, k, v, out, lse, ctx.layout
        return *ctx.context.run(packed_attention.backward, *given), None
