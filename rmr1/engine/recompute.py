"""What a backward pass keeps of the forward, and what it computes anew. No kind changes a bit.

Per layer: "none" keeps all. "elementwise" computes anew what costs next to nothing, the two normed
inputs and the product of gate and up, a third of what a layer keeps. The others checkpoint: "mlp"
keeps of the MLP nothing but the residual stream, and of attention what "elementwise" does, for a
sixth more work; "layer" keeps the input of the layer alone, for a third more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# What stands for a saved tensor: how to compute it, or itself and the version it had.
_Packed = Callable[[], Tensor] | tuple[Tensor, int]


def again(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """function(*inputs), to be computed once more in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    out = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out


def anew(
    out: Tensor | None, function: Callable[..., Tensor], *inputs: Tensor, nested: bool = False
) -> AbstractContextManager[None]:
    """A block in which `out` = function(*inputs) is not saved, but computed again when needed.

    It does nothing where gradients are off, and where `out` was made by an op that does not keep
    the inputs itself: holding them would cost memory, not save it. Of several saved_tensors_hooks
    torch asks the innermost alone: inside somebody else's (a checkpoint, offloading) this block
    would take tensors away from them, and does nothing either. A `nested` block is for what is made
    inside a block of this function, and does nothing elsewhere.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    around = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if (around and around[1]) is not (_unpack if nested else None):
        return nullcontext()
    compute = None
    if out is not None and _keeps(out, inputs):
        # In the context of now, in which `dispatch.use` may have forced the kernels.
        compute = partial(copy_context().run, function, *(x.detach() for x in inputs))
        known = ref(out)  # weak: what is saved keeps `pack` too

    def pack(x: Tensor) -> _Packed:
        if compute is not None and x is known():
            return compute
        # Detached, as a saved output would hold its own graph for ever; a parameter as it is, as
        # ZeRO-3 frees and gathers its memory between now and then.
        return x if x.is_leaf else x.detach(), x._version

    return saved_tensors_hooks(pack, _unpack)


def _keeps(out: Tensor, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the op that made `out`, an autograd.Function, has saved all of `inputs`."""
    saved = getattr(out.grad_fn, "saved_tensors", ())
    places = {x.data_ptr() for x in saved if x is not None}
    return all(x.data_ptr() in places for x in inputs)


def _unpack(packed: _Packed) -> Tensor:
    if not isinstance(packed, tuple):
        with torch.no_grad():
            return packed()
    x, version = packed
    if x._version != version:  # torch's own check, which does not see what hooks have packed
        raise RuntimeError(
            f"a tensor of shape {list(x.shape)} that the backward pass needs was modified in place"
            " after the forward pass; modify a copy of it."
        )
    return x
