"""How long a step may take, from a roofline model: no measurement, and it says what it assumes.

Each part takes the longer of its products and its reads, at a share of the GPU's rates
(rmr1/gpus.py). Prompts and judgments are taken as equally long. Nothing overlaps but what a part
does itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rmr1.config import RlvrConfig, SftConfig
from rmr1.engine.flops import body_size, forward_flops, head_size, training_flops
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.packing import Group
from rmr1.gpus import (
    ADAM_PER_SECOND,
    BANDWIDTH_SHARE,
    GEMM_SHARE,
    LINK_SHARE,
    NODE,
    STEP_SECONDS,
    Gpu,
)

SIZE = 2  # bytes of a bf16 number


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a prompt and of a judgment."""

    prompt: int
    judgment: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a step by part; `rows` samples are drawn at a time on each GPU."""

    parts: dict[str, float]
    steps: int
    rows: int = 0

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.step / 3600


def sft_estimate(
    config: SftConfig, model: ModelConfig, gpu: Gpu, gpus: int, lengths: Lengths, traces: int
) -> Estimate:
    """A step of stage 1 on so many GPUs, for so many traces in all."""
    groups = [Group(lengths.prompt, (lengths.judgment,))] * config.batch_size
    tokens = sum(group.tokens for group in groups)
    parts = _update(config, model, gpu, gpus, groups, tokens)
    return Estimate(parts, ceil(traces / config.batch_size) * config.epochs)


def rlvr_estimate(
    config: RlvrConfig, model: ModelConfig, gpu: Gpu, gpus: int, lengths: Lengths, cache: int
) -> Estimate:
    """A step of stage 2 on so many GPUs with `cache` bytes of KV cache on each."""
    rollout, grpo = config.rollout, config.grpo
    groups = [Group(lengths.prompt, (lengths.judgment,) * rollout.samples)] * rollout.prompts
    rate = gpu.flops * GEMM_SHARE * gpus
    rows, drawing = _rollout(config, model, gpu, gpus, lengths, cache)
    parts = {"rollout": drawing}
    scoring = forward_flops(model, groups) / rate
    if grpo.beta:
        moved = SIZE * _count(model) * 2 / gpu.host if grpo.offload_reference else 0.0
        parts["reference"] = scoring + moved
    if grpo.old_logprobs == "recompute":
        parts["old log-probabilities"] = scoring
    tokens = sum(group.tokens for group in groups)
    parts |= _update(config, model, gpu, gpus, groups, tokens, updates=grpo.minibatches)
    if config.zero.stage == 3:
        parts["sync"] = SIZE * _count(model) / _link(gpu, gpus)
    return Estimate(parts, config.steps, rows)


def _rollout(
    config: RlvrConfig, model: ModelConfig, gpu: Gpu, gpus: int, lengths: Lengths, cache: int
) -> tuple[int, float]:
    """Samples at a time on a GPU, and the seconds of all."""
    rollout = config.rollout
    samples = ceil(rollout.prompts * rollout.samples / gpus)
    token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * SIZE
    # A group's prompt lies in the cache once.
    each = lengths.prompt / rollout.samples + lengths.judgment
    rows = max(1, min(samples, int(cache / (token * each))))
    weights = SIZE * (body_size(model) + head_size(model))
    context = lengths.prompt + lengths.judgment / 2
    reads = (weights + rows * context * token) / (gpu.bandwidth * BANDWIDTH_SHARE)
    products = 2 * (weights / SIZE) * rows / (gpu.flops * GEMM_SHARE)
    steps = samples * lengths.judgment / rows
    prompts = [Group(lengths.prompt, ())] * ceil(rollout.prompts / gpus)
    prefill = forward_flops(model, prompts) / (gpu.flops * GEMM_SHARE)
    return rows, prefill + steps * (max(reads, products) + STEP_SECONDS)


def _update(
    config: SftConfig | RlvrConfig,
    model: ModelConfig,
    gpu: Gpu,
    gpus: int,
    groups: list[Group],
    tokens: int,
    updates: int = 1,
) -> dict[str, float]:
    """Forward and backward, what ranks exchange, and the optimiser, of all updates of a step."""
    flops = training_flops(model, groups)
    if config.recompute == "layer":
        flops += forward_flops(model, groups)
    parts = {"forward and backward": flops / (gpu.flops * GEMM_SHARE * gpus)}
    count, stage = _count(model), config.zero.stage
    if gpus > 1:
        micro = max(updates, ceil(tokens / gpus / config.max_micro_tokens))
        # Gradients in fp32: once an update, or under stages 2 and 3 with each micro-batch; weights
        # once an update, or under stage 3 for each pass forward and backward.
        gradients = 4 * count * (micro if stage > 1 else updates)
        weights = SIZE * count * (2 * micro if stage == 3 else updates)
        parts["exchange"] = (gradients + weights) / _link(gpu, gpus)
    if config.zero.offload_optimizer and gpus > 1:
        own = count / gpus
        moved = own * (4 + SIZE) / gpu.host
        parts["optimiser on the host"] = updates * (moved + own / ADAM_PER_SECOND)
    else:
        share = count / (gpus if gpus > 1 else 1)
        parts["optimiser"] = updates * share * 28 / (gpu.bandwidth * BANDWIDTH_SHARE)
    return parts


def _count(model: ModelConfig) -> int:
    words = (1 if model.tie_word_embeddings else 2) * head_size(model)
    return body_size(model) + words


def _link(gpu: Gpu, gpus: int) -> float:
    """Bytes/s between ranks: within a node, or the slower way between nodes."""
    return (gpu.link if gpus <= NODE else gpu.network) * LINK_SHARE
