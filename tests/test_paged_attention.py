"""Attention over a paged cache, in every implementation, against plain dense attention in fp64.

Whatever nothing may read is NaN: blocks of no sequence, the rest of a last block, on a CPU the
padding of its keys, and all new memory. Entries of the table past a context are no block at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels import paged_attention_triton
from rmr1.kernels.dispatch import interpreted, use
from rmr1.kernels.kv_store import new_cache
from rmr1.kernels.paged_attention import paged_attention

GARBAGE = (-1, 2**31 - 1)
DECODE = ([1, 15, 16, 17, 1025], [1] * 5)
# Chunks with and without a prefix, next to decoding; a padded row and sequences without a query.
MIXED = ([17, 16, 33, 0, 1025, 40, 20, 0, 5], [17, 1, 16, 1, 30, 0, 1, 0, 5])
SMALL = ([17, 16, 33, 0, 70, 9, 0, 5], [17, 1, 16, 1, 3, 0, 0, 5])


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Batch:
    """Arguments of `paged_attention`, and dense keys and values [context, K, D] by sequence."""

    args: list[Tensor]
    counts: list[int]
    dense: list[tuple[Tensor, Tensor]]

    def run(self, backend: Any, **options: Any) -> Tensor:
        with use(backend):
            return paged_attention(*self.args, longest_query=max([1, *self.counts]), **options)

    def plainly(self, dtype: torch.dtype, scale: float | None = None) -> Tensor:
        """Sequence by sequence, with dense keys."""
        q = self.args[0].to(dtype)
        out, row = torch.zeros_like(q), 0
        for (k, v), count in zip(self.dense, self.counts, strict=True):
            rows, row = slice(row, row + count), row + count
            if not len(k):
                continue
            group = q.shape[1] // k.shape[1]
            k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qnd,knd->nqk", q[rows], k) * (scale or q.shape[2] ** -0.5)
            own = torch.arange(len(k) - count, len(k))[:, None]  # positions of the queries
            scores = scores.masked_fill(torch.arange(len(k)) > own, -torch.inf)
            out[rows] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)
        return out


def batch(
    contexts: list[int],
    counts: list[int],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 8,
    block_size: int = 16,
    shared: list[tuple[int, int, int]] | None = None,
    layout: str = "cpu",
    padding: int = 0,
) -> Batch:
    """`shared`: (a sequence, one before it, how many first blocks both have)."""
    torch.manual_seed(sum(contexts) + dim)
    used = [-(-context // block_size) for context in contexts]
    width, blocks = max(used) + 2, sum(used) + 3
    free = torch.randperm(blocks, dtype=torch.int32)
    tables = torch.tensor(GARBAGE, dtype=torch.int32).repeat(len(used), width)[:, :width].clone()
    common = {sequence: (other, count) for sequence, other, count in shared or []}
    content = torch.full((2, blocks, block_size, heads, dim), torch.nan)
    for sequence, (context, count) in enumerate(zip(contexts, used, strict=True)):
        tables[sequence, :count], free = free[:count], free[count:]
        if sequence in common:
            other, first = common[sequence]
            tables[sequence, :first] = tables[other, :first]
        place = torch.arange(context)
        where = (tables[sequence].long()[place // block_size], place % block_size)
        drawn = torch.randn(2, context, heads, dim)
        content[:, *where] = torch.where(content[:, *where].isnan(), drawn, content[:, *where])
    caches = list(content)
    if layout == "cpu":
        caches = [x[0] for x in new_cache(1, *content.shape[1:], dtype=torch.float32, device="cpu")]
        for cache, values in zip(caches, content, strict=True):
            torch.empty(0).set_(cache.untyped_storage()).fill_(torch.nan)  # its padding too
            cache.copy_(values)
    dense = []
    for row, context in zip(tables.long(), contexts, strict=True):
        place = torch.arange(context)
        k, v = content[:, row[place // block_size], place % block_size]
        dense.append((k, v))
    q = torch.randn(sum(counts) + padding, heads * group, dim)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Batch([q, *caches, tables, torch.tensor(contexts).int(), starts], counts, dense)


def assert_as_exact_as_torch(given: Batch, backend: Any) -> None:
    exact, torchs = given.plainly(torch.float64), given.plainly(torch.float32)
    mine = given.run(backend)
    assert mine.shape == exact.shape
    assert mine.is_contiguous()
    error, yardstick = (mine - exact).abs().max(), (torchs - exact).abs().max()
    assert error <= 2 * yardstick + 1e-6 * exact.abs().max()
    assert exact.abs().max() > 0.1  # not a parity of zeros


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
@pytest.mark.parametrize(("group", "dim"), [(1, 8), (3, 64), (4, 80)])
@pytest.mark.parametrize("sizes", [DECODE, MIXED], ids=["decode", "mixed"])
def test_the_reference(sizes: Any, group: int, dim: int, block_size: int) -> None:
    given = batch(*sizes, group=group, dim=dim, block_size=block_size, layout="plain")
    assert_as_exact_as_torch(given, "reference")


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
@pytest.mark.parametrize(("group", "dim"), [(1, 8), (3, 64), (4, 80), (4, 7)])
@pytest.mark.parametrize("sizes", [DECODE, MIXED], ids=["decode", "mixed"])
def test_native(sizes: Any, group: int, dim: int, block_size: int, isa: str) -> None:
    given = batch(*sizes, group=group, dim=dim, block_size=block_size)
    assert_as_exact_as_torch(given, "native")


@pytest.mark.parametrize(
    ("sizes", "heads", "group", "dim", "block_size", "layout"),
    [
        (DECODE, 1, 3, 64, 16, "cpu"),  # several shares
        (DECODE, 1, 4, 80, 3, "plain"),
        (DECODE, 1, 1, 8, 1, "plain"),
        (([40, 0, 17, 9], [1, 1, 0, 1]), 2, 3, 8, 32, "plain"),
        (([70, 5], [1, 1]), 16, 1, 8, 64, "plain"),  # one share, and a tile in a block
        (SMALL, 2, 3, 8, 16, "cpu"),
        (SMALL, 1, 4, 80, 3, "plain"),
        (SMALL, 1, 1, 64, 1, "plain"),
        (([40, 64], [12, 1]), 1, 17, 8, 64, "plain"),  # more heads than rows of a tile
    ],
)
def test_triton(sizes: Any, heads: int, group: int, dim: int, block_size: int, layout: str) -> None:
    given = batch(*sizes, heads=heads, group=group, dim=dim, block_size=block_size, layout=layout)
    assert_as_exact_as_torch(given, "triton")


# Samples of one prompt, and two prompts with a beginning in common.
SHARED = [(1, 0, 4), (2, 0, 4), (3, 0, 1), (4, 3, 2), (5, 4, 2)]


@pytest.mark.parametrize("counts", [[1] * 6, [1, 5, 1, 1, 0, 20]], ids=["decode", "mixed"])
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_sequences_that_share_blocks(backend: Any, counts: list[int]) -> None:
    given = batch([70, 65, 80, 40, 33, 47], counts, block_size=16, shared=SHARED)
    tables = given.args[3]
    assert torch.equal(tables[2, :4], tables[0, :4])
    assert_as_exact_as_torch(given, backend)


def test_native_with_many_samples_of_long_prompts(isa: str) -> None:
    shared = [(i, i // 8 * 8, 66) for i in range(24) if i % 8]
    contexts = [1100 + 7 * i % 13 for i in range(24)]
    given = batch(contexts, [1] * 24, heads=3, dim=64, block_size=16, shared=shared)
    assert_as_exact_as_torch(given, "native")


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_rows_of_no_context_are_zero(backend: Any) -> None:
    for contexts, counts in (([5, 0, 0], [1, 1, 0]), ([20, 0, 0], [3, 1, 0])):
        out = batch(contexts, counts, padding=2).run(backend)  # and two rows of no sequence
        assert not out[counts[0] : -2].any()
        assert out[: counts[0]].abs().min() > 0


def test_queries_before_the_first_position_see_nothing_on_a_gpu() -> None:
    """Where nobody looks at values: zeros, as flash-attn gives, and no NaN."""
    given = batch([3, 20], [3, 2])
    wanted = given.plainly(torch.float64)
    q, keys, values, tables, contexts, starts = given.args
    longer = torch.cat([torch.randn(4, *q.shape[1:]), q])  # 7 queries, 3 keys
    starts, out = starts + 4, torch.zeros_like(longer)
    starts[0] = 0
    paged_attention_triton.attend(
        longer, keys, values, tables, contexts, starts, out, longest_query=7, scale=8**-0.5
    )
    assert not out[:4].any()
    assert torch.allclose(out[4:].double(), wanted, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_scale_and_queries_within_a_projection(backend: Any, count: int) -> None:
    given = batch([19, 20], [count, 1])
    wide = torch.randn(len(given.args[0]), 2 * 6, 8)
    given.args[0] = wide[:, 6:]
    wanted = given.plainly(torch.float64, scale=0.7)
    assert torch.allclose(given.run(backend, scale=0.7).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_nothing_to_attend(backend: Any) -> None:
    given = batch([4], [1])
    q, keys, values, tables, contexts, starts = given.args
    empty = Batch([q[:0], keys, values, tables[:0], contexts[:0], starts[:1]], [], [])
    assert empty.run(backend).shape == (0, 6, 8)


def test_wider_and_narrower_dtypes_and_other_layouts() -> None:
    given = batch([20, 3], [4, 1], layout="plain")
    wanted = given.plainly(torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        q, keys, values = (x.to(dtype) for x in given.args[:3])
        out = paged_attention(q, keys, values, *given.args[3:], longest_query=4)
        assert out.dtype == dtype
        assert (out.double() - wanted).abs().max() < tolerance
    with pytest.raises(ValueError, match="the native kernels were forced"):
        given.run("native")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_same_bits_with_other_threads_and_again(backend: Any) -> None:
    given = batch([70, 33, 300], [1, 1, 1])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(given.run(backend))
    torch.set_num_threads(before)
    assert torch.equal(*found)


# --- Launches ------------------------------------------------------------------------------------


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids of all launches, none of which is run."""
    if not interpreted():
        pytest.skip("launches are watched in the interpreter")
    from triton.runtime.interpreter import GridExecutor

    found: list[tuple[int, ...]] = []

    def note(self: Any, *_: Any, **kwargs: Any) -> None:
        found.append(self.grid(kwargs) if callable(self.grid) else self.grid)

    monkeypatch.setattr(GridExecutor, "__call__", note)
    return found


