"""Which runs of packed tokens attend to which, for `varlen_attention.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

# A sequence joins a bucket if it is at most this much shorter than the bucket's longest.
SLACK_SHARE, SLACK_TOKENS = 0.15, 8
# From here on a sequence fills the machine alone, and stays where it lies.
ALONE_FROM = 1024


class Segments:
    """Token counts of the segments; without `keys` every segment is causal attention on itself.

    Made once a batch: what it needs on a device serves all layers.

    Raises:
        ValueError: no segment, or one without tokens.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int] | None = None) -> None:
        self.queries = [int(count) for count in queries]
        self.keys = self.queries if keys is None else [int(count) for count in keys]
        self.causal = keys is None
        counts = [*self.queries, *self.keys]
        if not counts or min(counts) < 1 or len(self.queries) != len(self.keys):
            raise ValueError(
                f"attention needs at least one sequence and one token in each, got lengths"
                f" {counts[:8]}; leave empty sequences out."
            )
        self._starts: tuple[Tensor, Tensor] | None = None

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each segment."""
        query = key = 0
        for queries, keys in zip(self.queries, self.keys, strict=True):
            yield slice(query, query + queries), slice(key, key + keys)
            query, key = query + queries, key + keys

    def tiles(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """At most so many queries at a time, and the keys that the last of them sees."""
        for queries, keys in self.runs():
            for first in range(queries.start, queries.stop, rows):
                last = min(first + rows, queries.stop)
                stop = keys.start + last - queries.start if self.causal else keys.stop
                yield slice(first, last), slice(keys.start, stop)

    def starts(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where segments begin and the last one ends, of queries and of keys: [S + 1] int32."""
        if self._starts is None or self._starts[0].device != device:
            first, second = (
                torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
                for counts in (self.queries, self.keys)
            )
            self._starts = first, second
        return self._starts

    @cached_property
    def buckets(self) -> Buckets:
        """The segments in rectangles."""
        return Buckets(self.queries)


class Buckets:
    """Sequences of similar length laid, padded on the right, into rectangles of B x L cells.

    Under a causal mask a token sees only tokens before it, hence never the padding after it: no
    other mask is needed and the result is exact.

    Shapes: T packed tokens, B sequences of a bucket, L its longest, C cells of all buckets.
    """

    def __init__(self, lengths: list[int]) -> None:
        buckets = _buckets(lengths)
        self.shapes = [(len(b), max(lengths[i] for i in b)) for b in buckets]  # B and L of each
        self.cells = sum(batch * longest for batch, longest in self.shapes)
        index = _cell_of_token(lengths, buckets, self.shapes)  # [T]
        in_place = self.cells == sum(lengths) and bool((index.diff() == 1).all())
        self._index = None if in_place else index

    def lay(self, x: Tensor) -> Tensor:
        """Tokens into cells: [T, ...] -> [C, ...], zero where nothing lies."""
        if self._index is None:
            return x
        return x.new_zeros(self.cells, *x.shape[1:]).index_copy_(0, self._index, x)

    def take(self, cells: Tensor) -> Tensor:
        """Tokens out of their cells: [C, ...] -> [T, ...]."""
        return cells if self._index is None else cells.index_select(0, self._index)


def _buckets(lengths: list[int]) -> list[list[int]]:
    """Group the indices of sequences of similar length, each bucket in the order of the batch."""
    buckets: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        slack = max(SLACK_SHARE * longest, SLACK_TOKENS)
        if buckets and longest < ALONE_FROM and longest - lengths[index] <= slack:
            buckets[-1].append(index)
        else:
            buckets.append([index])
            longest = lengths[index]
    # In the order of the batch where possible: equal lengths then need no copy at all.
    return sorted(sorted(bucket) for bucket in buckets)


def _cell_of_token(
    lengths: list[int], buckets: list[list[int]], shapes: list[tuple[int, int]]
) -> Tensor:
    """Return [T] int64: the cell of every packed token."""
    first_cell = [0] * len(lengths)
    start = 0
    for bucket, (_, longest) in zip(buckets, shapes, strict=True):
        for index in bucket:
            first_cell[index] = start
            start += longest
    counts = torch.tensor(lengths)
    first_token = counts.cumsum(0) - counts
    shift = torch.tensor(first_cell) - first_token  # [sequences]
    return torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)
