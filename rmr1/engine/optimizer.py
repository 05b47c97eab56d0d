"""AdamW and its state as plain tensors (no pickle)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmr1.engine.optim_config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimiser's state, named `<state>.<parameter>`; empty before the first update."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        state, name = key.split(".", 1)
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"the optimiser state holds {name!r}, which the model does not have; resume with"
                " the model that the checkpoint was made from"
            )
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser state of {name} has shape {list(value.shape)}, the model's tensor"
                f" {list(parameter.shape)}; resume with the model that the checkpoint was made from"
            )
        # A copy of its own, where the fused kernel wants it: what was read may be a window on the
        # checkpoint's file.
        optimizer.state[parameter][state] = value.to(parameter.device, copy=True)
