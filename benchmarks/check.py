"""The check before the timing: an op that is wrong is not worth a measurement.

Outputs and gradients, in the dtype and on the device of the timing, against the reference in fp64.
An op's error may be twice torch's own in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

# The least error that counts, in units of the largest value: four roundings to fp32. Torch's own
# error may be 0 by luck, and twice that would refuse everybody.
FLOOR = 4 * torch.finfo(torch.float32).eps
ALLOWED = 2.0  # times torch's own error


class WrongResult(Exception):
    """An op that fails its check; its sentence is for the user."""


def check(
    op: str,
    function: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    leaves: int,
    *,
    torchs: Function | None = None,
) -> float:
    """The largest error of an op in units of torch's own; WrongResult when that is above 2.

    inputs: in the dtype of the timing, floating ones first; the first `leaves` get a gradient.
    reference: gives the truth in fp64, and in the dtype of the inputs torch's own error, unless
    `torchs` says how torch is used in that dtype.
    """
    dtype = inputs[0].dtype
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = _evaluate(reference, wide, leaves, dtype)
    ours = _evaluate(function, inputs, leaves, dtype)
    theirs = _evaluate(torchs or reference, inputs, leaves, dtype)
    worst = 0.0
    for name, exact in truth.items():
        size = float(exact.abs().max())
        if not size > 0 or ours[name].shape != exact.shape:
            raise WrongResult(
                f"{op}: {name} has shape {list(ours[name].shape)}, and the reference"
                f" {list(exact.shape)} with a largest value of {size:g}; nothing was timed."
            )
        error, own = (float((x[name].double() - exact).abs().max()) for x in (ours, theirs))
        ratio = error / max(own, FLOOR * size)
        if not ratio <= ALLOWED:  # NaN too
            raise WrongResult(
                f"{op}: the error of {name} is {error:.2g}, {ratio:.3g} times torch's own in"
                f" {str(dtype).removeprefix('torch.')}, where {ALLOWED:g} times is allowed; nothing"
                " was timed."
            )
        worst = max(worst, ratio)
    return worst


def _evaluate(
    function: Function, inputs: Sequence[Tensor], leaves: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, and gradients of the first inputs for fixed random gradients of the outputs."""
    given = [x.detach().clone().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    outputs = function(*given)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        rng = torch.Generator().manual_seed(1)
        # Rounded to the dtype first, so that the truth is that of the same gradients.
        draws = [torch.randn(x.shape, generator=rng).to(dtype) for x in outputs]
        on = [draw.to(x.device, x.dtype) for draw, x in zip(draws, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, given[:leaves], on)
        found |= {f"the gradient of input {i}": x for i, x in enumerate(grads)}
    return found
