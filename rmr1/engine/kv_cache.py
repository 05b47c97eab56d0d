"""The tensors of the paged KV cache: blocks of `block_size` tokens, for all layers.

`block_pool.py` says which block holds what, `rmr1/kernels/kv_store.py` how a block lies in memory.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rmr1.engine.cache_plan import CachePlan
from rmr1.engine.model_config import ModelConfig
from rmr1.kernels.kv_store import new_cache


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it; on a CPU the array itself."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def cache_dtype(weight: Tensor) -> torch.dtype:
    """In what keys and values of a model with this head are kept.

    On a CPU weights of 16 bits are no reason to keep keys in 16: its kernels compute in fp32, and
    would convert the whole context for every token.
    """
    narrow = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if weight.device.type == "cpu" and narrow else weight.dtype


class PagedCache:
    """Keys and values, each seen as [layers, blocks, block_size, K, D].

    `like`: the model's head, see `cache_dtype`.
    """

    def __init__(self, config: ModelConfig, plan: CachePlan, like: Tensor) -> None:
        self.plan = plan
        self.keys, self.values = new_cache(
            config.num_hidden_layers,
            plan.blocks,
            plan.block_size,
            config.num_key_value_heads,
            config.head_dim,
            dtype=cache_dtype(like),
            device=like.device,
        )

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, from and to: before a sequence writes to one that others use."""
        if not pairs:
            return
        source, target = upload(np.array(pairs, dtype=np.int64), self.keys.device).unbind(1)
        for cache in (self.keys, self.values):
            cache[:, target] = cache[:, source]
