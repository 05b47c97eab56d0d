"""Attention of packed queries over a paged cache of keys and values: decoding, and chunks of
prompts on what is already cached.

    out = softmax(scale q k^T) v,  query i of a sequence's c seeing positions 0 to context - c + i

A sequence's keys lie in blocks that its row of `block_tables` names, in order; sequences may share
blocks, as the samples of one prompt do. Grouped-query attention: query head n reads key/value head
n // G. Scores and sums in fp32 whatever the dtype (fp64 for fp64). There is no gradient.

Shapes: T queries, S sequences, N query heads, K key/value heads, G = N / K, D head size, W blocks
of a row of the table.
Sources: Kwon et al., PagedAttention (arXiv 2309.06180); Ainslie et al., GQA (arXiv 2305.13245).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels import paged_attention_flash
from rmr1.kernels.dispatch import choose, forced
from rmr1.kernels.kv_store import check_alike, check_caches, heads_contiguous, native_layout


def reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """The op in plain torch, sequence by sequence."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    size, out = key_cache.shape[1], torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = query_starts.tolist()
    for sequence, context in enumerate(context_lengths.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        mine, count = q[rows].to(wide), rows.stop - rows.start
        if not count or not context:
            continue
        blocks = block_tables[sequence, : -(-context // size)].long()
        k, v = (
            cache[blocks].flatten(0, 1)[:context].to(wide)  # [context, K, D]
            .repeat_interleave(q.shape[1] // cache.shape[2], dim=1)
            for cache in (key_cache, value_cache)
        )  # fmt: skip
        scores = torch.einsum("qnd,knd->nqk", mine, k) * scale
        later = torch.ones(count, context, dtype=torch.bool, device=q.device)
        scores.masked_fill_(later.triu(context - count + 1), -torch.inf)
        out[rows] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).to(q.dtype)
    return out


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    *,
    longest_query: int,
    scale: float | None = None,
) -> Tensor:
    """Attend from packed queries to their sequences' cached keys, their own included.

    On a GPU nothing waits for the device, and what is launched depends on shapes and
    `longest_query` alone, so decoding can be captured in a CUDA graph.

    Args:
        q: [T, N, D], any floating dtype.
        key_cache, value_cache: [blocks, block_size, K, D] in the dtype of q, N a multiple of K; the
            queries' own keys and values have been stored (`kv_store`).
        block_tables: [S, W] int32, block numbers; entries past the context are never read.
        context_lengths: [S] int32, cached tokens of each sequence, its queries included. With 0 the
            output is 0.
        query_starts: [S + 1] int32, from 0: sequence s owns rows query_starts[s] up to
            query_starts[s + 1], possibly none. Rows past the last belong to nobody, and what they
            get is not defined; where there are any, sequences without a query come last.
        longest_query: the most queries of a sequence; 1 is pure decoding.
        scale: of the scores, D ** -0.5 by default.

    Returns:
        [T, N, D] in the dtype of q, contiguous, without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; tensors that want a gradient;
            on a CPU, starts, contexts or block numbers out of range (on a GPU they are not looked
            at).
    """
    where = {
        "block_tables": block_tables,
        "context_lengths": context_lengths,
        "query_starts": query_starts,
    }
    _check(q, key_cache, value_cache, where, longest_query)
    if q.device.type == "cpu":
        _check_values(q, key_cache, where, longest_query)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    native = q.dtype == torch.float32 and native_layout(key_cache, value_cache)
    backend = choose("paged_attention", q, native=native)
    given = (q, key_cache, value_cache, block_tables, context_lengths, query_starts)
    if backend == "reference":
        return reference(*given, scale)
    if backend == "triton" and not forced() and paged_attention_flash.suits(q, key_cache):
        return paged_attention_flash.attend(*given, longest_query=longest_query, scale=scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if backend == "triton":
        from rmr1.kernels import paged_attention_triton

        paged_attention_triton.attend(*given, out, longest_query=longest_query, scale=scale)
    else:
        tables, contexts, starts = (x.contiguous() for x in given[3:])
        _C.paged_attention(
            heads_contiguous(q), key_cache, value_cache, tables, contexts, starts, out, scale,
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def _check(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, where: dict[str, Tensor], longest_query: int
) -> None:
    check_caches("paged_attention", key_cache, value_cache)
    heads, dim = key_cache.shape[2:]
    if q.ndim != 3 or not q.shape[1] or q.shape[1] % heads or q.shape[2] != dim:
        raise ValueError(
            f"paged_attention: q must be [T, N, D] with N a multiple of the cache's {heads} heads"
            f" and D its {dim}, got {list(q.shape)}."
        )
    check_alike("paged_attention", {"q": q, "key_cache": key_cache, "value_cache": value_cache})
    if longest_query < 1:
        raise ValueError(f"paged_attention: longest_query must be at least 1, got {longest_query}.")
    tables, count = where["block_tables"], len(where["block_tables"])
    shapes = {"context_lengths": (count,), "query_starts": (count + 1,)}
    if tables.ndim != 2 or any(where[name].shape != shape for name, shape in shapes.items()):
        raise ValueError(
            "paged_attention: block_tables must be [S, W], context_lengths [S] and query_starts"
            f" [S + 1], got {', '.join(str(list(x.shape)) for x in where.values())}."
        )
    for name, x in where.items():
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"paged_attention: {name} must be int32 on {q.device}, got {x.dtype} on {x.device}."
            )


def _check_values(
    q: Tensor, key_cache: Tensor, where: dict[str, Tensor], longest_query: int
) -> None:
    """In numpy, whose calls on a few numbers cost a tenth of torch's: every layer does this."""
    tables, contexts, starts = (x.numpy() for x in where.values())
    counts = starts[1:] - starts[:-1]
    if starts[0] != 0 or starts[-1] > len(q) or (counts.size and counts.min() < 0):
        raise ValueError(
            f"paged_attention: query_starts must begin with 0, not decrease and end at T = {len(q)}"
            f" or before, got {starts[:8].tolist()} to {starts[-1]}."
        )
    if not counts.size:
        return
    if counts.max() > longest_query:
        raise ValueError(
            f"paged_attention: longest_query must be the most queries of a sequence,"
            f" {counts.max()}, got {longest_query}."
        )
    blocks, size, *_ = key_cache.shape
    capacity = tables.shape[1] * size
    if (
        contexts.min() < 0
        or contexts.max() > capacity
        or ((contexts < counts) & (contexts > 0)).any()
    ):
        raise ValueError(
            "paged_attention: context_lengths must be 0, or from a sequence's number of queries to"
            f" the {capacity} tokens of a row of the table, got {contexts.min()} to"
            f" {contexts.max()}."
        )
    # A negative number is a large one without its sign.
    wrong = tables.view(np.uint32) >= blocks
    wrong &= np.arange(tables.shape[1]) * size < contexts[:, None]
    if wrong.any():
        raise ValueError(
            f"paged_attention: block_tables must name blocks from 0 to {blocks - 1} as far as the"
            f" context goes, got {tables[wrong][0]} in row {np.nonzero(wrong)[0][0]}."
        )
