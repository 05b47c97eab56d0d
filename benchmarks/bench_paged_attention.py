"""Attention over a paged cache, decoding and chunks of prompts: the op against plain torch, which
gathers the blocks and calls scaled_dot_product_attention.

python benchmarks/bench_paged_attention.py [--rows 1 32 256 --contexts 512 4096] [--device cuda]

Decoding: a query of each of `rows` sequences. Shared: 8 sequences a prompt, whose blocks, the first
half of the context, are counted once in the bytes that must move. Plain torch has caches of its
own, contiguous as they are seen. Heads: of SmolLM2-135M on a CPU, of Qwen2.5-7B on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import harness
import torch
from check import check
from harness import Limits, Row, Run, Work
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rmr1.kernels import paged_attention_flash
from rmr1.kernels.dispatch import use
from rmr1.kernels.kv_store import new_cache
from rmr1.kernels.paged_attention import paged_attention, reference

HEADS = {"cpu": (9, 3, 64), "cuda": (28, 4, 128)}  # N, K, D
SAMPLES = 8  # sequences of a prompt
CHUNK, PREFIXES = 512, (0, 1536)


@dataclass(frozen=True, slots=True)
class Case:
    """A workload: sequences of one length with `count` queries each."""

    name: str
    sequences: int
    count: int
    context: int
    shared: bool = False

    def inputs(self, heads: tuple[int, int, int], dtype: torch.dtype, block: int) -> list[Tensor]:
        """q, keys and values [blocks, block, K, D], tables, contexts, starts."""
        queries, groups, dim = heads
        width = -(-self.context // block)
        tables = torch.randperm(self.sequences * width, dtype=torch.int32).view(-1, width)
        if self.shared:
            common = self.context // 2 // block
            first = torch.arange(self.sequences) // SAMPLES * SAMPLES
            tables[:, :common] = tables[first, :common]
        q = torch.randn(self.sequences * self.count, queries, dim, dtype=dtype)
        keys, values = torch.randn(2, self.sequences * width, block, groups, dim, dtype=dtype)
        contexts = torch.full((self.sequences,), self.context, dtype=torch.int32)
        starts = torch.arange(self.sequences + 1, dtype=torch.int32) * self.count
        return [q, keys, values, tables, contexts, starts]

    def work(self, heads: tuple[int, int, int], dtype: torch.dtype, block: int) -> Work:
        """Two products for every query and key that it sees; queries and keys in, results out."""
        queries, groups, dim = heads
        seen = self.count * (self.context - self.count) + self.count * (self.count + 1) // 2
        keys = self.sequences * self.context
        if self.shared:
            common = self.context // 2 // block * block
            keys -= (self.sequences - -(-self.sequences // SAMPLES)) * common
        rows = self.sequences * self.count
        return Work(
            f"{self.name} {str(dtype).removeprefix('torch.')}",
            4.0 * self.sequences * seen * queries * dim,
            2.0 * (keys * groups + rows * queries) * dim * dtype.itemsize,
        )


def cases(options: argparse.Namespace) -> list[Case]:
    """Decoding, alone and from shared prompts, then chunks."""
    rows = options.rows or ([SAMPLES] if options.quick else [1, 32, 256])
    contexts = options.contexts or ([100] if options.quick else [512, 4096])
    chunk, prefixes = (40, (0, 60)) if options.quick else (CHUNK, PREFIXES)
    found = []
    for count in rows:
        for context in contexts:
            name = f"decode {count} x {context}"
            found.append(Case(name, count, 1, context))
            if count >= SAMPLES:
                found.append(Case(f"{name}, shared", count, 1, context, shared=True))
    for prefix in prefixes:
        found.append(Case(f"prefill {chunk} after {prefix}", 1, chunk, prefix + chunk))
    return found


# --- The ways ------------------------------------------------------------------------------------


def laid(given: list[Tensor]) -> list[Tensor]:
    """The inputs with caches as this device's kernels want them."""
    q, keys, values, *where = given
    found = new_cache(1, *keys.shape, dtype=keys.dtype, device=keys.device)
    return [q, *(cache[0].copy_(x) for cache, x in zip(found, (keys, values), strict=True)), *where]


def op(*given: Tensor) -> tuple[Tensor, ...]:
    longest = int(given[5].diff().max())
    return (paged_attention(*laid(list(given)), longest_query=longest),)


