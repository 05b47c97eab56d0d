"""How much memory training will take, by part, before anything runs.

Counted from shapes: what the optimiser keeps, and what the backward pass keeps of a micro-batch.
Measured against real updates in tests/test_memory_plan.py.

Legend: T tokens of a micro-batch, R of them predicted, H hidden size, N query heads, K key/value
heads, D head size, I MLP size, V words.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass

import torch

from rmr1.engine.model_config import ModelConfig
from rmr1.engine.optim_config import Recompute, ZeroConfig


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = [f"{name} {size / 1e9:.3g}" for name, size in asdict(self).items() if size]
        return f"training memory: {', '.join(parts)}: {self.total / 1e9:.3g} GB"


def plan_training(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    micro_tokens: int,
    reference: bool,
    recompute: Recompute = "elementwise",
    recompute_layers: int | None = None,
    ranks: int = 1,
    zero: ZeroConfig | None = None,
) -> MemoryPlan:
    """What a model takes on a rank, with AdamW and micro-batches of at most `micro_tokens` tokens.

    Moments, gradients and, for weights in 16 bits, their copies are in fp32. ZeRO shards the
    optimiser's state, from stage 2 on the gradients, and in stage 3 the weights, beside a whole
    copy of which the generator then has its own.
    """
    count, size = parameters(config), dtype.itemsize
    stage = (zero or ZeroConfig()).stage if ranks > 1 else 0
    on_host = stage > 0 and zero is not None and zero.offload_optimizer
    state = 2 * 4 * count + (4 * count if size < 4 else 0)
    return MemoryPlan(
        weights=count * size * (ranks + 1 if stage == 3 else ranks) // ranks,
        gradients=4 * count // (ranks if stage > 1 else 1),
        optimizer=0 if on_host else state // ranks,
        reference=count * size if reference else 0,
        activations=micro_tokens * activation_bytes(config, dtype, recompute, recompute_layers),
    )


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
    """Bytes that the backward pass needs for one token.

    Of a layer: its input and the sum after attention, both normed too; q, k and v, attention's
    result with the log-sum-exp of each head; gate, up and their product. One layer more is there
    in passing, while its gradients are made; and a few hidden states around all layers.
    """
    hidden, size = config.hidden_size, dtype.itemsize
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    norms = queries + keys if config.qk_norm else 0  # before the norms of heads
    inner = config.intermediate_size * size
    normed = 2 * hidden * size
    whole = (4 * hidden + 2 * queries + 2 * keys + norms) * size + 3 * inner
    whole += 4 * config.num_attention_heads
    kept = {
        "none": whole,
        "elementwise": whole - normed - inner,
        "mlp": whole - normed - 3 * inner,
        "layer": hidden * size,
    }[recompute]
    layers = config.num_hidden_layers
    some = layers if recompute_layers is None else min(recompute_layers, layers)
    return some * kept + (layers - some) * whole + 2 * whole + 4 * hidden * size


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024  # there it is in bytes
