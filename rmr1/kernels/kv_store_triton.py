"""Keys and values into a paged cache on a GPU, in Triton: all heads of a token a program.

Shapes: T tokens, K key/value heads, D head size.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case


@triton.jit
def _kernel(
    key, value, key_cache, value_cache, slots, key_stride, value_stride,
    k_block, k_place, k_head, k_dim, v_block, v_place, v_head, v_dim, K, D,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    live = (head < K) & (column < D)
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    at = head * D + column
    k = tl.load(key + token * key_stride + at, mask=live)
    v = tl.load(value + token * value_stride + at, mask=live)
    k_at = block * k_block + place * k_place + head * k_head + column * k_dim
    v_at = block * v_block + place * v_place + head * v_head + column * v_dim
    tl.store(key_cache + k_at, k, mask=live)
    tl.store(value_cache + v_at, v, mask=live)


def store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """As `kv_store`, for key and value with adjacent heads and caches of any strides."""
    tokens, heads, dim = key.shape
    if not tokens:
        return
    rows, columns = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    _kernel[(tokens,)](
        key, value, key_cache, value_cache, slots.contiguous(), key.stride(0), value.stride(0),
        *key_cache.stride(), *value_cache.stride(), heads, dim,
        BLOCK_SIZE=key_cache.shape[1], HEADS=rows, BLOCK=columns,
        num_warps=warps(rows * columns * key.element_size()),
    )  # fmt: skip


def warps(size: int) -> int:
    """So many that a thread of AMD's warps of 64 moves 16 bytes of a token's `size` at once."""
    return min(8, max(1, size // (16 * 64)))


_CACHE_STRIDES = ("k_block", "k_place", "k_head", "v_block", "v_place", "v_head")
_STRIDES = ("key_stride", "value_stride", *_CACHE_STRIDES)


def _case(dtype: str, heads: int, dim: int, block_size: int) -> Case:
    pointers = ("key", "value", "key_cache", "value_cache")
    return Case(
        f"kv_store {dtype} K={heads} D={dim} block={block_size}",
        _kernel,
        {**dict.fromkeys(pointers, f"*{dtype}"), "slots": "*i64",
         **dict.fromkeys((*_STRIDES, "K", "D"), "i32")},
        # A GPU's cache has adjacent dimensions; the launch makes a constant of a stride of 1.
        {"k_dim": 1, "v_dim": 1, "BLOCK_SIZE": block_size, "HEADS": heads, "BLOCK": dim},
        (*pointers, "slots", *_STRIDES, "D"),
        warps=warps(heads * dim * (4 if dtype == "fp32" else 2)),
    )  # fmt: skip


CASES = [
    _case(dtype, heads, dim, block_size)
    for dtype in ("bf16", "fp32")
    for heads, dim, block_size in ((4, 128, 16), (8, 64, 256))
]