def truth(*given: Tensor) -> tuple[Tensor, ...]:
    return (reference(*given, given[0].shape[2] ** -0.5),)


def plain(*given: Tensor) -> tuple[Tensor, ...]:
    """Gather and scaled_dot_product_attention, sequence by sequence, of any length."""
    q, keys, values, tables, contexts, starts = given
    outs = []
    for sequence, context in enumerate(contexts.tolist()):
        mine = q[int(starts[sequence]) : int(starts[sequence + 1])]
        own = tables[sequence, : -(-context // keys.shape[1])].long()[None]
        outs.append(gathered(mine, keys, values, own, context, causal(len(mine), context, q)))
    return (torch.cat(outs),)


def causal(count: int, context: int, q: Tensor) -> Tensor | None:
    """What each of the last `count` positions sees; None: everything."""
    if count == 1:
        return None
    seen = torch.ones(count, context, dtype=torch.bool, device=q.device)
    return seen.tril(context - count)


def gathered(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, context: int, mask: Tensor | None
) -> Tensor:
    """q [S * count, N, D] of S sequences of one length, in one call."""
    k, v = (x[tables].flatten(1, 2)[:, :context].transpose(1, 2) for x in (keys, values))
    packed = q.unflatten(0, (len(tables), -1)).transpose(1, 2)  # [S, N, count, D]
    whole = mask is not None and mask.shape[0] == mask.shape[1]
    out = scaled_dot_product_attention(
        packed, k, v, attn_mask=None if whole else mask, is_causal=whole, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def products(case: Case, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> Run:
    """The two bare products of one sequence's chunk, with no mask and no softmax."""
    queries, groups, dim = heads
    rows = case.count * queries // groups
    q = torch.randn(groups, rows, dim, device=device).to(dtype)
    k, v = torch.randn(2, groups, case.context, dim, device=device).to(dtype)
    return lambda: torch.bmm(torch.bmm(q, k.mT), v)


def ways(case: Case, options: argparse.Namespace, dtype: torch.dtype, work: Work) -> dict[str, Run]:
    """Provider -> a call."""
    heads, device = HEADS[options.device], options.device
    given = [x.to(device) for x in case.inputs(heads, dtype, options.block)]
    ours = laid(given)
    q, keys, values, tables, *_ = given
    long, mask = tables.long(), causal(case.count, case.context, q)
    runs: dict[str, Run] = {}
    if case.count == 1:
        runs["copy of the bytes"] = harness.copy_of(work.bytes, device)
    else:
        runs["bare products"] = products(case, heads, dtype, device)

    def attend() -> Tensor:
        return paged_attention(*ours, longest_query=case.count)

    runs["rmr1 paged_attention"] = attend
    if paged_attention_flash.suits(ours[0], ours[1]):  # then that was flash-attn

        def by_triton() -> Tensor:
            with use("triton"):
                return attend()

        runs["rmr1 paged_attention, Triton"] = by_triton
    runs["plain torch"] = lambda: gathered(q, keys, values, long, case.context, mask)
    return runs


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check decoding and a mixed batch at awkward sizes, then the rows of each case."""
    heads, dtype = HEADS[options.device], getattr(torch, options.dtype)
    torch.manual_seed(0)
    error = 0.0
    for counts in ([1, 1, 1], [1, 40, 5]):
        small = Case("check", 3, 1, 1030).inputs(heads, dtype, options.block)
        small[0] = torch.randn(sum(counts), *small[0].shape[1:], dtype=dtype)
        small[4] = torch.tensor([1, 1025, 17], dtype=torch.int32)
        small[5] = torch.tensor([0, *counts]).cumsum(0).int()
        inputs = [x.to(options.device) for x in small]
        error = max(error, check("paged_attention", op, truth, inputs, 0, torchs=plain))
    rows = []
    for case in cases(options):
        work = case.work(heads, dtype, options.block)
        runs = ways(case, options, dtype, work)
        results = case.sequences * case.count * heads[0] * heads[2] * dtype.itemsize
        errors = {"rmr1 paged_attention": error}
        rows += harness.measure(work, runs, options, limits, errors, results=results)
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "paged_attention", samples=20)
    parser.add_argument("--rows", type=int, nargs="+", help="that decode; default 1 32 256")
    parser.add_argument("--contexts", type=int, nargs="+", help="default 512 4096")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block")
    return harness.run(parser, "Paged attention", measure)


if __name__ == "__main__":
    sys.exit(main())
