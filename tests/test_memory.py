"""The plan of a configuration, and the settings that it says would take less."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmr1.config import RlvrConfig, SftConfig, load_config
from rmr1.distill import distill
from rmr1.engine.memory_plan import Device, MemoryPlan, parameters
from rmr1.engine.model_config import ModelConfig
from rmr1.memory import memory_advice, plan_run
from rmr1.rlvr import rlvr

RECIPES = Path(__file__).parents[1] / "recipes"
SEVEN_B = ModelConfig(
    family="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=32768,
)
COUNT = parameters(SEVEN_B)


def recipe(stage: str, **overrides: Any) -> SftConfig | RlvrConfig:
    """A recipe for 7B, with `zero__stage=3` for `--zero.stage 3`."""
    kind: Any = SftConfig if stage == "sft" else RlvrConfig
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_config(kind, RECIPES / f"{stage}-qwen2.5-7b.toml", dotted)
    assert isinstance(config, SftConfig | RlvrConfig)
    return config


def plan(stage: str, ranks: int = 8, device: Device = "cuda", **overrides: Any) -> MemoryPlan:
    config = recipe(stage, **overrides)
    return plan_run(config, SEVEN_B, ranks=ranks, device=device, device_memory=84 * 10**9)


def advice(stage: str, ranks: int = 8, device: Device = "cuda", **overrides: Any) -> str:
    config = recipe(stage, **overrides)
    return memory_advice(config, SEVEN_B, ranks=ranks, device=device, device_memory=84 * 10**9)


def test_the_published_recipes_fit_eight_gpus_and_not_one() -> None:
    for stage in ("sft", "rlvr"):
        assert plan(stage).total < 75e9
        assert plan(stage, ranks=1).total > 84e9


def test_what_the_configuration_says_is_planned() -> None:
    assert "reference" not in plan("rlvr").phases["update"]  # offloaded
    assert plan("rlvr", grpo__offload_reference=False).phases["update"]["reference"] == 2 * COUNT
    assert set(plan("rlvr", grpo__beta=0).phases) == {"load", "update", "rollout"}
    assert set(plan("sft", zero__stage=3).phases) == {"load", "update"}
    assert "generator's copy" not in plan("sft", zero__stage=3).parts
    assert plan("rlvr", rollout__kv_memory_gb=5).parts["KV cache"] == pytest.approx(5e9, rel=1e-3)
    # A loss of whole sequences asks less of the head than of a layer.
    assert "head" in plan("rlvr").phases["update"]
    assert "head" not in plan("rlvr", grpo__ratio="sequence").phases["update"]


def test_a_sequence_is_never_cut() -> None:
    """A micro-batch holds at least one, whatever max_micro_tokens says."""
    for stage in ("sft", "rlvr"):
        short, long = (plan(stage, max_micro_tokens=n).phases["update"] for n in (1, 12288))
        assert short == long
        twice = plan(stage, max_micro_tokens=2 * 12288).phases["update"]
        assert twice["activations"] == 2 * long["activations"]


def test_of_settings_in_force_nothing_is_said() -> None:
    everything = advice("rlvr", recompute="none", recompute_layers=3, grpo__offload_reference=False)
    for key in ("recompute to layer", "grpo.offload_reference to true", "zero.offload_optimizer"):
        assert f"set {key}" in everything
    most = {"recompute": "layer", "grpo__offload_reference": True, "zero__offload_optimizer": True}
    said = advice("rlvr", **most)
    assert "recompute" not in said
    assert "offload" not in said
    assert "zero" not in said
    assert advice("sft", ranks=1, device="cpu") == "lower max_micro_tokens (now 12288)"


def test_layers_that_keep_all_are_named() -> None:
    assert "unset recompute_layers (saves " in advice("sft", recompute_layers=3)
    assert "recompute_layers" not in advice("sft")


def test_a_generator_gains_nothing_from_stage_3() -> None:
    """It would need a whole copy of its own."""
    assert "set zero.stage to 3" in advice("sft", zero__stage=2, zero__offload_optimizer=False)
    assert "zero.stage" not in advice("rlvr")
    assert "set zero.stage to 2" in advice("rlvr", zero__stage=3)
    assert "set zero.stage to 2" in advice("rlvr", zero__stage=1)
    assert "zero.stage" not in advice("sft", zero__stage=3)


def test_what_does_not_apply_is_not_named() -> None:
    alone = advice("rlvr", ranks=1, grpo__beta=0)
    assert "zero." not in alone
    assert "reference" not in alone
    assert alone.endswith(" or start it on several GPUs, which share the optimiser's state")
    assert "GPU" not in advice("rlvr", ranks=2, device="cpu")
    assert "offload_optimizer" not in advice("rlvr", ranks=2, device="cpu")
    assert "kv_memory_gb" not in advice("sft")
    assert "lower rollout.kv_memory_gb (now 5)" in advice("rlvr", rollout__kv_memory_gb=5)


def test_what_is_saved_is_said_in_figures() -> None:
    found = re.search(r"set recompute to layer \(saves (\d+) GB\)", advice("sft", recompute="none"))
    assert found is not None
    none, layer = (plan("sft", recompute=kind).total for kind in ("none", "layer"))
    assert float(found[1]) == pytest.approx((none - layer) / 1e9, abs=0.5)


def test_runs_tell_their_plan_and_hand_on_the_advice(
    sft_config: Callable[..., SftConfig],
    rlvr_config: Callable[..., RlvrConfig],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("rmr1.engine.updater.Local.backward", exhausted)
    with caplog.at_level(logging.INFO, logger="rmr1.memory"):
        for run, config in ((distill, sft_config()), (rlvr, rlvr_config())):
            with pytest.raises(MemoryError, match=r"^out of memory; lower max_micro_tokens"):
                run(config)  # type: ignore[operator]
    sft, both = (r.getMessage() for r in caplog.records if r.name == "rmr1.memory")
    assert sft.startswith("training memory: weights ")
    assert "KV cache" in both
    with pytest.raises(MemoryError, match=r"set grpo.offload_reference to true \(saves "):
        rlvr(rlvr_config(name="again", max_micro_tokens=1))
