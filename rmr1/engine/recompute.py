"""Activation checkpointing: what a backward pass keeps of the forward, and what it computes anew.

Per layer: "none" keeps all; "mlp" keeps the input of the MLP and computes its three wide tensors
anew, which are more than half of what a layer keeps, for a sixth more work; "layer" keeps the input
of the layer alone, for a third more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def again(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """function(*inputs), to be computed once more in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    out = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out
