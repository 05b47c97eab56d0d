"""Attention over a paged cache on a GPU, in Triton: one kernel for decoding, one for chunks of
queries.

Both take a tile of rows of one key/value head, a row being a query and one of the G query heads
that share the head's keys, and walk over the keys through the block table with an online softmax
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691).

Decoding (one query a sequence): the rows are the G heads, padded to 16 for the tensor cores. That
leaves one program a sequence and head, too few for a GPU, so each sequence's own context is cut
into shares, a program each, and a second kernel merges them ("flash decoding": Dao, Haziza, Massa
and Sizov 2023). How many shares there may be depends on shapes alone, so a CUDA graph can be
replayed with other contexts. Sequences with the same head and share stand next to each other in the
grid: what they have in common, as samples of one prompt, is read once from memory and then from the
second-level cache.

Chunks: BLOCK_M rows a program. A sequence with c queries has at most c G / BLOCK_M + 1 tiles, so it
gets the tiles from start G / BLOCK_M + its number on, and a program finds its sequence by bisection
(as vLLM's unified attention does). The grid depends on T and S alone, and decode rows next to a
long chunk launch no empty tiles for its length.

Shapes: T queries, S sequences, N query heads, K key/value heads, G = N / K, D head size, W blocks
of a row of the table.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.kv_store import heads_contiguous
from rmr1.kernels.tuning import Case, configs

# By what limits a tile's registers: no target that the compile gate knows spills with these (sm_80
# does with 128 x 64 at a head of 128). Decoding has one each: nothing is timed, which a CUDA graph
# under capture would not bear. fp32 is multiplied exactly and therefore not by tensor cores.
_INTERPRETED = {"BLOCK_N": 64}
DECODE = {
    "64": configs({"BLOCK_N": 128, "num_warps": 4, "num_stages": 3}, interpreted=_INTERPRETED),
    "128": configs({"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, interpreted=_INTERPRETED),
    "256": configs({"BLOCK_N": 32, "num_warps": 4, "num_stages": 2}, interpreted=_INTERPRETED),
    "fp32": configs({"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}, interpreted=_INTERPRETED),
}
_INTERPRETED = {"BLOCK_M": 16, "BLOCK_N": 64}
PREFILL = {
    "64": configs(
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        interpreted=_INTERPRETED,
    ),
    "128": configs(
        {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        interpreted=_INTERPRETED,
    ),
    "256": configs(
        {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}, interpreted=_INTERPRETED
    ),
    "fp32": configs(
        {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}, interpreted=_INTERPRETED
    ),
}
# A share of a context is a multiple of this, so that no tile lies across two.
SHARE = tl.constexpr(128)
MOST_SHARES = 32
LARGEST_HEAD = 256


@triton.jit
def _share(context, shares):
    """Keys of one share of a context."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, shares), SHARE), 1) * SHARE


