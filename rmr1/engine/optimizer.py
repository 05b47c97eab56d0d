"""AdamW of one process, and its state as plain tensors (no pickle)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rmr1.engine.optim_config import OptimConfig

MASTER = "master"  # the fp32 copy of a parameter that has fewer bits


class Optimizer:
    """Fused AdamW over a model's parameters; matrices decay, norms and biases do not.

    Parameters in 16 bits are trained through fp32 copies: in bf16 a step smaller than 1/256 of a
    weight would be lost, and at the learning rates of RL nearly all are.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.max_grad_norm = config.max_grad_norm
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for name, p in self._named.items()
        }
        self.adamw = torch.optim.AdamW(
            parameter_groups(self._masters.values(), config),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, of one micro-batch of an update.

        One in 16 bits goes to its fp32 copy's as soon as it is whole: all of them side by side
        would take half as much memory again as the sums.
        """
        hooks = [
            self._named[name].register_post_accumulate_grad_hook(partial(_hand_over, master))
            for name, master in self._masters.items()
            if master is not self._named[name]
        ]
        try:
            torch.autograd.backward(loss)
        finally:  # to others' backward passes these parameters are like any
            for hook in hooks:
                hook.remove()

    def step(self, rate: float) -> float:
        """Clip, step and forget the gradient: its norm before clipping.

        A gradient that is not finite changes nothing.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self.max_grad_norm)
        if bool(torch.isfinite(norm)):
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
            self._copy_weights()
        self.adamw.zero_grad(set_to_none=True)
        return norm.item()

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for name, master in self._masters.items():
            if master is not self._named[name]:
                self._named[name].copy_(master)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """`<state>.<parameter>` with its tensor: `step`, moments, and fp32 copies where there are
        some. Nothing before the first step.
        """
        for name, master in self._masters.items():
            own = self.adamw.state.get(master, {})
            for key, value in own.items():
                yield f"{key}.{name}", value
            if own and master is not self._named[name]:
                yield f"{MASTER}.{name}", master

    @torch.no_grad()
    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: the tensors are of another model.
        """
        shapes = {name: parameter.shape for name, parameter in self._named.items()}
        low = any(master is not self._named[name] for name, master in self._masters.items())
        for key, value in complete(tensors, shapes, masters=low):
            state, name = checked_key(key, value, shapes)
            master = self._masters[name]
            if state == MASTER:
                if master is not self._named[name]:
                    master.copy_(value)
            else:
                # A copy of its own, where the fused kernel wants it: what was read may be a window
                # on the checkpoint's file.
                self.adamw.state[master][state] = value.to(master.device, copy=True)


@torch.no_grad()
def _hand_over(master: Tensor, parameter: Tensor) -> None:
    """Add a parameter's gradient to that of its fp32 copy, and let go of it."""
    gradient = parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
    parameter.grad = None


def parameter_groups(parameters: Iterable[Tensor], config: OptimConfig) -> list[dict[str, object]]:
    """Matrices, which decay, and vectors, which do not."""
    matrices, vectors = list[Tensor](), list[Tensor]()
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def complete(
    tensors: Iterable[tuple[str, Tensor]], names: Iterable[str], *, masters: bool
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; ValueError at their end where some of a parameter's are missing.

    None at all are complete: that is the state before the first step.
    """
    states = ("step", "exp_avg", "exp_avg_sq", *([MASTER] if masters else []))
    missing = {f"{state}.{name}" for name in names for state in states}
    any_came = False
    for key, value in tensors:
        any_came = True
        missing.discard(key)
        yield key, value
    if any_came and missing:
        raise ValueError(
            f"the optimiser state lacks {len(missing)} tensors of the model, such as"
            f" {min(missing)!r}; resume with the model that the checkpoint was made from"
        )


def checked_key(key: str, value: Tensor, shapes: Mapping[str, torch.Size]) -> tuple[str, str]:
    """The state and the parameter that a tensor belongs to; ValueError where it has no place."""
    state, _, name = key.partition(".")
    if name not in shapes:
        raise ValueError(
            f"the optimiser state holds {name!r}, which the model does not have; resume with"
            " the model that the checkpoint was made from"
        )
    if value.ndim and value.shape != shapes[name]:
        raise ValueError(
            f"the optimiser state of {name} has shape {list(value.shape)}, the model's tensor"
            f" {list(shapes[name])}; resume with the model that the checkpoint was made from"
        )
    return state, name
