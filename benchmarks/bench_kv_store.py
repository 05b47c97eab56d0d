"""Keys and values of a step into one layer's paged cache: one launch against plain torch.

python benchmarks/bench_kv_store.py [--tokens 32 512 8192] [--device cuda --dtype bfloat16]

Heads: of SmolLM2-135M on a CPU, of Qwen2.5-7B on a GPU. The op has no gradient.
"""

from __future__ import annotations

import argparse
import sys

import harness
import torch
from check import check
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.kernels.kv_store import kv_store, new_cache, reference

HEADS = {"cpu": (3, 64), "cuda": (4, 128)}  # K, D


def inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype, block: int) -> list[Tensor]:
    """Key and value [T, K, D], and slots [T]: whole blocks in a random order, as sequences have."""
    key, value = torch.randn(2, tokens, heads, dim, dtype=dtype)
    order = torch.randperm(-(-tokens // block) + 7)[:, None] * block + torch.arange(block)
    return [key, value, order.flatten()[:tokens].clone()]


def cache(key: Tensor, slots: int, block: int) -> list[Tensor]:
    """One layer's, with room for `slots`."""
    shape = (1, -(-slots // block), block, *key.shape[1:])
    return [one[0] for one in new_cache(*shape, dtype=key.dtype, device=key.device)]


def stored(function: object, block: int) -> object:
    """A function of key, value and slots that returns what then lies in the slots."""

    def run(key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        caches = cache(key, int(slots.max()) + 1, block)
        function(key, value, *caches, slots)  # type: ignore[operator]
        return tuple(one.flatten(0, 1)[slots.clamp(min=0)] for one in caches)

    return run


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check at an awkward size, then the rows of each size."""
    (heads, dim), dtype = HEADS[options.device], getattr(torch, options.dtype)
    torch.manual_seed(0)
    given = [x.to(options.device) for x in inputs(67, 5, dim, dtype, 3)]
    given[2][::5] = -1
    op, plain = (stored(function, 3) for function in (kv_store, reference))
    error = check("kv_store", op, plain, given, 0)  # type: ignore[arg-type]
    rows = []
    for tokens in options.tokens or ([17] if options.quick else [32, 512, 8192]):
        given = [x.to(options.device) for x in inputs(tokens, heads, dim, dtype, options.block)]
        caches = cache(given[0], int(given[2].max()) + 1, options.block)
        plainly = [one.contiguous() for one in caches]
        moved = 4.0 * given[0].numel() * given[0].element_size()  # both read and written
        work = Work(f"T={tokens} K={heads} D={dim} {options.dtype}", 0.0, moved)
        runs: dict[str, Run] = {
            "copy of the bytes": harness.copy_of(work.bytes, options.device),
            "rmr1 kv_store": lambda g=given, c=caches: kv_store(*g[:2], *c, g[2]),
            "plain torch": lambda g=given, c=plainly: reference(*g[:2], *c, g[2]),
        }
        rows += harness.measure(work, runs, options, limits, {"rmr1 kv_store": error})
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "kv_store", samples=20)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 32 512 8192")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block")
    return harness.run(parser, "KV store", measure)


if __name__ == "__main__":
    sys.exit(main())
