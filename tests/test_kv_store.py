"""Keys and values into a paged cache, in every implementation, and how the cache lies in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.kv_store import kv_store, native_layout, new_cache
from rmr1.kernels.paged_attention import paged_attention

SIZES = [(1, 1, 2, 1), (17, 3, 8, 3), (40, 2, 64, 16), (33, 1, 80, 32), (9, 5, 6, 20)]
CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def caches(blocks: int, block_size: int, heads: int, dim: int, layout: str) -> list[Tensor]:
    """One layer's caches: as `new_cache` makes them on a CPU, plain, or in no order at all."""
    if layout == "cpu":
        return [cache[0] for cache in new_cache(1, blocks, block_size, heads, dim, **CPU)]
    if layout == "plain":
        return [torch.zeros(blocks, block_size, heads, dim) for _ in "kv"]
    return [torch.zeros(dim, heads, 2 * blocks, block_size).permute(2, 3, 1, 0)[::2] for _ in "kv"]


def assert_stored(
    tokens: int, heads: int, dim: int, block_size: int, layout: str, backend: Any
) -> None:
    torch.manual_seed(tokens)
    # Values as in one projection of q, k and v; every third token is padding.
    key, value = torch.randn(tokens, heads, dim), torch.randn(tokens, 3 * heads, dim)[:, heads:]
    value = value[:, :heads]
    blocks = tokens // block_size + 3
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[2::3] = -1
    found = caches(blocks, block_size, heads, dim, layout)
    with use(backend):
        kv_store(key, value, *found, slots)
    for given, cache in zip((key, value), found, strict=True):
        wanted = torch.zeros(blocks * block_size, heads, dim)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[slot] = given[token]
        assert torch.equal(cache.reshape(wanted.shape), wanted)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("layout", ["cpu", "plain", "any"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("tokens", "heads", "dim", "block_size"), SIZES)
def test_every_token_lies_in_its_slot(
    tokens: int, heads: int, dim: int, block_size: int, backend: Any, layout: str
) -> None:
    assert_stored(tokens, heads, dim, block_size, layout, backend)


@pytest.mark.parametrize(("tokens", "heads", "dim", "block_size"), SIZES)
def test_native(tokens: int, heads: int, dim: int, block_size: int, isa: str) -> None:
    assert_stored(tokens, heads, dim, block_size, "cpu", "native")


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_nothing_to_store(backend: Any) -> None:
    keys, values = caches(2, 4, 3, 8, "cpu")
    nothing = torch.zeros(0, 3, 8)
    with use(backend):
        kv_store(nothing, nothing, keys, values, torch.zeros(0, dtype=torch.int64))
        skipped = torch.ones(2, 3, 8)
        kv_store(skipped, skipped, keys, values, torch.tensor([-1, -7]))
    assert not keys.any()
    assert not values.any()


def test_16_bit_and_other_layouts_go_to_the_reference() -> None:
    key = torch.randn(3, 2, 8).bfloat16()
    slots = torch.tensor([5, 0, 3])
    pair = new_cache(1, 2, 4, 2, 8, dtype=torch.bfloat16, device="cpu")
    kv_store(key, key, pair[0][0], pair[1][0], slots)
    assert torch.equal(pair[0][0].reshape(8, 2, 8)[slots], key)
    plain = caches(2, 4, 2, 8, "plain")
    kv_store(key.float(), key.float(), *plain, slots)
    assert torch.equal(plain[1].reshape(8, 2, 8)[slots], key.float())
    with use("native"), pytest.raises(ValueError, match="the native kernels were forced"):
        kv_store(key.float(), key.float(), *plain, slots)


# --- The cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 16, 20])
def test_how_a_cache_lies_on_a_cpu(block_size: int) -> None:
    keys, values = new_cache(2, 5, block_size, 3, 8, **CPU)
    assert keys.shape == values.shape == (2, 5, block_size, 3, 8)
    padded = -(-block_size // 16) * 16
    assert keys.stride() == (5 * 3 * 8 * padded, 3 * 8 * padded, 1, 8 * padded, padded)
    assert values.permute(0, 1, 3, 2, 4).is_contiguous()
    assert keys.data_ptr() % 64 == values.data_ptr() % 64 == 0
    assert not keys.any()
    assert not values.any()
    assert all(native_layout(keys[layer], values[layer]) for layer in range(2))
    assert not native_layout(keys[0].clone(), values[0].contiguous())


def foreign(blocks: int, block_size: int, spare: int) -> list[Tensor]:
    """A layer's caches that lie as `new_cache` makes them, with `spare` floats behind the keys."""
    shape = (blocks, 3, 8, -(-block_size // 16) * 16)
    keys = torch.zeros(math.prod(shape) + spare)[: math.prod(shape)].view(shape)
    values = torch.zeros(blocks, 3, block_size, 8)
    return [keys.permute(0, 3, 1, 2)[:, :block_size], values.permute(0, 2, 1, 3)]


@pytest.mark.parametrize("block_size", [15, 16, 31])
def test_keys_without_room_behind_them_are_not_for_the_native_kernels(block_size: int) -> None:
    """The native attention reads vectors of 16 keys, from any key on."""
    assert native_layout(*foreign(2, block_size, 16))
    key, slots = torch.randn(3, 3, 8), torch.tensor([2 * block_size - 1, 0, 5])
    for spare in (0, 15):
        keys, values = foreign(2, block_size, spare)
        assert not native_layout(keys, values)
        kv_store(key, -key, keys, values, slots)
        assert torch.equal(keys.reshape(-1, 3, 8)[slots], key)
        assert torch.equal(values.reshape(-1, 3, 8)[slots], -key)
        with use("native"), pytest.raises(ValueError, match="the native kernels were forced"):
            kv_store(key, key, keys, values, slots)
    whole = new_cache(1, 2, block_size, 3, 8, **CPU)
    assert native_layout(whole[0][0], whole[1][0])
    copy = [cache[0].clone(memory_format=torch.preserve_format) for cache in whole]
    assert not native_layout(*copy)


@pytest.mark.parametrize("spare", [0, 16])
def test_attention_over_a_foreign_cache(spare: int) -> None:
    """The 65th key is the fifth of the last block: 16 from there on are more than a block has."""
    torch.manual_seed(spare)
    keys, values = foreign(5, 15, spare)
    key, value, q = torch.randn(75, 3, 8), torch.randn(75, 3, 8), torch.randn(1, 3, 8)
    kv_store(key, value, keys, values, torch.arange(75))
    tables, contexts, starts = (
        torch.tensor(x, dtype=torch.int32) for x in ([[0, 1, 2, 3, 4]], [75], [0, 1])
    )
    found = paged_attention(q, keys, values, tables, contexts, starts, longest_query=1)
    weights = (torch.einsum("qnd,knd->nqk", q, key) / 8**0.5).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("nqk,knd->qnd", weights, value))


def test_a_cache_elsewhere_is_contiguous() -> None:
    for cache in new_cache(2, 5, 3, 4, 8, dtype=torch.float16, device="meta"):
        assert cache.shape == (2, 5, 3, 4, 8)
        assert cache.is_contiguous()


def test_memory_is_taken_when_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    keys, _ = new_cache(4, 1024, 16, 8, 128, **CPU)  # 256 MB each
    assert keys.numel() * 4 == 2**28
    assert resident() - before < 2**24
    keys[0] = 1.0
    assert resident() - before > 2**25


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_bad_input(backend: Any) -> None:
    keys, values = caches(2, 4, 3, 8, "cpu")
    key, slots = torch.zeros(5, 3, 8), torch.arange(5)
    good: dict[str, Any] = {
        "key": key, "value": key, "key_cache": keys, "value_cache": values, "slots": slots
    }  # fmt: skip
    cases: list[tuple[dict[str, Any], str]] = [
        ({"key_cache": keys[0]}, r"one layer's, \[blocks, block_size, K, D\].*got \[4, 3, 8\]"),
        ({"value_cache": values[:1]}, r"one layer's.* and \[1, 4, 3, 8\]"),
        ({"key_cache": keys[:0], "value_cache": values[:0]}, r"no size of 0, got \[0, 4, 3, 8\]"),
        ({"key": key[0]}, r"key and value must be \[T, K, D\].*got \[3, 8\]"),
        ({"value": key[1:]}, r"key and value .*\[4, 3, 8\]"),
        ({"key": key[:, :2], "value": key[:, :2]}, r"key and value .*\[5, 2, 8\]"),
        ({"value": key.half()}, "value must be torch.float32 on cpu like key, .*float16"),
        ({"key_cache": keys.double()}, "key_cache must be torch.float32 .*float64"),
        ({"value_cache": values.to("meta")}, "value_cache must be .*on meta"),
        ({"key": key.long()}, "key must be floating, got torch.int64"),
        ({"key": torch.zeros(5, 3, 8, requires_grad=True)}, "key wants a gradient"),
        ({"slots": slots[1:]}, r"slots must be \[T\] int64 .*T = 5, got \[4\]"),
        ({"slots": slots.int()}, "slots must be .*int32"),
        ({"slots": slots.to("meta")}, "slots must be .*on meta"),
        ({"slots": slots + 4}, "slots must be below 8, 2 blocks of 4, got 8"),
    ]
    for change, words in cases:
        with use(backend), pytest.raises(ValueError, match=words):
            kv_store(**{**good, **change})


def test_no_cache_of_nothing() -> None:
    with pytest.raises(ValueError, match="new_cache: blocks must be at least 1, got 0"):
        new_cache(1, 0, 16, 1, 8, **CPU)
    with pytest.raises(ValueError, match=r"new_cache: dtype must be floating, got torch\.int8"):
        new_cache(1, 1, 16, 1, 8, dtype=torch.int8, device="cpu")
