"""Parameters and optimiser spread over the ranks of a job by DeepSpeed's ZeRO.

Stage 1 shards the optimiser's state, 2 the gradients too, 3 the weights as well. DeepSpeed averages
gradients over ranks; the loss here is a sum that was divided by the counts of all ranks already, so
it is multiplied by their number first. Whole tensors are gathered one at a time through its public
`safe_get_full_*`, which makes checkpoints independent of the stage and of the number of ranks (its
own would be pickled files, one a rank).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rmr1.engine.model import CausalLM
from rmr1.engine.optim_config import OptimConfig, ZeroConfig
from rmr1.engine.optimizer import MASTER, checked_key, complete, parameter_groups
from rmr1.engine.ranks import Ranks
from rmr1.engine.scorer import Scorer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """A model trained by all ranks together; see `Updater`.

    Under stage 3 the model that is given ends up sharded: its tensors are empty from then on.
    """

    def __init__(
        self, model: CausalLM, config: OptimConfig, zero: ZeroConfig, ranks: Ranks
    ) -> None:
        self.model, self.ranks = model, ranks
        self.whole = zero.stage < 3
        self._steps = 0
        self._low = model.lm_head_weight.dtype != torch.float32
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        groups = parameter_groups((p for p in model.parameters() if p.requires_grad), config)
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self.engine = _initialize(Scorer(model), adamw, _settings(config, zero, self._low))
        self._make_moments()

    def score(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """See `Updater`."""
        scored: tuple[Tensor, Tensor] = self.engine(*arguments)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Updater`."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; nothing moves before the last one

    def step(self, rate: float) -> float:
        """See `Updater`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        self._steps += math.isfinite(norm)
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Updater`."""
        for name, parameter in self.model.named_parameters():
            with self._gathered(parameter):
                yield name, parameter.detach()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Updater`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.model.named_parameters() if self._steps else ():
            yield f"step.{name}", torch.tensor(float(self._steps))
            for key in _MOMENTS:
                value = safe_get_full_optimizer_state(parameter, key)
                yield f"{key}.{name}", value.view(self._shapes[name])
            if self._low:
                master = safe_get_full_fp32_param(parameter)
                yield f"{MASTER}.{name}", master.view(self._shapes[name])

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `Updater`."""
        parameters = dict(self.model.named_parameters())
        for key, value in complete(tensors, self._shapes, masters=self._low):
            state, name = checked_key(key, value, self._shapes)
            parameter, value = parameters[name], value.to(self.ranks.device, torch.float32)
            if state == "step":
                self._steps = int(value)
            elif state in _MOMENTS:
                self._put(parameter, value, state)
            elif state == MASTER and self._low:
                self._put(parameter, value, None)
        for moments in self.engine.optimizer.optimizer.state.values():
            moments["step"].fill_(self._steps)

    def _put(self, parameter: torch.nn.Parameter, value: Tensor, state: str | None) -> None:
        """Set a moment, or without a name the fp32 copy, of a parameter."""
        from deepspeed import utils

        if self.whole:
            if state is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, state)
            return
        # Its part of a sharded one, padded: DeepSpeed would cut past the end of a whole tensor
        # whose size is no multiple of the ranks.
        size = int(parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(
            value.flatten(), (0, size * self.ranks.size - value.numel())
        )
        own = padded[self.ranks.rank * size : (self.ranks.rank + 1) * size]
        if state is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, state)

    def _gathered(self, parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
        if self.whole:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
        return gathered

    def _make_moments(self) -> None:
        """What AdamW would make at its first step.

        A restored one has that behind it; and DeepSpeed, which steps one group of parameters after
        the other, would know the moments of the first group only.
        """
        optimizer = self.engine.optimizer
        flats = (
            [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]
            if self.whole
            else optimizer.fp32_partitioned_groups_flat
        )
        for flat in flats:
            state = {key: torch.zeros_like(flat.data) for key in _MOMENTS}
            state["step"] = torch.zeros((), device=flat.device)
            optimizer.optimizer.state[flat] = state
        if self.whole:
            optimizer._lazy_init_hp_params_optimizer_state()


def _initialize(scorer: Scorer, adamw: torch.optim.AdamW, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine; a gradient that is not finite skips the step whatever the dtype."""
    if next(scorer.parameters()).device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # though there may be a GPU
    import deepspeed

    # On a CPU it would compile an op for ranks of one machine, under a lock that a killed process
    # leaves behind: every later job would then wait for ever. gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)  # its pages of settings are no news
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # nor what it calls
    engine, *_ = deepspeed.initialize(
        model=scorer, optimizer=adamw, config=settings, dist_init_required=False
    )
    engine.optimizer.check_grad_overflow = True  # by itself it looks in 16 bits only
    return engine


def _settings(config: OptimConfig, zero: ZeroConfig, low: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Sums over micro-batches and ranks are made in fp32."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": low},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": zero.stage, **(offload if zero.offload_optimizer else {})},
    }