@triton.jit
def _walk(
    q, peak, total, mixed, sees, first, last, keys, values, table, scale,
    k_block, k_place, k_dim, v_block, v_place, v_dim,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Let rows q [M, BLOCK_D] attend to positions `first` to `last`; MASKED: each only up to what
    it sees [M]. Positions from `last` on are not read, nor the table's entries for them.

    The scale holds log2(e), so the weights are powers of 2. A row that has seen nothing yet keeps a
    peak of -inf and a total of 0.
    """
    column = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        if BLOCK_SIZE % BLOCK_N == 0:  # the tile lies in one block
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        else:
            block = tl.load(table + position // BLOCK_SIZE, mask=position < last, other=0)
            block = block.to(tl.int64)
        place = position - position // BLOCK_SIZE * BLOCK_SIZE
        k_at = keys + (block * k_block + place * k_place)[None, :] + (column * k_dim)[:, None]
        v_at = values + (block * v_block + place * v_place)[:, None] + (column * v_dim)[None, :]
        if MASKED:
            there = position < last
            k = tl.load(k_at, mask=there[None, :] & (column < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=there[:, None] & (column < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(column < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=(column < D)[None, :], other=0.0)
        z = tl.dot(q, k, input_precision="ieee") * scale
        if MASKED:
            z = tl.where(position[None, :] <= sees[:, None], z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(z - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        peak = higher
    return peak, total, mixed


@triton.jit
def _decode(
    q, keys, values, tables, contexts, starts, out, peaks, totals, S, K, width, shares, scale,
    q_token, k_block, k_place, k_head, k_dim, v_block, v_place, v_head, v_dim,
    G: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The G heads of one query over one share of its context, into out [T, N, D] when that is the
    WHOLE, else into sums out [S, N, shares, D] with their peaks and totals [S, N, shares].
    """
    sequence = (tl.program_id(0) % S).to(tl.int64)
    rest = tl.program_id(0) // S
    head = (rest % K).to(tl.int64)
    part = rest // K
    token = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) <= token:
        return
    context = tl.load(contexts + sequence)
    first = 0
    last = context
    if not WHOLE:
        share = _share(context, shares)
        first = part * share
        last = tl.minimum(first + share, context)
        if first >= last:
            return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    live = (row < G)[:, None] & (column < D)[None, :]
    from_q = q + token * q_token + (head * G + row)[:, None] * D + column[None, :]
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    sees = tl.zeros((ROWS,), dtype=tl.int32) + (last - 1)
    peak, total, mixed = _walk(
        tl.load(from_q, mask=live, other=0.0), peak, total, mixed, sees, first, last,
        keys + head * k_head, values + head * v_head, tables + sequence * width, scale,
        k_block, k_place, k_dim, v_block, v_place, v_dim,
        True, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if WHOLE:
        mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
        to = (token * K + head) * G + row
    else:
        to = ((sequence * K + head) * G + row) * shares + part
        tl.store(peaks + to, peak, mask=row < G)
        tl.store(totals + to, total, mask=row < G)
    tl.store(out + to[:, None] * D + column[None, :], mixed.to(out.dtype.element_ty), mask=live)


@triton.jit
def _merge(
    sums, peaks, totals, contexts, starts, out, N, shares,
    D: tl.constexpr, SHARES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one query from its shares: sums [S, N, shares, D] -> out [T, N, D]."""
    sequence = (tl.program_id(0) // N).to(tl.int64)
    token = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) <= token:
        return
    context = tl.load(contexts + sequence)
    part = tl.arange(0, SHARES)
    column = tl.arange(0, BLOCK_D)
    # The others were not written.
    live = part < tl.cdiv(context, _share(context, shares))
    at = tl.program_id(0).to(tl.int64) * shares + part
    peak = tl.load(peaks + at, mask=live, other=float("-inf"))
    total = tl.load(totals + at, mask=live, other=0.0)
    both = live[:, None] & (column < D)[None, :]
    mixed = tl.load(sums + at[:, None] * D + column[None, :], mask=both, other=0.0)
    top = tl.max(peak, axis=0)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    whole = tl.sum(total * weight, axis=0)
    merged = tl.sum(mixed * weight[:, None], axis=0) / tl.where(whole > 0.0, whole, 1.0)
    to = (token * N + tl.program_id(0) % N) * D + column
    tl.store(out + to, merged.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _prefill(
    q, keys, values, tables, contexts, starts, out, S, K, width, scale,
    q_token, k_block, k_place, k_head, k_dim, v_block, v_place, v_head, v_dim,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one sequence and one key/value head, into out [T, N, D]."""
    tiles = tl.num_programs(0) // K
    head = (tl.program_id(0) // tiles).to(tl.int64)
    # The last first: they see most keys, and whoever comes last should have little to do.
    tile = tiles - 1 - tl.program_id(0) % tiles
    low = 0
    high = S - 1
    while low < high:  # the last sequence that begins at this tile or before
        middle = (low + high + 1) // 2
        if tl.load(starts + middle) * G // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle - 1
    sequence = tl.cast(low, tl.int64)
    begin = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - begin
    first_row = (tile - begin * G // BLOCK_M - low) * BLOCK_M
    if first_row >= queries * G:
        return
    context = tl.load(contexts + sequence)
    row = first_row + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    query = tl.minimum(row // G, queries - 1)
    sees = context - queries + query  # all keys up to its own
    live = (row < queries * G)[:, None] & (column < D)[None, :]
    token, of_group = (begin + query).to(tl.int64), head * G + row - row // G * G
    from_q = q + (token * q_token + of_group * D)[:, None] + column[None, :]
    rows = tl.load(from_q, mask=live, other=0.0)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    # Tiles of keys that all rows see in full need no mask.
    middle = tl.maximum(context - queries + first_row // G + 1, 0) // BLOCK_N * BLOCK_N
    last = context - queries + tl.minimum((first_row + BLOCK_M - 1) // G, queries - 1) + 1
    table = tables + sequence * width
    peak, total, mixed = _walk(
        rows, peak, total, mixed, sees, 0, middle, keys + head * k_head, values + head * v_head,
        table, scale, k_block, k_place, k_dim, v_block, v_place, v_dim,
        False, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    peak, total, mixed = _walk(
        rows, peak, total, mixed, sees, middle, last, keys + head * k_head, values + head * v_head,
        table, scale, k_block, k_place, k_dim, v_block, v_place, v_dim,
        True, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    to = (token * (K * G) + of_group)[:, None] * D + column[None, :]
    tl.store(out + to, mixed.to(out.dtype.element_ty), mask=live)


KERNELS = {
    kind: tuple(
        triton.autotune(choice[kind], key=["G", "D", "BLOCK_SIZE"])(kernel)
        for kernel, choice in ((_decode, DECODE), (_prefill, PREFILL))
    )
    for kind in DECODE
}


def attend(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    out: Tensor,
    *,
    longest_query: int,
    scale: float,
) -> None:
    """As `paged_attention`, into the contiguous out [T, N, D]; nothing waits for the device.

    ValueError for heads of more than 256. The first chunk of a new shape times the configurations;
    decoding times nothing.
    """
    (tokens, query_heads, dim), (sequences, width) = q.shape, block_tables.shape
    _, block_size, heads, _ = key_cache.shape
    if dim > LARGEST_HEAD:
        raise ValueError(
            f"paged_attention: the Triton kernels take heads of at most {LARGEST_HEAD}, got {dim};"
            " ask for the slow reference with RMR1_KERNELS=reference."
        )
    if not tokens or not sequences:
        return
    q = heads_contiguous(q)
    tables, group = block_tables.contiguous(), query_heads // heads
    decode, prefill = KERNELS[_kind(q.dtype, dim)]
    where = (context_lengths.contiguous(), query_starts.contiguous())
    numbers = (q.stride(0), *key_cache.stride(), *value_cache.stride())
    sizes = {"G": group, "D": dim, "BLOCK_SIZE": block_size}
    sizes["BLOCK_D"] = max(16, triton.next_power_of_2(dim))
    scale *= math.log2(math.e)
    if longest_query > 1:
        prefill[lambda meta: (heads * (tokens * group // meta["BLOCK_M"] + sequences),)](
            q, key_cache, value_cache, tables, *where, out, sequences, heads, width, scale,
            *numbers, **sizes,
        )  # fmt: skip
        return
    shares = _shares(sequences * heads, width * block_size, q.device)
    sums = peaks = totals = out
    if shares > 1:
        sums = q.new_empty(sequences, query_heads, shares, dim, dtype=torch.float32)
        peaks, totals = q.new_empty(2, sequences, query_heads, shares, dtype=torch.float32)
    decode[(sequences * heads * shares,)](
        q, key_cache, value_cache, tables, *where, sums, peaks, totals, sequences, heads, width,
        shares, scale, *numbers, **sizes,
        ROWS=max(16, triton.next_power_of_2(group)), WHOLE=shares == 1,
    )  # fmt: skip
    if shares > 1:
        _merge[(sequences * query_heads,)](
            sums, peaks, totals, *where, out, query_heads, shares,
            D=dim, SHARES=triton.next_power_of_2(shares), BLOCK_D=sizes["BLOCK_D"],
        )  # fmt: skip


def _kind(dtype: torch.dtype, dim: int) -> str:
    if dtype == torch.float32:
        return "fp32"
    return "64" if dim <= 64 else "128" if dim <= 128 else "256"


def _shares(programs: int, capacity: int, device: torch.device) -> int:
    """Into how many shares a context may be cut, from shapes alone: so many that every
    multiprocessor has a few programs, and none has fewer keys than SHARE.
    """
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(4 * processors, programs)
    return max(1, min(wanted, MOST_SHARES, triton.cdiv(capacity, SHARE.value)))


_NUMBERS = ("S", "K", "width", "shares", "N", "q_token")
_NUMBERS += ("k_block", "k_place", "k_head", "v_block", "v_place", "v_head")
_ALIGNED = ("q_token", "k_block", "k_place", "k_head", "v_block", "v_place", "v_head")


def _case(name: str, dtype: str, group: int, dim: int, block_size: int, **more: Any) -> Case:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    decode, prefill = KERNELS[_kind(kinds[dtype], dim)]
    kernel = {"decode": decode, "prefill": prefill, "merge": _merge}[name]
    names = kernel.arg_names if name == "merge" else kernel.fn.arg_names
    types = dict.fromkeys(("q", "keys", "values", "out"), f"*{dtype}")
    types |= dict.fromkeys(("tables", "contexts", "starts"), "*i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("sums", "peaks", "totals"), "*fp32") | dict.fromkeys(_NUMBERS, "i32")
    if name == "decode" and not more["WHOLE"]:
        types["out"] = "*fp32"
    types = {key: kind for key, kind in types.items() if key in names}
    constants = {"G": group, "ROWS": max(16, triton.next_power_of_2(group)), "D": dim}
    constants |= {"BLOCK_D": triton.next_power_of_2(dim), "BLOCK_SIZE": block_size}
    # Of a GPU's cache, whose dimensions are adjacent; a launch makes constants of strides of 1.
    constants |= {"k_dim": 1, "v_dim": 1, "SHARES": 16}
    return Case(
        f"paged_attention {name} {dtype} G={group} D={dim} block={block_size}"
        + ("" if more.get("WHOLE", True) else " shares"),
        kernel,
        types,
        {key: value for key, value in {**constants, **more}.items() if key in names},
        tuple(key for key in names if types.get(key, "")[:1] == "*" or key in _ALIGNED),
        matmul=name != "merge" and dtype != "fp32",
    )


CASES = [
    _case("decode", "bf16", 7, 128, 256, WHOLE=True),
    _case("decode", "bf16", 3, 64, 16, WHOLE=False),
    _case("decode", "bf16", 2, 256, 16, WHOLE=False),
    _case("decode", "fp32", 7, 128, 16, WHOLE=False),
    _case("decode", "fp32", 3, 64, 256, WHOLE=True),
    _case("merge", "bf16", 7, 128, 16),
    _case("prefill", "bf16", 7, 128, 256),
    _case("prefill", "bf16", 7, 128, 16),
    _case("prefill", "bf16", 3, 64, 16),
    _case("prefill", "bf16", 2, 256, 16),
    _case("prefill", "fp32", 7, 128, 16),
    _case("prefill", "fp32", 3, 64, 256),
]
