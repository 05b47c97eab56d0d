"""What the memory plan says of a run's configuration, and what to change where it is too much."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from rmr1.config import RlvrConfig, RunConfig, SftConfig
from rmr1.engine.cache_plan import (
    BLOCK_SIZE,
    MOST_ROWS,
    CachePlan,
    blocks_for,
    bytes_per_token,
    check_fits,
)
from rmr1.engine.memory_plan import Device, MemoryPlan, plan_training
from rmr1.engine.model import CausalLM
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.ranks import Ranks
from rmr1.grpo import objective_of

_log = logging.getLogger(__name__)

# Bytes that another configuration takes less, 0 where it is too little to tell or there is none.
Saved = Callable[[RunConfig | None], int]

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


def check_cache(
    config: RunConfig, model: ModelConfig, plan: MemoryPlan, device: Device = "cuda"
) -> None:
    """Raise ValueError where the planned KV cache does not hold one sample of full length.

    That is the generator's own rule, by which the run would end at such a prompt.
    """
    if not isinstance(config, RlvrConfig):
        return
    found = plan.phases["rollout"]["KV cache"]
    token = bytes_per_token(
        model, torch.float32 if device == "cpu" else getattr(torch, config.dtype)
    )
    cache = CachePlan(blocks_for(found // token, BLOCK_SIZE), BLOCK_SIZE, token, found)
    new = config.rollout.max_new_tokens
    longest = min(config.max_prompt_tokens + new, model.max_position_embeddings)
    check_fits(max(0, longest - new), min(new, longest), cache)


def prepare_memory(model: CausalLM, config: RunConfig, ranks: Ranks, device_memory: int) -> str:
    """Switch on what the configuration says to recompute, and tell what training will take of
    the bytes that were free before anything was loaded; returns what to change where it fails.
    """
    model.recompute(config.recompute, config.recompute_layers)
    device: Device = "cuda" if model.lm_head_weight.is_cuda else "cpu"
    here: Any = {"ranks": ranks.size, "device": device, "device_memory": device_memory}
    _log.info("%s", plan_run(config, model.config, **here))
    options = _options(config, model.config, **here, phase="update")
    # The plan is of the longest sequence there may be. Those of a run are mostly far shorter, and
    # as many of them go through at once as this lets.
    micro = f"lower max_micro_tokens (now {config.max_micro_tokens})"
    return _joined([micro, *(option for option in options if option != micro)])


def memory_advice(
    config: RunConfig,
    model: ModelConfig,
    *,
    ranks: int,
    device: Device,
    device_memory: int,
    phase: str = "",
) -> str:
    """The settings that would take less memory in a phase, by how much as planned; no others.

    `phase` is one of `MemoryPlan.phases`, unless given the one that takes the most. What would make
    some phase take more than that one does is left out.
    """
    here: Any = {"ranks": ranks, "device": device, "device_memory": device_memory}
    return _joined(_options(config, model, **here, phase=phase) or ["take a larger device"])


def _options(
    config: RunConfig,
    model: ModelConfig,
    *,
    ranks: int,
    device: Device,
    device_memory: int,
    phase: str,
) -> list[str]:
    """See `memory_advice`: first what changes no result, last what needs other machines."""

    def plan(config: RunConfig, ranks: int = ranks) -> MemoryPlan:
        return plan_run(config, model, ranks=ranks, device=device, device_memory=device_memory)

    before = plan(config)
    phase = phase or before.phase
    needed = sum(before.phases[phase].values())

    def saved(other: RunConfig | None, ranks: int = ranks) -> int:
        if other is None:
            return 0
        after = plan(other, ranks)
        less = needed - sum(after.phases[phase].values())
        return less if less > 0.01 * needed and after.total <= before.total else 0

    options = _other_settings(config, saved)
    cache = before.phases[phase].get("KV cache", 0) / 1e9
    smaller = _with(config, "rollout.kv_memory_gb", 0.9 * cache)
    if (
        smaller
        and cache > 0.01 * needed / 1e9
        and _holds_one(smaller, model, plan(smaller), device)
    ):
        given = config.rollout.kv_memory_gb if isinstance(config, RlvrConfig) else None
        options.append(f"lower rollout.kv_memory_gb (now {given or cache:.3g})")
    options += _fewer_tokens(config, saved)
    if ranks == 1 and device == "cuda":
        options.append("start it on several GPUs, which share the optimiser's state")
    elif device == "cuda" and saved(config, 2 * ranks):
        options.append("start it on more GPUs")
    return options


def _other_settings(config: RunConfig, saved: Saved) -> list[str]:
    """Those that change how a step is computed and not what comes out; the best one first."""
    options: list[tuple[int, str]] = []
    for key, values in _CHANGES.items():
        found = {value: saved(_with(config, key, value)) for value in values}
        best = max(found, key=lambda value: found[value])
        if found[best]:
            verb = f"unset {key}" if best is None else f"set {key} to {str(best).lower()}"
            size = found[best] / 1e9
            told = f"{size:.0f}" if size >= 10 else f"{size:.2g}"
            options.append((found[best], f"{verb} (saves {told} GB)"))
    return [told for _, told in sorted(options, reverse=True)]


def _fewer_tokens(config: RunConfig, saved: Saved) -> list[str]:
    """Fewer tokens at a time: of a micro-batch, or where one sample fills it, of samples."""
    micro = config.max_micro_tokens
    if saved(_with(config, "max_micro_tokens", micro // 2 or 1)):
        return [f"lower max_micro_tokens (now {micro})"]
    caps = {"max_prompt_tokens": config.max_prompt_tokens}
    if isinstance(config, SftConfig):
        caps = {"max_length": config.max_length}
    if isinstance(config, RlvrConfig):
        caps["rollout.max_new_tokens"] = config.rollout.max_new_tokens
    options = []
    for key, now in caps.items():
        shorter = _with(config, key, now // 2 or 1)
        if saved(shorter):
            options.append(f"lower {key} (now {now})")
        elif shorter and saved(_with(shorter, "max_micro_tokens", 1)):
            options.append(f"lower both {key} (now {now}) and max_micro_tokens (now {micro})")
    return options


def _holds_one(config: RunConfig, model: ModelConfig, plan: MemoryPlan, device: Device) -> bool:
    """Whether the planned KV cache holds a sample of full length."""
    try:
        check_cache(config, model, plan, device)
    except ValueError:
        return False
    return True


def _joined(options: list[str]) -> str:
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
