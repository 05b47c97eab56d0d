"""The Triton kernels of attention over a paged cache; paged_attention_triton.py says how they work
together, and launches them.

Shapes: T queries, S sequences, N query heads, K key/value heads, G = N / K, D head size.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import triton
import triton.language as tl

# A share of a context is a multiple of this, so that no tile of keys lies across two.
SHARE = tl.constexpr(128)


@triton.jit
def share_of(context, shares):
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
def decode(
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
        share = share_of(context, shares)
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
def merge(
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
    live = part < tl.cdiv(context, share_of(context, shares))
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
def prefill(
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
