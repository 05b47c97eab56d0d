"""Settings of the optimiser and its learning-rate schedule. No torch: the command line's help and
the configuration files need these, not the optimiser.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# What the backward pass computes anew, see recompute.py.
Recompute = Literal["none", "elementwise", "mlp", "layer"]


class OptimConfig(BaseModel):
    """AdamW and the learning-rate schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="shape after the warm-up; linear and cosine end at zero"
    )
    warmup_steps: int = Field(0, ge=0, description="updates over which the rate rises from zero")
    weight_decay: float = Field(0.0, ge=0, description="decay of matrices (never norms, biases)")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    max_skipped: int = Field(
        5, ge=1, description="stop after so many updates in a row whose gradient was not finite"
    )


class ZeroConfig(BaseModel):
    """How a job of several ranks spreads a model, by DeepSpeed's ZeRO. One process needs none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Literal[1, 2, 3] = Field(
        2, description="shard the optimiser's state, (2) gradients too, (3) weights as well"
    )
    offload_optimizer: bool = Field(
        False, description="keep the optimiser's state in host memory and step there"
    )


def learning_rate(config: OptimConfig, update: int, total_updates: int) -> float:
    """The rate of update number `update`, counted from 0, of `total_updates`."""
    if update < config.warmup_steps:
        return config.learning_rate * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = max(1, total_updates - config.warmup_steps)
    left = max(0.0, 1 - (update - config.warmup_steps) / span)
    if config.schedule == "linear":
        return config.learning_rate * left
    return config.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
