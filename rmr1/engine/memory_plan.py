"""How much memory training will take of a device, by part, before anything runs.

Counted from shapes, without a model: what stays, what each phase of a step adds to it, and what
DeepSpeed (0.19) keeps for itself. Measured against real updates in tests/test_memory_plan.py.

Legend: T tokens of a micro-batch, H hidden size, N query heads, K key/value heads, D head size,
I MLP size, V words.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rmr1.engine.cache_plan import (
    BLOCK_SIZE,
    DEFAULT_SHARE,
    MOST_LOGITS,
    MOST_ROWS,
    MOST_TOKENS,
    blocks_for,
    bytes_per_token,
    plan_cache,
)
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.optim_config import Recompute, ZeroConfig
from rmr1.kernels.token_loss_cpu import CHUNK_BYTES

Device = Literal["cpu", "cuda"]

# Of token_loss_triton and token_logprob_triton, which cannot be imported everywhere.
GPU_CHUNK_BYTES, GPU_STRIP_BYTES = 2 * 1024**3, 256 * 1024**2
# DeepSpeed's defaults, in numbers: what is reduced at once, and what stage 3 has gathered at most.
_BUCKET, _GATHERED = 500_000_000, 1_000_000_000


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part, in each phase of a step; the parts of a phase sum to what it takes at most."""

    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """The one that takes the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Of that phase."""
        return self.phases[self.phase]

    @property
    def total(self) -> int:
        """Of these parts: what training needs."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = [f"{name} {size / 1e9:.3g}" for name, size in self.parts.items() if size]
        return f"training memory: {', '.join(parts)}: {self.total / 1e9:.3g} GB in the {self.phase}"


def plan_training(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    micro_tokens: int,
    device: Device = "cpu",
    recompute: Recompute = "elementwise",
    recompute_layers: int | None = None,
    per_token: bool = True,
    ranks: int = 1,
    zero: ZeroConfig | None = None,
    reference: Literal["none", "resident", "offloaded"] = "none",
    rollout_tokens: int = 0,
    release: bool = False,
    kv_memory: int | None = None,
    device_memory: int = 0,
) -> MemoryPlan:
    """What a model takes on a rank, with AdamW and several micro-batches an update.

    Args:
        micro_tokens: T, of the largest micro-batch.
        per_token: whether the gradient comes with the forward, see `Trainer.update`.
        reference: a model that scores; `offloaded`, it is there only while it does.
        rollout_tokens: what samples that run at the same time have in the KV cache at most; 0
            where nothing is generated.
        release: whether the generator's memory is given back while nothing is generated.
        kv_memory: bytes of the KV cache; None: its share of what `device_memory` has left.
        device_memory: bytes of the device, with nothing on it.
    """
    count, size = parameters(config), dtype.itemsize
    zero = zero or ZeroConfig()
    stage = zero.stage if ranks > 1 else 0
    on_host = stage > 0 and device == "cuda" and zero.offload_optimizer
    gradients, always = _gradients(count, size, ranks, stage, on_host, device)
    moments = {} if on_host else {"moments": 8 * count // ranks}
    held = {"weights": count * size // (ranks if stage == 3 else 1)}
    if reference == "resident":
        held["reference"] = count * size
    if (stage or size < 4) and not on_host:
        held["fp32 copies"] = 4 * count // ranks
    generator: dict[str, int] = {}
    if rollout_tokens:
        if stage == 3:
            generator["generator's copy"] = count * size
        # The cache is taken in the first step, when one process has no moments yet.
        taken = sum((held | generator | (moments if stage else {}) | always).values())
        share = int(max(0, device_memory - taken) * DEFAULT_SHARE)
        budget = share if kv_memory is None else kv_memory
        generator["KV cache"] = _cache(config, dtype, device, budget, rollout_tokens)
    held |= moments | always
    rolling = held | generator
    held |= {} if release else generator

    kept = micro_tokens * activation_bytes(config, dtype, recompute, recompute_layers)
    passing = _passing(config, dtype, micro_tokens, device, per_token)
    # A model is loaded whole on each rank, and then shared out.
    loading = {"weights": count * size}
    if reference == "resident":
        loading["reference"] = count * size
    phases = {"load": loading, "update": held | gradients | {"activations": kept} | passing}
    if reference != "none":
        scoring = {"activations": micro_tokens * _forward_bytes(config, dtype)}
        phases["reference"] = held | {"reference": count * size} | scoring
    if rollout_tokens:
        rows = min(MOST_ROWS[device] * config.vocab_size, MOST_LOGITS[device])
        drawing = MOST_TOKENS[device] * _forward_bytes(config, dtype)
        phases["rollout"] = rolling | {"activations": drawing, "logits": 4 * rows}
    return MemoryPlan(phases)


def parameters(config: ModelConfig) -> int:
    """How many numbers a model has; biases and norms of heads, which are few, left out."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size + 2)
    embeddings = 1 if config.tie_word_embeddings else 2
    words = embeddings * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer + words + config.hidden_size


