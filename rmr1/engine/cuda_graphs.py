"""Decoding as CUDA graphs: one captured forward per bucket of batch sizes, replayed every step.

A decoding step launches hundreds of small kernels, which a CPU issues more slowly than a GPU does
them. A graph replays them in one launch. It reads its inputs from fixed buffers and the weights
where they are, so that updates in place need no new capture; other memory does, and so do other
modules, such as adapters. Rows that pad a batch to its bucket have slot -1 and context 0, for which
the kernels do nothing. Hooks are Python, which a replay does not run: a model that has any is not
captured.

**No GPU has run this file.** Its bookkeeping (buckets, padding) is tested on the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmr1.engine.kv_cache import PagedCache
from rmr1.engine.model import Attend, CausalLM
from rmr1.engine.scheduler import Step

# (cache, slots, tables, contexts, starts) -> the Attend of a decoding step
MakeAttend = Callable[[PagedCache, Tensor, Tensor, Tensor, Tensor], Attend]

_WARM_UP = 2  # eager runs before a capture: they tune and compile the kernels


def buckets(max_rows: int) -> list[int]:
    """Batch sizes to capture: powers of two, from 16 on multiples of 16, from 128 on of 64."""
    sizes = [1, 2, 4, 8, *range(16, 128, 16), *range(128, max_rows, 64)]
    return [size for size in sizes if size < max_rows] + [max_rows]


def structure(model: nn.Module) -> list[Any]:
    """What a model computes besides its weights, to be compared with `==`: its modules, their own
    forwards, their hooks and switches (`training`, an adapter's "disabled").

    It walks over all modules, which is too much for every step. Other attributes are not looked at.
    """
    return [
        (
            weakref.ref(module),  # not its id, which another may get later
            type(module),
            vars(module).get("forward"),
            [*module._forward_hooks, *module._forward_pre_hooks],  # numbers, each given once
            {name: value for name, value in vars(module).items() if isinstance(value, bool)},
        )
        for module in model.modules()
    ]


class DecodeGraphs:
    """Captured forwards of a decoding step, of a model as it was when it was last looked at.

    That is before the first step after `rebind`, which whoever changes the model has to call.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: PagedCache,
        max_rows: int,
        table_width: int,
        make_attend: MakeAttend,
    ) -> None:
        device = cache.keys.device
        self._model, self._cache, self._make_attend = model, cache, make_attend
        self._sizes = buckets(max_rows)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots = torch.full((max_rows,), -1, dtype=torch.int64, device=device)
        self._contexts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(max_rows, table_width, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        self._looked, self._hooked = False, False
        self._key: list[Any] = []

    def rebind(self) -> None:
        """Look at the model again before the next step."""
        self._looked = False

    def usable(self) -> bool:
        """Whether the model is one that can be captured."""
        self._look()
        return not self._hooked

    def _look(self) -> None:
        """Drop the graphs of what the model no longer is."""
        if self._looked:
            return
        modules = list(self._model.modules())
        tensors = [*self._model.parameters(), *self._model.buffers()]
        key = [*structure(self._model), *(tensor.data_ptr() for tensor in tensors)]
        if key != self._key:
            self._graphs.clear()
            self._pool = None
        self._hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        self._key, self._looked = key, True

    def run(self, step: Step) -> Tensor:
        """Hidden states of the step's rows, [B, H]; valid until the next call."""
        self._look()
        count = len(step.tokens)
        size = next(size for size in self._sizes if size >= count)
        self.fill(step, size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:count]

    def fill(self, step: Step, size: int) -> None:
        """Copy a step into the buffers and pad it to `size` rows."""
        count = len(step.tokens)
        for buffer, array in (
            (self._tokens, step.tokens),
            (self._positions, step.positions),
            (self._slots, step.slots),
            (self._contexts, step.contexts),
            (self._tables, step.tables),
        ):
            source = torch.from_numpy(array)
            if buffer.device.type == "cuda":
                source = source.pin_memory()
            place = buffer[:count, : source.shape[1]] if source.ndim == 2 else buffer[:count]
            place.copy_(source, non_blocking=True)
        self._slots[count:size] = -1
        self._contexts[count:size] = 0
        self._tokens[count:size] = 0
        self._positions[count:size] = 0

    def forward(self, size: int) -> Tensor:
        """The forward over the buffers' first `size` rows: what is captured."""
        attend = self._make_attend(
            self._cache,
            self._slots[:size],
            self._tables[:size],
            self._contexts[:size],
            self._starts[: size + 1],
        )
        hidden: Tensor = self._model(self._tokens[:size], self._positions[:size], attend)
        return hidden

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.forward(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self.forward(size)
        self._pool = self._pool or graph.pool()
        return graph, hidden
