"""Operations against torch's own count of a tiny model's products, pairs against a drawn mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rmr1.engine import flops
from rmr1.engine.flops import (
    forward_flops,
    named_peak,
    pair_flops,
    pairs,
    peak_flops,
    throughput,
    training_flops,
)
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.packing import Batch, Group, pack
from rmr1.engine.scorer import Scorer
from rmr1.kernels.dispatch import use

CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,  # so that queries are wider than the hidden states
    max_position_embeddings=512,
)
BY_FAMILY = [
    CONFIG,
    dataclasses.replace(CONFIG, family="qwen2", tie_word_embeddings=True),
    dataclasses.replace(CONFIG, family="qwen3", num_key_value_heads=6),
]


def batch() -> Batch:
    """Two prompts of 20 tokens with three responses each, and one with a single response."""
    shared = [[3] * count for count in (4, 9, 1, 7, 7, 12)]
    return pack([[5] * 20, [7] * 31], shared, samples=3)


def counted(config: ModelConfig, *, backward: bool) -> int:
    """The products that torch sees, with kernels of plain torch."""
    model, one = CausalLM(config), batch()
    with use("reference"), FlopCounterMode(display=False) as counter:
        logprobs, _ = Scorer(model)(one)
        if backward:
            logprobs.sum().backward()
    return counter.get_total_flops()


def square_pairs(groups: tuple[Group, ...]) -> int:
    """The reference computes all scores of a run, and hides those of what comes later."""
    return sum(
        group.prompt**2 + sum(n * n + n * group.prompt for n in group.responses) for group in groups
    )


@pytest.mark.parametrize("config", BY_FAMILY, ids=lambda config: config.family)
def test_a_forward_is_what_torch_counts(config: ModelConfig) -> None:
    groups = batch().groups
    hidden = pair_flops(config) * (square_pairs(groups) - pairs(groups))
    assert forward_flops(config, groups) + hidden == pytest.approx(
        counted(config, backward=False), rel=0.01
    )


@pytest.mark.parametrize("config", BY_FAMILY, ids=lambda config: config.family)
def test_an_update_is_what_torch_counts(config: ModelConfig) -> None:
    """But for the scores that the backward pass of attention computes anew."""
    groups = batch().groups
    hidden = flops.TRAINING_PASSES * pair_flops(config) * (square_pairs(groups) - pairs(groups))
    again = pair_flops(config) // 2 * square_pairs(groups)
    assert training_flops(config, groups) + hidden + again == pytest.approx(
        counted(config, backward=True), rel=0.01
    )


def test_pairs_are_those_of_the_mask() -> None:
    seen = 0
    for group in batch().groups:
        prompt = torch.ones(group.prompt, group.prompt).tril()
        seen += int(prompt.sum())
        for n in group.responses:
            seen += int(torch.cat([torch.ones(n, group.prompt), torch.ones(n, n).tril()], 1).sum())
    assert pairs(batch().groups) == seen
    assert pairs([Group(5, ())]) == 15


def test_throughput_leaves_out_what_is_not_known() -> None:
    groups = batch().groups  # 51 tokens of prompts, 40 of responses
    assert throughput(CONFIG, groups, update_seconds=2.0) == {"train_tokens_per_second": 45.5}
    figures = throughput(
        CONFIG,
        groups,
        update_seconds=2.0,
        drawn_tokens=40,
        rollout_seconds=4.0,
        peak=training_flops(CONFIG, groups),
    )
    assert figures == {
        "train_tokens_per_second": 45.5,
        "rollout_tokens_per_second": 10.0,
        "mfu": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 64GB HBM2", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_rate_is_never_guessed(name: str, rate: float | None) -> None:
    assert named_peak(name) == rate


def test_the_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda:0")
    assert peak_flops(gpu, torch.bfloat16) == peak_flops(gpu, torch.float16) == 989e12
    assert peak_flops(gpu, torch.float32) is None
    assert peak_flops(torch.device("meta"), torch.bfloat16) is None
    monkeypatch.setattr(flops, "GEMM_SECONDS", 0.05)
    flops._gemm_rate.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        rate = peak_flops(torch.device("cpu"), dtype)
        assert rate is not None
        assert 1e8 < rate < 1e15
        assert peak_flops(torch.device("cpu"), dtype) == rate  # measured once
    flops._gemm_rate.cache_clear()
