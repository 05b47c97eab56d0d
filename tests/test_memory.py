"""The plan of a configuration, and the settings that it says would take less."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmr1.config import RlvrConfig, SftConfig, load_config
from rmr1.distill import distill
from rmr1.engine.memory_plan import Device, MemoryPlan, parameters
from rmr1.engine.model_config import ModelConfig
from rmr1.memory import check_cache, memory_advice, plan_run
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


def advice(
    stage: str, ranks: int = 8, device: Device = "cuda", phase: str = "", **overrides: Any
) -> str:
    config = recipe(stage, **overrides)
    here: Any = {"ranks": ranks, "device": device, "device_memory": 84 * 10**9}
    return memory_advice(config, SEVEN_B, **here, phase=phase)


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
    assert advice("sft", ranks=1, device="cpu", recompute="layer") == (
        "lower both max_length (now 12288) and max_micro_tokens (now 12288)"
    )


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


def applied(option: str) -> dict[str, Any]:
    """What a piece of advice asks for, as overrides; a value to be lowered becomes 0.7 of it."""
    found: dict[str, Any] = {}
    if set_to := re.match(r"set (\S+) to (\S+) \(saves [\d.]+ GB\)$", option):
        found[set_to[1]] = int(set_to[2]) if set_to[2].isdigit() else set_to[2]
    elif unset := re.match(r"unset (\S+) \(saves [\d.]+ GB\)$", option):
        found[unset[1]] = "unset"
    else:
        lowered = re.findall(r"(\S+) \(now ([\d.]+)\)", option)
        assert option.startswith("lower "), option
        for key, now in lowered:
            less = 0.7 * float(now)
            found[key] = less if key.endswith("_gb") else int(less)
    return found


# What runs that are too large say; by phase, as each of them has its own remedies.
TOO_LARGE = [
    ("rlvr", "qwen2.5-7b", 2, "update", {}),
    ("rlvr", "qwen2.5-7b", 2, "update", {"recompute": "none", "grpo.offload_reference": False}),
    ("rlvr", "qwen2.5-7b", 2, "update", {"max_micro_tokens": 65536}),
    ("rlvr", "qwen2.5-14b", 4, "update", {}),
    ("rlvr", "qwen2.5-14b", 8, "reference", {}),
    ("rlvr", "qwen2.5-32b", 16, "rollout", {}),
    ("rlvr", "qwen2.5-32b", 32, "rollout", {"rollout.kv_memory_gb": 20.0}),
    ("sft", "qwen2.5-32b", 16, "update", {"recompute": "none"}),
    (
        "sft",
        "qwen2.5-7b",
        4,
        "update",
        {"recompute": "none", "recompute_layers": 9, "max_micro_tokens": 16384},
    ),
]


@pytest.mark.parametrize(("stage", "name", "ranks", "phase", "change"), TOO_LARGE)
def test_every_piece_of_advice_helps_where_it_is_too_much(
    stage: str, name: str, ranks: int, phase: str, change: dict[str, Any]
) -> None:
    kind: Any = SftConfig if stage == "sft" else RlvrConfig
    path = RECIPES / f"{stage}-{name}.toml"
    model = ModelConfig.from_dict(json.loads((RECIPES / f"models/{name}.json").read_text()))
    config = load_config(kind, path, change)
    here: Any = {"device": "cuda", "device_memory": int(79.9e9)}
    before = plan_run(config, model, ranks=ranks, **here)
    assert before.phase == phase
    assert before.total > 79.9e9
    said = memory_advice(config, model, ranks=ranks, **here)
    options = re.split(r", (?=set|unset|lower)| or (?=set|unset|lower|start)", said)
    assert len(options) > 1
    for option in options:
        if option == "start it on more GPUs":
            after = plan_run(config, model, ranks=2 * ranks, **here)
        else:
            other = load_config(kind, path, change | applied(option))
            after = plan_run(other, model, ranks=ranks, **here)
        assert sum(after.phases[phase].values()) < 0.995 * before.total, option
        assert after.total <= before.total, option


def test_a_run_is_told_of_micro_batches_even_where_the_plan_is_not() -> None:
    """Its sequences may be far shorter than the longest one that is planned for."""
    assert not advice("rlvr", ranks=1).startswith("lower max_micro_tokens")
    assert "max_micro_tokens" not in advice("rlvr", phase="update")
    assert "max_micro_tokens (now 65536)" in advice("rlvr", max_micro_tokens=65536)


def test_a_cache_that_holds_no_sample_is_refused_as_the_generator_does() -> None:
    """12,287 tokens of 57,344 bytes take 768 blocks, 0.7046 GB."""
    for size, fits in ((0.7, False), (0.7047, True)):
        config = recipe("rlvr", rollout__kv_memory_gb=size)
        found = plan_run(config, SEVEN_B, ranks=8, device="cuda", device_memory=84 * 10**9)
        if fits:
            check_cache(config, SEVEN_B, found)
        else:
            told = r"prompt of 4096 tokens and max_new_tokens=8192 need 0.705 GB of KV cache \(768 "
            with pytest.raises(ValueError, match=told):
                check_cache(config, SEVEN_B, found)
    # A model of fewer positions has no longer sample, and a CPU's cache is in fp32.
    config = recipe("rlvr", rollout__kv_memory_gb=0.7)
    short = replace(SEVEN_B, max_position_embeddings=12000)
    check_cache(config, short, plan_run(config, short, ranks=8, device="cuda", device_memory=0))
    found = plan_run(config, short, ranks=8, device="cpu", device_memory=0)
    with pytest.raises(ValueError, match=r"need 1.38 GB of KV cache \(750 blocks"):
        check_cache(config, short, found, "cpu")


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
