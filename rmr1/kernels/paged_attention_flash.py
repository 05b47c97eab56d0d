"""Attention over a paged cache by flash-attn, where it is installed. Never run: no GPU has been
there yet; the tests show only that it is called as its documentation asks.

Chosen unasked for fp16 and bf16 on a GPU when the cache's blocks are what it demands; forcing
"triton" takes the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

# flash-attn pages its cache since 2.5.0 (Dao-AILab/flash-attention, commit 54e80a3 for
# flash_attn_with_kvcache, pull request 831 for flash_attn_varlen_func). Its flash_api.cpp refuses a
# page size that is no multiple of 256 ("Paged KV cache block size must be divisible by 256"; the
# build for ROCm asks for 128, issue 1579), heads above 256 and chips before sm_80, and it copies
# the whole cache for a head size that is no multiple of 8.
PAGE = 256
LARGEST_HEAD = 256

Function = Callable[..., Tensor]


@cache
def functions() -> tuple[Function, Function] | None:
    """flash_attn_with_kvcache and flash_attn_varlen_func, or None where flash-attn is missing."""
    try:
        from flash_attn import (  # type: ignore[import-not-found]
            flash_attn_varlen_func,
            flash_attn_with_kvcache,
        )
    except ImportError:
        return None
    return flash_attn_with_kvcache, flash_attn_varlen_func


def suits(q: Tensor, key_cache: Tensor) -> bool:
    """Whether flash-attn is there and takes these."""
    dim = q.shape[2]
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and key_cache.shape[1] % PAGE == 0
        and dim % 8 == 0
        and dim <= LARGEST_HEAD
        and key_cache.stride(3) == 1
        and len(q) > 0
        and (torch.version.hip is not None or torch.cuda.get_device_capability(q.device) >= (8, 0))
        and functions() is not None
    )


def attend(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    *,
    longest_query: int,
    scale: float,
) -> Tensor:
    """As `paged_attention`; out [T, N, D]."""
    found = functions()
    assert found is not None
    with_kvcache, varlen = found
    sequences, width = block_tables.shape
    if longest_query == 1 and len(q) == sequences:
        out = with_kvcache(
            q[:, None], key_cache, value_cache, cache_seqlens=context_lengths,
            block_table=block_tables, softmax_scale=scale, causal=True,
        )  # fmt: skip
        return out[:, 0]
    # The lengths of the keys are asked for as starts, though the keys are paged.
    key_starts = pad(context_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return varlen(
        q, key_cache, value_cache, query_starts, key_starts,
        # With one query at most it would take T for S.
        max_seqlen_q=max(2, longest_query), max_seqlen_k=width * key_cache.shape[1],
        softmax_scale=scale, causal=True, block_table=block_tables,
    )  # fmt: skip
