"""How long a step may take, from a roofline model: no measurement, and it says what it assumes.

Each part takes the longer of its products and its reads, at a share of the GPU's rates
(rmr1/gpus.py): products at that of the recipe's dtype, reads of its numbers' size. Prompts and
judgments are taken as equally long. Nothing overlaps but what a part does itself.
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

PROMPT, JUDGMENT = 1200, 800  # mean tokens unless they are given; the second is the paper's
TRACES = 8753  # the paper's


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


def lengths_of(
    config: SftConfig | RlvrConfig, model: ModelConfig, prompt: int | None, judgment: int | None
) -> Lengths:
    """Mean lengths as given, or usual ones as far as the recipe's caps let them be.

    ValueError where one that is given is above its cap: no such mean can come of that recipe.
    """
    positions = model.max_position_embeddings
    if isinstance(config, RlvrConfig):
        most = config.rollout.max_new_tokens
        longest, cap = positions, f"rollout.max_new_tokens ({most})"
        room = positions - most
    else:
        longest = min(config.max_length, positions)
        most, room = longest - 1, longest - 1
        cap = f"max_length ({config.max_length})"
    if room < 1:
        raise ValueError(
            f"{cap} leaves a prompt none of the model's {positions} positions; lower it"
        )
    room = min(room, config.max_prompt_tokens)
    if prompt is not None and prompt > room:
        raise ValueError(
            f"--prompt_tokens {prompt} is more than the {room} that the recipe and the model allow"
            f" (max_prompt_tokens {config.max_prompt_tokens}, {cap}, {positions} positions)"
        )
    mean = min(PROMPT, room) if prompt is None else prompt
    most = min(most, longest - mean)
    if judgment is not None and judgment > most:
        raise ValueError(
            f"--judgment_tokens {judgment} is more than the {most} that the recipe and the model"
            f" allow after a prompt of {mean} ({cap}, {positions} positions)"
        )
    return Lengths(mean, min(JUDGMENT, most) if judgment is None else judgment)


def number_size(config: SftConfig | RlvrConfig) -> int:
    """Bytes of a weight, an activation or a cached key."""
    return 4 if config.dtype == "float32" else 2


def _rate(config: SftConfig | RlvrConfig, gpu: Gpu) -> float:
    """FLOP/s that products are taken to reach."""
    return (gpu.flops32 if config.dtype == "float32" else gpu.flops) * GEMM_SHARE


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
    rate = _rate(config, gpu) * gpus
    rows, drawing = _rollout(config, model, gpu, gpus, lengths, cache)
    parts = {"rollout": drawing}
    scoring = forward_flops(model, groups) / rate
    if grpo.beta:
        moved = (
            number_size(config) * _count(model) * 2 / gpu.host if grpo.offload_reference else 0.0
        )
        parts["reference"] = scoring + moved
    if grpo.old_logprobs == "recompute":
        parts["old log-probabilities"] = scoring
    tokens = sum(group.tokens for group in groups)
    parts |= _update(config, model, gpu, gpus, groups, tokens, updates=grpo.minibatches)
    if config.zero.stage == 3:
        parts["sync"] = number_size(config) * _count(model) / _link(gpu, gpus)
    return Estimate(parts, config.steps, rows)


def _rollout(
    config: RlvrConfig, model: ModelConfig, gpu: Gpu, gpus: int, lengths: Lengths, cache: int
) -> tuple[int, float]:
    """Samples at a time on a GPU, and the seconds of all."""
    rollout, size, rate = config.rollout, number_size(config), _rate(config, gpu)
    samples = ceil(rollout.prompts * rollout.samples / gpus)
    token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * size
    # A group's prompt lies in the cache once.
    each = lengths.prompt / rollout.samples + lengths.judgment
    rows = max(1, min(samples, int(cache / (token * each))))
    weights = size * (body_size(model) + head_size(model))
    context = lengths.prompt + lengths.judgment / 2
    reads = (weights + rows * context * token) / (gpu.bandwidth * BANDWIDTH_SHARE)
    products = 2 * (weights / size) * rows / rate
    steps = samples * lengths.judgment / rows
    prompts = [Group(lengths.prompt, ())] * ceil(rollout.prompts / gpus)
    prefill = forward_flops(model, prompts) / rate
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
    parts = {"forward and backward": flops / (_rate(config, gpu) * gpus)}
    count, stage, size = _count(model), config.zero.stage, number_size(config)
    if gpus > 1:
        micro = max(updates, ceil(tokens / gpus / config.max_micro_tokens))
        # Gradients in fp32: once an update, or under stages 2 and 3 with each micro-batch; weights
        # once an update, or under stage 3 for each pass forward and backward.
        gradients = 4 * count * (micro if stage > 1 else updates)
        weights = size * count * (2 * micro if stage == 3 else updates)
        parts["exchange"] = (gradients + weights) / _link(gpu, gpus)
    if config.zero.offload_optimizer and gpus > 1:
        own = count / gpus
        moved = own * (4 + size) / gpu.host
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
