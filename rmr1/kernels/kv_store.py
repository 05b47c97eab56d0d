"""Keys and values of new tokens into a paged cache, and the cache itself.

A cache is seen as [blocks, block_size, K, D], one such a layer; a token's slot is
block * block_size + offset. What lies underneath is what the attention of a device wants to read:

- On a GPU keys and values lie as they are seen, as flash-attn's paged cache does.
- On a CPU keys lie as [blocks, K, D, P], P being block_size rounded up to a multiple of 16, so that
  one dimension of 16 keys is one vector; values lie as [blocks, K, block_size, D].

Shapes: T tokens, K key/value heads, D head size.
Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention" (arXiv 2309.06180).
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels.dispatch import choose

# Keys of a block on a CPU are padded to a multiple of this: floats of an AVX-512 register. The
# native attention reads so many at a time, from any key on, so as much has to lie behind the last.
LANES = 16


def new_cache(
    layers: int,
    blocks: int,
    block_size: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Zeroed caches of keys and of values, both seen as [layers, blocks, block_size, K, D].

    Zeros, not garbage: a position behind a mask has weight 0, and 0 * NaN would still be NaN. On a
    CPU a page takes memory only once it is written.

    Raises:
        ValueError: a size below 1, or a dtype that is not floating.
    """
    sizes = {"layers": layers, "blocks": blocks, "block_size": block_size}
    sizes |= {"heads": heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"new_cache: {name} must be at least 1, got {size}.")
    if not dtype.is_floating_point:
        raise ValueError(f"new_cache: dtype must be floating, got {dtype}.")
    device = torch.device(device)
    if device.type != "cpu":
        shape = (layers, blocks, block_size, heads, head_dim)
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")  # type: ignore[return-value]
    keys = _zeros((layers, blocks, heads, head_dim, _padded(block_size)), dtype)
    values = _zeros((layers, blocks, heads, block_size, head_dim), dtype)
    return keys.permute(0, 1, 4, 2, 3)[:, :, :block_size], values.permute(0, 1, 3, 2, 4)


def reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """The op in plain torch."""
    live = slots >= 0
    place = (slots[live] // key_cache.shape[1], slots[live] % key_cache.shape[1])
    key_cache[place] = key[live]
    value_cache[place] = value[live]


def kv_store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Write keys and values of T tokens into their slots of one layer's cache, in place.

    Args:
        key, value: [T, K, D], any floating dtype; tokens may be any distance apart.
        key_cache, value_cache: [blocks, block_size, K, D] in the dtype of key: a layer of
            `new_cache`, or others of any strides.
        slots: [T] int64, block * block_size + offset, all different; a token with a negative one is
            skipped, such as the padding of a CUDA graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; tensors that want a gradient;
            on a CPU, a slot past the end (on a GPU slots are not looked at).
    """
    _check(key, value, key_cache, value_cache, slots)
    native = key.dtype == torch.float32 and native_layout(key_cache, value_cache)
    backend = choose("kv_store", key, native=native)
    if backend == "reference":
        reference(key, value, key_cache, value_cache, slots)
        return
    key, value = heads_contiguous(key), heads_contiguous(value)
    if backend == "triton":
        from rmr1.kernels import kv_store_triton

        kv_store_triton.store(key, value, key_cache, value_cache, slots)
    else:
        _C.kv_store(key, value, key_cache, value_cache, slots.contiguous(), torch.get_num_threads())


def native_layout(key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether a layer's caches lie as the native kernels want them: as `new_cache` makes them, with
    room behind the last keys, which others' memory may lack.
    """
    blocks, size, heads, dim = key_cache.shape
    padded = _padded(size)
    end = key_cache.storage_offset() + blocks * heads * dim * padded + LANES
    return (
        key_cache.device.type == "cpu"
        and dim > 1  # DLPack, the way into C++, does not tell the stride of an axis of one
        and key_cache.stride() == (heads * dim * padded, 1, dim * padded, padded)
        and value_cache.stride() == (heads * size * dim, dim, size * dim, 1)
        and key_cache.untyped_storage().nbytes() >= end * key_cache.itemsize
    )


def heads_contiguous(x: Tensor) -> Tensor:
    """x [T, heads, D] with heads next to each other; tokens may be further apart, as in one
    projection of q, k, v.
    """
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def check_caches(op: str, key_cache: Tensor, value_cache: Tensor) -> None:
    """ValueError unless both are a layer's cache, [blocks, block_size, K, D]."""
    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape or 0 in key_cache.shape:
        raise ValueError(
            f"{op}: key_cache and value_cache must be one layer's, [blocks, block_size, K, D] with"
            f" no size of 0, got {list(key_cache.shape)} and {list(value_cache.shape)}."
        )


def check_alike(op: str, tensors: dict[str, Tensor]) -> None:
    """ValueError unless all have one floating dtype and one device, and want no gradient."""
    (first, x), *_ = tensors.items()
    if not x.is_floating_point():
        raise ValueError(f"{op}: {first} must be floating, got {x.dtype}.")
    for name, other in tensors.items():
        if other.dtype != x.dtype or other.device != x.device:
            raise ValueError(
                f"{op}: {name} must be {x.dtype} on {x.device} like {first}, got {other.dtype} on"
                f" {other.device}."
            )
        if other.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} wants a gradient, and there is none; call it under torch.no_grad()."
            )


def _padded(block_size: int) -> int:
    return -(-block_size // LANES) * LANES


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on a CPU that take memory page by page, as they are written; with room for one more
    vector in the storage (`native_layout`).

    Not through numpy, which asks for huge pages: a cache in use here and there then takes several
    times the memory, and every new page is a pause of a millisecond (docs/results.md).
    """
    count = math.prod(shape)
    size = (count + LANES) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)[:count].view(shape)


def _check(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    check_caches("kv_store", key_cache, value_cache)
    if key.ndim != 3 or key.shape != value.shape or key.shape[1:] != key_cache.shape[2:]:
        raise ValueError(
            f"kv_store: key and value must be [T, K, D] for a cache [blocks, block_size, K, D], got"
            f" {list(key.shape)}, {list(value.shape)} and {list(key_cache.shape)}."
        )
    tensors = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    check_alike("kv_store", tensors)
    if slots.shape != key.shape[:1] or slots.dtype != torch.int64 or slots.device != key.device:
        raise ValueError(
            f"kv_store: slots must be [T] int64 on {key.device} with T = {len(key)}, got"
            f" {list(slots.shape)} {slots.dtype} on {slots.device}."
        )
    end = key_cache.shape[0] * key_cache.shape[1]
    if slots.device.type == "cpu" and len(slots) and (last := int(slots.max())) >= end:
        raise ValueError(
            f"kv_store: slots must be below {end}, {key_cache.shape[0]} blocks of"
            f" {key_cache.shape[1]}, got {last}."
        )
