"""A step of generation through the model's own forward: the path of GPUs, and on a CPU of what
`native_step.py` does not compute (16-bit weights, forced kernels, models with an own forward).

Nothing in it waits for a GPU: what a step needs is uploaded from pinned memory without waiting, and
launches depend on shapes alone. Pure decoding is captured in CUDA graphs (`cuda_graphs.py`).

Where tensor parallelism would go: a rank keeps its share of the K key/value heads, so `PagedCache`
is built for that many and `PagedAttend` does not change; `o_proj` and `down_proj` are summed over
the ranks (in model.py); the head is split by words, and of the Gumbel trick's argmax each rank
hands round its best score (`Generation._draw`).

Legend: T tokens, S sequences, W wanted tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmr1.engine.cuda_graphs import DecodeGraphs
from rmr1.engine.kv_cache import PagedCache, upload
from rmr1.engine.model import CausalLM
from rmr1.engine.scheduler import Step
from rmr1.kernels.dispatch import forced
from rmr1.kernels.kv_store import kv_store
from rmr1.kernels.paged_attention import paged_attention


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens first .. end of a step that are attended in one call, and their sequences."""

    first: int
    end: int
    tables: Tensor  # [S, W] int32
    contexts: Tensor  # [S] int32
    starts: Tensor  # [S + 1] int32, from 0
    longest_query: int


class PagedAttend:
    """The `Attend` of generation: stores the new keys and values, then attends over the cache."""

    def __init__(self, cache: PagedCache, slots: Tensor, parts: list[Part]) -> None:
        self._cache, self._slots, self._parts = cache, slots, parts

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, N, D], k and v [T, K, D] -> [T, N, D]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        dtype = q.dtype
        if keys.device.type == "cpu":  # where the cache may be wider than the weights
            q, k, v = (x.to(keys.dtype) for x in (q, k, v))
        kv_store(k, v, keys, values, self._slots)
        outs = [
            paged_attention(
                q[part.first : part.end],
                keys,
                values,
                part.tables,
                part.contexts,
                part.starts,
                longest_query=part.longest_query,
            )
            for part in self._parts
        ]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(dtype)


class TorchStep:
    """Hidden states of a `Step`'s wanted tokens."""

    def __init__(self, model: CausalLM, cache: PagedCache, max_rows: int, table_width: int) -> None:
        self._model, self._cache = model, cache
        self._device = cache.keys.device
        self._graphs = (
            DecodeGraphs(model, cache, max_rows, table_width, make_attend=decode_attend)
            if self._device.type == "cuda"
            else None
        )

    def __call__(self, step: Step) -> Tensor:
        """[W, H], after the final norm."""
        self._cache.copy(step.copies)
        decoding = step.decoding == len(step.tokens)
        # Forced kernels may be ones that cannot be captured, and are not to be remembered.
        if self._graphs is not None and decoding and not forced() and self._graphs.usable():
            return self._graphs.run(step)
        tokens, positions, slots, wanted = (
            upload(array, self._device)
            for array in (step.tokens, step.positions.astype("int64"), step.slots, step.wanted)
        )
        attend = PagedAttend(self._cache, slots, self._parts(step))
        return self._model(tokens, positions, attend)[wanted.long()]

    def rebind(self) -> None:
        """The model has changed, or its parameters lie elsewhere."""
        if self._graphs is not None:
            self._graphs.rebind()

    def _parts(self, step: Step) -> list[Part]:
        """Decoding sequences, with a query each, and pieces of prompts: each has its kernel."""
        split, count = step.decoding, len(step.contexts)
        tables, contexts = upload(step.tables, self._device), upload(step.contexts, self._device)
        parts = []
        for first, end in ((0, split), (split, count)):
            if first == end:
                continue
            starts = step.starts[first : end + 1]
            parts.append(
                Part(
                    int(starts[0]),
                    int(starts[-1]),
                    tables[first:end],
                    contexts[first:end],
                    upload(starts - starts[0], self._device),
                    int((starts[1:] - starts[:-1]).max()),
                )
            )
        return parts


def decode_attend(
    cache: PagedCache, slots: Tensor, tables: Tensor, contexts: Tensor, starts: Tensor
) -> PagedAttend:
    """The `Attend` of sequences with one new token each."""
    part = Part(0, len(slots), tables, contexts, starts, 1)
    return PagedAttend(cache, slots, [part])
