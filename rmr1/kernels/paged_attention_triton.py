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
from torch import Tensor

from rmr1.kernels import paged_attention_kernels as kernels
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
MOST_SHARES = 32
LARGEST_HEAD = 256


KERNELS = {
    kind: tuple(
        triton.autotune(choice[kind], key=["G", "D", "BLOCK_SIZE"])(kernel)
        for kernel, choice in ((kernels.decode, DECODE), (kernels.prefill, PREFILL))
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
        kernels.merge[(sequences * query_heads,)](
            sums, peaks, totals, *where, out, query_heads, shares,
            D=dim, SHARES=triton.next_power_of_2(shares), BLOCK_D=sizes["BLOCK_D"],
        )  # fmt: skip


def _kind(dtype: torch.dtype, dim: int) -> str:
    if dtype == torch.float32:
        return "fp32"
    return "64" if dim <= 64 else "128" if dim <= 128 else "256"


def _shares(programs: int, capacity: int, device: torch.device) -> int:
    """Into how many shares a context may be cut, from shapes alone: so many that every
    multiprocessor has a few programs, and none can have fewer keys than SHARE.
    """
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(4 * processors, programs)
    return max(1, min(wanted, MOST_SHARES, triton.cdiv(capacity, kernels.SHARE.value)))


_STRIDES = ("q_token", "k_block", "k_place", "k_head", "v_block", "v_place", "v_head")
_NUMBERS = ("S", "K", "width", "shares", "N", *_STRIDES)


def _case(name: str, dtype: str, group: int, dim: int, block_size: int, **more: Any) -> Case:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    decode, prefill = KERNELS[_kind(kinds[dtype], dim)]
    kernel = {"decode": decode, "prefill": prefill, "merge": kernels.merge}[name]
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
        tuple(key for key in names if types.get(key, "")[:1] == "*" or key in _STRIDES),
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