def activation_bytes(
    config: ModelConfig, dtype: torch.dtype, recompute: Recompute, recompute_layers: int | None
) -> int:
    """Bytes a token that the backward pass needs of the forward: of all layers, and a few hidden
    states around them.
    """
    hidden, size = config.hidden_size, dtype.itemsize
    inner, normed = config.intermediate_size * size, 2 * hidden * size
    whole = _layer_bytes(config, dtype)
    kept = {
        "none": whole,
        "elementwise": whole - normed - inner,
        "mlp": whole - normed - 3 * inner,
        "layer": hidden * size,
    }[recompute]
    layers = config.num_hidden_layers
    some = layers if recompute_layers is None else min(recompute_layers, layers)
    return some * kept + (layers - some) * whole + 4 * hidden * size


def _layer_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes a token of a layer that keeps all: its input and the sum after attention, both normed
    too; q, k and v, attention's result with the log-sum-exp of each head; gate, up and product.
    """
    size = dtype.itemsize
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    norms = queries + keys if config.qk_norm else 0  # before the norms of heads
    hidden = 4 * config.hidden_size + 2 * queries + 2 * keys + norms
    return (hidden + 3 * config.intermediate_size) * size + 4 * config.num_attention_heads


def _forward_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes a token where nothing is kept for a backward pass: those of an MLP."""
    return (2 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize


def _passing(
    config: ModelConfig, dtype: torch.dtype, tokens: int, device: Device, per_token: bool
) -> dict[str, int]:
    """What comes and goes while all activations are there, the larger of two: what the head takes;
    or, after it, a layer that is computed anew and its gradients.
    """
    head = _head_bytes(config, dtype, tokens, device, per_token)
    layer = 2 * tokens * _layer_bytes(config, dtype)
    if config.tie_word_embeddings:  # the head's gradient waits for that of the embedding
        layer += config.vocab_size * config.hidden_size * dtype.itemsize
    return {"head": head} if head > layer else {"gradients of a layer": layer}


def _head_bytes(
    config: ModelConfig, dtype: torch.dtype, tokens: int, device: Device, per_token: bool
) -> int:
    """What the head's kernels take, see `token_loss` and, not `per_token`, `token_logprob`."""
    words, size = config.vocab_size, dtype.itemsize
    weight = words * config.hidden_size
    if not per_token:  # its gradient, that of hidden states in fp32, a strip of logits
        strip = min(GPU_STRIP_BYTES, tokens * words * size) if device == "cuda" else 0
        return weight * size + 4 * tokens * config.hidden_size + strip
    logits = GPU_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES
    chunk = words * min(max(1, logits // (4 * words)), tokens)
    # The sum in fp32 beside a chunk's logits; then the gradient of these, then the sum rounded.
    copies = [chunk * size if device == "cuda" else 0, weight * size if size < 4 else 0]
    return 4 * weight + 4 * chunk + max(copies)


def _gradients(
    count: int, size: int, ranks: int, stage: int, on_host: bool, device: Device
) -> tuple[dict[str, int], dict[str, int]]:
    """What there is of gradients in an update; and what DeepSpeed never gives back of it."""
    # On a CPU memory is taken as it is written to.
    bucket = _BUCKET if device == "cuda" else min(count, _BUCKET)
    own = {} if on_host else {"gradients": 4 * count // ranks}
    if stage == 0:  # those in 16 bits are let go of one by one
        return own, {}
    if stage == 1:  # whole, and those in 16 bits stay beside them
        whole = {"gradients": (4 + size if size < 4 else 4) * count}
        passing = {"buckets": 4 * bucket}
        return (passing, whole) if size < 4 and not on_host else (whole | passing, {})
    if stage == 2:  # a bucket has the weights' dtype, and is reduced as a copy in fp32
        if size == 4:  # the sum over micro-batches stands beside the last one's
            own = {name: 2 * taken for name, taken in own.items()}
        return own | {"buckets": bucket * (4 + size if size < 4 else 4)}, {}
    passing = {
        "gathered": min(count, _GATHERED) * size,
        "copy of a bucket": 4 * min(count, _BUCKET),
    }
    return passing, own | {"buckets": 4 * bucket}


def _cache(
    config: ModelConfig, dtype: torch.dtype, device: Device, budget: int, tokens: int
) -> int:
    """The generator's KV cache: on a GPU taken whole, on a CPU in fp32 and as it is used."""
    token = bytes_per_token(config, torch.float32 if device == "cpu" else dtype)
    longest = blocks_for(config.max_position_embeddings, BLOCK_SIZE)
    plan = plan_cache(
        budget=budget,
        token_bytes=token,
        block_size=BLOCK_SIZE,
        most_blocks=MOST_ROWS[device] * longest,
    )
    return plan.total_bytes if device == "cuda" else min(plan.total_bytes, tokens * token)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with what the parent held when it started this process
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024  # there it is in bytes
