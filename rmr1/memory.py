"""What the memory plan says of a run's configuration, and what to change where it is too much."""

from __future__ import annotations

import logging
from typing import Any

import torch

from rmr1.config import RlvrConfig, RunConfig, SftConfig
from rmr1.engine.cache_plan import MOST_ROWS
from rmr1.engine.memory_plan import Device, MemoryPlan, plan_training
from rmr1.engine.model import CausalLM
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.ranks import Ranks
from rmr1.grpo import objective_of

_log = logging.getLogger(__name__)

# What may take less memory, key by key; of values for one key the best is told.
_CHANGES: dict[str, tuple[Any, ...]] = {
    "recompute": ("layer",),
    "recompute_layers": (None,),
    "grpo.offload_reference": (True,),
    "rollout.release": (True,),
    "zero.stage": (1, 2, 3),
    "zero.offload_optimizer": (True,),
}


def plan_run(
    config: RunConfig, model: ModelConfig, *, ranks: int, device: Device, device_memory: int
) -> MemoryPlan:
    """The plan of a configuration for a model of these sizes; `device_memory` in bytes."""
    longest, more = 0, dict[str, Any]()
    if isinstance(config, SftConfig):
        longest = config.max_length
    if isinstance(config, RlvrConfig):
        rollout, grpo = config.rollout, config.grpo
        longest = config.max_prompt_tokens + rollout.max_new_tokens
        rows = min(rollout.prompts * rollout.samples, MOST_ROWS[device])
        given = rollout.kv_memory_gb
        more = {
            "reference": ("offloaded" if grpo.offload_reference else "resident")
            if grpo.beta > 0
            else "none",
            "per_token": objective_of(grpo, rollout.max_new_tokens).per_token,
            "rollout_tokens": rows * min(longest, model.max_position_embeddings),
            "release": rollout.release,
            "kv_memory": None if given is None else int(given * 1e9),
        }
    return plan_training(
        model,
        getattr(torch, config.dtype),
        # A sequence is never cut, however long.
        micro_tokens=max(config.max_micro_tokens, min(longest, model.max_position_embeddings)),
        device=device,
        recompute=config.recompute,
        recompute_layers=config.recompute_layers,
        ranks=ranks,
        zero=config.zero,
        device_memory=device_memory,
        **more,
    )


def prepare_memory(model: CausalLM, config: RunConfig, ranks: Ranks, device_memory: int) -> str:
    """Switch on what the configuration says to recompute, and tell what training will take of
    the bytes that were free before anything was loaded; returns what to change where it fails.
    """
    model.recompute(config.recompute, config.recompute_layers)
    device: Device = "cuda" if model.lm_head_weight.is_cuda else "cpu"
    here: Any = {"ranks": ranks.size, "device": device, "device_memory": device_memory}
    _log.info("%s", plan_run(config, model.config, **here))
    return memory_advice(config, model.config, **here)


def memory_advice(
    config: RunConfig, model: ModelConfig, *, ranks: int, device: Device, device_memory: int
) -> str:
    """The settings that would take less memory, by how much as planned; of those in force none."""

    def plan(config: RunConfig) -> MemoryPlan:
        return plan_run(config, model, ranks=ranks, device=device, device_memory=device_memory)

    def needed(config: RunConfig) -> int:
        """Of an update, without the cache, whose share is one of what is left."""
        return sum(n for name, n in plan(config).phases["update"].items() if name != "KV cache")

    options = [f"lower max_micro_tokens (now {config.max_micro_tokens})"]
    cache = plan(config).parts.get("KV cache", 0) / 1e9
    if isinstance(config, RlvrConfig) and cache > 0.01 * needed(config) / 1e9:
        given = config.rollout.kv_memory_gb or cache
        options.append(f"lower rollout.kv_memory_gb (now {given:.3g})")
    for key, values in _CHANGES.items():
        changed = {value: _with(config, key, value) for value in values}
        saved = {v: needed(config) - needed(other) for v, other in changed.items() if other}
        best = max(saved, key=lambda value: saved[value], default=None)
        if saved and saved[best] > 0.01 * needed(config):
            verb = f"unset {key}" if best is None else f"set {key} to {str(best).lower()}"
            options.append(f"{verb} (saves {saved[best] / 1e9:.2g} GB)")
    if ranks == 1 and device == "cuda":
        options.append("start it on several GPUs, which share the optimiser's state")
    return " or ".join([", ".join(options[:-1]), options[-1]] if options[1:] else options)


def _with(config: RunConfig, key: str, value: Any) -> RunConfig | None:
    """The configuration with another value of a dotted key; None where it has no such key."""
    section, _, name = key.rpartition(".")
    if not section:
        return config.model_copy(update={name: value})
    inner = getattr(config, section, None)
    if inner is None:
        return None
    return config.model_copy(update={section: inner.model_copy(update={name: value})})