@pytest.mark.parametrize("count", [1, 40])
def test_a_launch_depends_on_shapes_alone_and_goes_in_x(count: int, grids: Any) -> None:
    tables = torch.zeros(70_000, 3, dtype=torch.int32)
    caches = [torch.zeros(1, 16, 1, 8)] * 2
    starts = (torch.arange(70_001, dtype=torch.int32) + count - 1).clamp(max=70_000)
    starts[0] = 0  # the first has `count` queries, the last ones have none
    q = torch.zeros(70_000, 2, 8)
    for context in (count, 48):
        contexts = torch.full((70_000,), context, dtype=torch.int32)
        with use("triton"):
            paged_attention(q, *caches, tables, contexts, starts, longest_query=count)
    assert grids[: len(grids) // 2] == grids[len(grids) // 2 :]
    assert all(len(grid) == 1 for grid in grids)
    assert 70_000 <= grids[0][0] < 2**31


def test_how_contexts_are_cut_into_shares() -> None:
    shares = paged_attention_triton._shares
    cpu = torch.device("cpu")  # counts as 8 multiprocessors
    assert shares(1, 100_000, cpu) == 32
    assert shares(10, 100_000, cpu) == 4
    assert shares(1000, 100_000, cpu) == 1
    assert shares(1, 300, cpu) == 3
    assert shares(1, 1, cpu) == 1


# --- Bad input -----------------------------------------------------------------------------------

GOOD = batch([20, 3], [4, 1], block_size=16)
Change = Callable[..., dict[str, Any]]
NAMES = ("q", "key_cache", "value_cache", "block_tables", "context_lengths", "query_starts")


def change(name: str, value: Any) -> dict[str, Any]:
    good = dict(zip(NAMES, GOOD.args, strict=True))
    return {**good, "longest_query": 4, name: value(good[name]) if callable(value) else value}


BAD: list[tuple[str, Any, str]] = [
    ("key_cache", lambda x: x[0], r"key_cache and value_cache must be one layer's"),
    ("value_cache", lambda x: x[:1], "value_cache must be one layer's"),
    ("q", lambda x: x[0], r"q must be \[T, N, D\] with N a multiple .* 2 heads.* got \[6, 8\]"),
    ("q", lambda x: x[:, :5], r"N a multiple .*got \[5, 5, 8\]"),
    ("q", lambda x: x[..., :4], r"D its 8, got \[5, 6, 4\]"),
    ("q", lambda x: x.long(), "q must be floating, got torch.int64"),
    ("key_cache", lambda x: x.half(), "key_cache must be torch.float32 on cpu like q, .*float16"),
    ("value_cache", lambda x: x.to("meta"), "value_cache must be .*on meta"),
    ("q", lambda x: x.clone().requires_grad_(), "q wants a gradient"),
    ("longest_query", 0, "longest_query must be at least 1, got 0"),
    ("longest_query", 3, "longest_query must be the most queries of a sequence, 4, got 3"),
    ("block_tables", lambda x: x[0], r"block_tables must be \[S, W\].*got \[4\]"),
    ("context_lengths", lambda x: x[:1], r"context_lengths \[S\] .*got \[2, 4\], \[1\], \[3\]"),
    ("query_starts", lambda x: x[:2], r"query_starts \[S \+ 1\], got .*\[2\]\."),
    ("block_tables", lambda x: x.long(), "block_tables must be int32 on cpu, got torch.int64"),
    ("context_lengths", lambda x: x.to("meta"), "context_lengths must be int32 .*on meta"),
    ("query_starts", lambda x: x + 1, "query_starts must begin with 0, .*T = 5"),
    ("query_starts", torch.tensor([0, 4, 3]).int(), r"not decrease .*got \[0, 4, 3\] to 3"),
    ("query_starts", torch.tensor([0, 4, 6]).int(), "end at T = 5 or before, .* to 6"),
    ("context_lengths", torch.tensor([20, -1]).int(), "context_lengths must be 0, .*got -1 to 20"),
    ("context_lengths", torch.tensor([3, 3]).int(), "from a sequence's number of queries"),
    ("context_lengths", torch.tensor([65, 3]).int(), "the 64 tokens of a row .*got 3 to 65"),
    ("block_tables", lambda x: x.clone().fill_(-1), "blocks from 0 to 5 .*got -1 in row 0"),
    ("block_tables", lambda x: x.clone().clamp(max=7) + 6, "block_tables must name blocks from 0"),
]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_a_sentence(name: str, value: Any, words: str, backend: Any) -> None:
    with use(backend), pytest.raises(ValueError, match=words):
        paged_attention(**change(name, value))


def test_the_good_arguments_are_good() -> None:
    assert paged_attention(**change("longest_query", 5)).abs().max() > 0


def test_triton_refuses_large_heads() -> None:
    given = batch([3], [1], dim=264)
    with pytest.raises(ValueError, match="heads of at most 256, got 264"):
        given.run("triton")
