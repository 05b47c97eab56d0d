"""How much KV cache there may be, planned before anything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rmr1.engine.model_config import ModelConfig

# A share of what is free: training needs the rest.
DEFAULT_SHARE = 0.4
# Tokens of a block, unless a generator is told another number.
BLOCK_SIZE = 16
# The most sequences of a generator that run at once; a GPU needs more of them to be busy.
MOST_ROWS = {"cpu": 256, "cuda": 1024}
# Tokens of a step. On a CPU a larger one computes nothing faster, and keeps the first token of
# others waiting; on a GPU this is what a generator takes unless it is told otherwise.
MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits are made for at most so many words at a time: 64 MB in fp32, on a GPU 1 GB.
MOST_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, as far as the system tells."""
    if device.type == "cuda":
        # What torch keeps for later is free for us too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts the page cache as free, which sysconf does not
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (value := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(value) - int(used.read_text())))
    return free


def default_budget(device: torch.device) -> int:
    """Bytes of KV cache where nobody gave a number."""
    return int(free_memory(device) * DEFAULT_SHARE)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How many blocks of how many tokens; `budget` bytes were there for them."""

    blocks: int
    block_size: int
    token_bytes: int
    budget: int

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return self.blocks * self.block_size

    @property
    def total_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.tokens * self.token_bytes

    def __str__(self) -> str:
        return (
            f"KV cache: {self.blocks:,} blocks of {self.block_size} tokens = {self.tokens:,}"
            f" tokens, {self.total_bytes / 1e9:.3g} GB of {self.budget / 1e9:.3g} GB allowed"
            f" ({self.token_bytes:,} bytes a token)"
        )


def plan_cache(*, budget: int, token_bytes: int, block_size: int, most_blocks: int) -> CachePlan:
    """As many blocks as fit `budget` bytes, and no more than `most_blocks`, which find a use."""
    fitting = budget // (token_bytes * block_size)
    return CachePlan(min(fitting, most_blocks), block_size, token_bytes, budget)


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


def check_fits(prompt: int, max_new_tokens: int, plan: CachePlan) -> None:
    """Raise ValueError with the numbers where one sequence is longer than the whole cache."""
    # The last token drawn is never attended to.
    needed = blocks_for(prompt + max_new_tokens - 1, plan.block_size)
    if needed > plan.blocks:
        raise ValueError(
            f"a prompt of {prompt} tokens and max_new_tokens={max_new_tokens} need"
            f" {needed * plan.block_size * plan.token_bytes / 1e9:.3g} GB of KV cache ({needed}"
            f" blocks of {plan.block_size} tokens), and {plan.blocks} blocks of"
            f" {plan.budget / 1e9:.3g} GB are available; raise kv_memory_gb or shorten them"
        )
