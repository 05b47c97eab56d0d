"""Floating-point operations of a step, counted from shapes, and the share of the device's rate.

A multiplication with its addition is two. Counted is what the result needs, as MFU wants it (PaLM,
arXiv 2204.02311, appendix B): products with the matrices of the layers and of the head, and
attention. Left out are norms and the like, which are few, and what is computed twice: recomputed
activations, and prompts that several micro-batches have in common. Embeddings are looked up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

from rmr1.engine.model_config import ModelConfig
from rmr1.engine.packing import Group

# A backward pass makes the gradient of the input and that of the weight: two products for one.
TRAINING_PASSES = 3

# FLOP/s of bf16 or fp16 products that are summed in fp32, dense, by how the device's name begins;
# the first that fits. From the makers' data sheets, whose larger figures are for 2:4 sparsity.
PEAKS = (
    ("NVIDIA A100", 312e12),  # every form; nvidia.com/en-us/data-center/a100
    ("NVIDIA H100 80GB HBM3", 989e12),  # SXM; nvidia.com/en-us/data-center/h100
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200 NVL", 835e12),  # nvidia.com/en-us/data-center/h200
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),  # nvidia.com/en-us/data-center/dgx-b200: 36 PFLOPS sparse fp16, of 8
    ("AMD Instinct MI300X", 1307e12),  # amd.com/en/products/accelerators/instinct/mi300/mi300x
)
GEMM_SECONDS = 0.3


def body_size(config: ModelConfig) -> int:
    """Numbers in the matrices of all layers, by which every token is multiplied."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    width = 2 * queries + 2 * keys + 3 * config.intermediate_size  # q, o; k, v; gate, up, down
    return config.num_hidden_layers * config.hidden_size * width


def head_size(config: ModelConfig) -> int:
    """Numbers in the head, by which what predicts a token is multiplied."""
    return config.vocab_size * config.hidden_size


def pair_flops(config: ModelConfig) -> int:
    """Of one token that sees another in all layers: a score, and a value that is weighed."""
    return 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def pairs(groups: Sequence[Group]) -> int:
    """How many tokens see how many: themselves, what is before them, and all of their prompt."""
    seen = 0
    for group in groups:
        seen += group.prompt * (group.prompt + 1) // 2
        seen += sum(n * group.prompt + n * (n + 1) // 2 for n in group.responses)
    return seen


def forward_flops(config: ModelConfig, groups: Sequence[Group]) -> float:
    """Scoring the responses of a batch, each prompt computed once: one pass of a model."""
    rows = sum(sum(group.responses) for group in groups)
    return _flops(config, groups, rows)


def training_flops(config: ModelConfig, groups: Sequence[Group]) -> float:
    """Forward and backward over a batch."""
    return TRAINING_PASSES * forward_flops(config, groups)


def _flops(config: ModelConfig, groups: Sequence[Group], head_rows: int) -> float:
    tokens = sum(group.tokens for group in groups)
    products = body_size(config) * tokens + head_size(config) * head_rows
    return float(2 * products + pair_flops(config) * pairs(groups))


# --- Share of the device -------------------------------------------------------------------------


def throughput(
    config: ModelConfig,
    groups: Sequence[Group],
    *,
    update_seconds: float,
    drawn_tokens: int | None = None,
    rollout_seconds: float | None = None,
    peak: float | None = None,
) -> dict[str, float]:
    """How fast a step was.

    Args:
        config: the model that was trained.
        groups: of the whole step's batch, over all ranks.
        update_seconds: of forward, backward and optimiser.
        drawn_tokens: sampled in the step over all ranks, those of groups that the batch leaves out
            too; None: nothing was sampled.
        rollout_seconds: in which they were sampled.
        peak: FLOP/s of all devices together (`peak_flops` times the ranks), or None.

    Returns:
        `train_tokens_per_second` (prompts counted once), `rollout_tokens_per_second`, and `mfu`,
        the update's share of the peak, between 0 and 1. A figure whose input is None is left out.
    """
    figures = {"train_tokens_per_second": sum(group.tokens for group in groups) / update_seconds}
    if drawn_tokens is not None and rollout_seconds is not None:
        figures["rollout_tokens_per_second"] = drawn_tokens / rollout_seconds
    if peak is not None:
        figures["mfu"] = training_flops(config, groups) / update_seconds / peak
    return figures


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that products of matrices in `dtype` can reach on one device, or None if unknown.

    A GPU's is its maker's figure. None in fp32, which runs on one kind of unit or the other as
    torch is set (TF32), and for a part of a GPU (MIG). A CPU's is measured, once and for
    about 0.3 s, with the threads that torch has now.
    """
    if device.type == "cpu":
        # In fp32 too where that is another: many processors are faster in it than in bf16.
        threads = torch.get_num_threads()
        return max(_gemm_rate(one, threads) for one in {dtype, torch.float32})
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """The rate of a GPU, by the name that its driver gives."""
    if "MIG" in name.split():
        return None
    return next((rate for start, rate in PEAKS if name.startswith(start)), None)


@cache
@torch.no_grad()
def _gemm_rate(dtype: torch.dtype, threads: int) -> float:
    """The best of a few products, of matrices that grow until one takes 5 ms.

    Measured once a process for each dtype and number of `threads`, which torch has now.
    They begin small: without units for it a processor takes seconds for a large one in bf16.
    """
    side, rate, began = 256, 0.0, time.perf_counter()
    a = b = out = torch.empty(0)
    while (start := time.perf_counter()) - began < GEMM_SECONDS or not rate:
        if len(a) != side:
            a, b = torch.ones(2, side, side, dtype=dtype)
            out = torch.mm(a, b)  # warm-up, and touches the memory
            start = time.perf_counter()
        torch.mm(a, b, out=out)
        took = time.perf_counter() - start
        rate = max(rate, 2 * side**3 / took)
        if took < 5e-3 and side < 8192:
            side *= 2
    return rate
