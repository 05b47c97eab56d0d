"""Who computes what in the next step: continuous batching over a pool of blocks.

Every step takes one token of each sequence that is decoding and fills the rest of its token budget
with pieces of prompts, in order of arrival. A sequence that ends leaves at once; one that waits
enters as soon as there are a row, budget and blocks. When blocks run out, the youngest sequence
gives its own back and waits again, with the tokens it has drawn; it computes them anew later. The
oldest sequence is never put back and the pool holds the longest one, so there is always progress.

The samples of a prompt enter together at the moment in which the first of them has computed it:
they share its blocks, and copy the last, half-filled one when they write to it.

Legend: T tokens of a step, S sequences in it, B rows that draw a token.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from rmr1.engine.block_pool import BlockPool, block_digests
from rmr1.engine.sequences import Array, Rows, Sequence


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass, as arrays. The first `decoding` sequences have one token each."""

    tokens: Array  # [T] int64
    positions: Array  # [T] int32
    slots: Array  # [T] int64, where their keys and values go
    tables: Array  # [S, W] int32
    contexts: Array  # [S] int32, tokens of a sequence with those of this step
    starts: Array  # [S + 1] int32, the tokens of each sequence
    decoding: int
    copies: list[tuple[int, int]]  # blocks to copy before, from and to
    wanted: Array  # [W] int32, tokens after which something is drawn
    rows: Array  # [B] the rows that draw
    source: Array  # [B] which of `wanted` each draws from


class Scheduler:
    """Keeps rows, pool and queue; `plan` makes a step."""

    def __init__(self, pool: BlockPool, rows: Rows, block_size: int, max_tokens: int) -> None:
        assert rows.capacity <= max_tokens
        self.pool, self.rows = pool, rows
        self._size, self._max_tokens = block_size, max_tokens
        self._waiting: list[tuple[int, Sequence]] = []  # a heap by order of arrival
        self._prefilling: list[int] = []  # rows, in order of arrival
        self._decoding = np.empty(0, dtype=np.int64)  # rows, neighbours share a prompt
        self.preemptions = 0

    @property
    def unfinished(self) -> bool:
        """Whether anything waits or runs."""
        waiting = any(not one.cancelled for _, one in self._waiting)
        return waiting or bool(self._prefilling) or len(self._decoding) > 0

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a row."""
        return [one for one in self.rows.sequences if one is not None]

    def add(self, sequences: list[Sequence]) -> None:
        """Let sequences wait."""
        for one in sequences:
            heapq.heappush(self._waiting, (one.number, one))

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is."""
        sequence.cancelled = True  # dropped from the queue when its turn comes
        if sequence.row >= 0:
            self.finish(sequence.row)
        while self._waiting and self._waiting[0][1].cancelled:
            heapq.heappop(self._waiting)

    def finish(self, row: int) -> Sequence:
        """Give back the row and the blocks of a sequence."""
        self.pool.release(self.rows.tables[row, : self.rows.blocks[row]].tolist())
        if row in self._prefilling:
            self._prefilling.remove(row)
        self._decoding = self._decoding[self._decoding != row]
        return self.rows.stop(row)

    def restart(self) -> None:
        """Compute everything anew, from the prompts: nothing in the cache is valid any more."""
        for sequence in self.running:
            self.finish(sequence.row)
            self.add([sequence])
        for _, sequence in self._waiting:
            sequence.restart()
        self.pool.forget()

    # --- Planning a step -------------------------------------------------------------------------

    def plan(self) -> Step:
        """Choose what the next step computes, and get the blocks for it."""
        copies = self._make_room()
        decoding = self._decoding
        budget = self._max_tokens - len(decoding)
        chunks: list[tuple[int, int, int]] = []  # row, first token, end
        forks: list[tuple[int, int]] = []  # a row that starts with the prompt that a row computes
        for row in list(self._prefilling):
            budget -= self._chunk(row, budget, chunks, forks)
        while budget > 0 and (admitted := self._admit()) is not None:
            self._prefilling.append(admitted)
            budget -= self._chunk(admitted, budget, chunks, forks)
        step = self._step(decoding, chunks, forks, copies)
        if len(step.rows) > len(decoding):
            rows = np.concatenate([decoding, step.rows[len(decoding) :]])
            numbers = [self._number(row) for row in rows]
            self._decoding = rows[np.argsort(numbers, kind="stable")]
        return step

    def _number(self, row: int) -> int:
        sequence = self.rows.sequences[row]
        assert sequence is not None
        return sequence.number

    def _make_room(self) -> list[tuple[int, int]]:
        """A place for the next token of every decoding row; returns the blocks to copy."""
        rows = self.rows
        while True:
            at = rows.done[self._decoding] // self._size  # the block each writes to
            beyond = at >= rows.blocks[self._decoding]
            current = rows.tables[self._decoding, np.where(beyond, 0, at)]
            shared = ~beyond & (self.pool.users[current] > 1)
            if int(beyond.sum()) + int(shared.sum()) <= self.pool.free:
                break
            self._preempt()
        for row, block in zip(
            self._decoding[beyond], self.pool.take(int(beyond.sum())), strict=True
        ):
            rows.add_blocks(int(row), [block])
        copies = []
        for row, place in zip(self._decoding[shared], at[shared], strict=True):
            old = int(rows.tables[row, place])
            if self.pool.users[old] > 1:  # the last one to write keeps it
                [new] = self.pool.take(1)
                self.pool.release([old])
                rows.tables[row, place] = new
                copies.append((old, new))
        return copies

    def _preempt(self) -> None:
        """Put the youngest running sequence back into the queue."""
        running = self.running
        assert len(running) > 1, "the pool holds any one sequence"
        youngest = max(running, key=lambda one: one.number)
        self._publish(youngest.row)  # if the blocks survive until its turn, nothing is lost
        self.finish(youngest.row)
        self.add([youngest])
        self.preemptions += 1

    def _admit(self) -> int | None:
        """Give the first waiting sequence a row and blocks for all its tokens, if there are any."""
        while self._waiting and self._waiting[0][1].cancelled:
            heapq.heappop(self._waiting)
        if not self._waiting or not self.rows.free:
            return None
        sequence = self._waiting[0][1]
        tokens = len(sequence.request.tokens) + len(sequence.tokens)
        found = self._find(sequence, tokens)
        self.pool.share(found)
        missing = -(-tokens // self._size) - len(found)
        # A block in reserve for each that runs, or the next step would put somebody back.
        reserve = len(self.rows.sequences) - self.rows.free
        if missing + reserve > self.pool.free:
            self.pool.release(found)
            return None
        heapq.heappop(self._waiting)
        row = self.rows.start(sequence)
        self.rows.add_blocks(row, found + self.pool.take(missing))
        self.rows.done[row] = len(found) * self._size
        return row

    def _find(self, sequence: Sequence, tokens: int) -> list[int]:
        """Cached blocks of the sequence; the last token is always computed, for its logits."""
        return self.pool.find(sequence.digests(self._size)[: (tokens - 1) // self._size])

    def _chunk(
        self,
        row: int,
        budget: int,
        chunks: list[tuple[int, int, int]],
        forks: list[tuple[int, int]],
    ) -> int:
        """Compute as many of the row's tokens as the budget allows; returns how many."""
        first = int(self.rows.done[row])
        end = min(int(self.rows.known[row]), first + budget)
        if end > first:
            chunks.append((row, first, end))
            self.rows.done[row] = end
            # Found by others from now on, in this very step too: a layer's keys are all written
            # before any are read.
            self._publish(row)
            if end == self.rows.known[row]:
                self._prefilling.remove(row)
                forks.extend((one, row) for one in self._fork(row))
        return end - first

    def _publish(self, row: int) -> None:
        """Let the full blocks that a row has computed be found."""
        sequence = self.rows.sequences[row]
        assert sequence is not None
        full = int(self.rows.done[row]) // self._size
        digests = sequence.request.digests
        if full > len(digests):
            known = np.concatenate([sequence.request.tokens, self.rows.drawn(row)])
            digests = block_digests(known, self._size)
        for block, digest in zip(self.rows.tables[row, :full].tolist(), digests, strict=False):
            self.pool.publish(block, digest)

    def _fork(self, row: int) -> list[int]:
        """Start the other samples of a prompt that this step completes."""
        leader = self.rows.sequences[row]
        assert leader is not None
        started: list[int] = []
        if self.rows.count[row]:
            return started  # it had been put back; the others started with it
        while self._waiting and self.rows.free:
            sequence = self._waiting[0][1]
            if sequence.cancelled:
                heapq.heappop(self._waiting)
                continue
            same = sequence.request is leader.request and not len(sequence.tokens)
            reserve = len(self.rows.sequences) - self.rows.free + 1
            if not same or reserve > self.pool.free:
                break
            heapq.heappop(self._waiting)
            blocks = self.rows.tables[row, : self.rows.blocks[row]].tolist()
            self.pool.share(blocks)
            new = self.rows.start(sequence)
            self.rows.add_blocks(new, blocks)
            self.rows.done[new] = self.rows.done[row]
            started.append(new)
        return started

    def _step(
        self,
        decoding: Array,
        chunks: list[tuple[int, int, int]],
        forks: list[tuple[int, int]],
        copies: list[tuple[int, int]],
    ) -> Step:
        rows = self.rows
        positions = rows.done[decoding]
        rows.done[decoding] += 1
        pieces = [np.arange(first, end) for _, first, end in chunks]
        computed = np.concatenate(
            [decoding, *(np.full(len(p), r) for (r, _, _), p in zip(chunks, pieces, strict=True))]
        ).astype(np.int64)
        positions = np.concatenate([positions, *pieces]).astype(np.int64)
        tokens = np.concatenate([rows.last[decoding], *(self._tokens(*chunk) for chunk in chunks)])
        blocks = rows.tables[computed, positions // self._size].astype(np.int64)
        sequences = np.concatenate([decoding, [row for row, _, _ in chunks]]).astype(np.int64)
        ends = len(decoding) + np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = np.concatenate([np.arange(len(decoding) + 1), ends]).astype(np.int32)
        contexts = rows.done[sequences]
        width = max(1, int(-(-contexts.max(initial=1) // self._size)))
        complete = [
            place
            for place, (row, _, end) in enumerate(chunks, start=len(decoding))
            if end == rows.known[row]
        ]
        drawing = np.concatenate([np.arange(len(decoding)), complete]).astype(np.int64)
        leaders = sequences[complete]
        # Of a fork: what its leader draws from.
        source = {int(row): index for index, row in enumerate(leaders, start=len(decoding))}
        return Step(
            tokens=tokens,
            positions=positions.astype(np.int32),
            slots=blocks * self._size + positions % self._size,
            tables=np.ascontiguousarray(rows.tables[sequences, :width]),
            contexts=contexts.astype(np.int32),
            starts=starts,
            decoding=len(decoding),
            copies=copies,
            wanted=(starts[1:][drawing] - 1).astype(np.int32),
            rows=np.concatenate([decoding, leaders, [new for new, _ in forks]]).astype(np.int64),
            source=np.concatenate(
                [np.arange(len(drawing)), [source[leader] for _, leader in forks]]
            ).astype(np.int64),
        )

    def _tokens(self, row: int, first: int, end: int) -> Array:
        sequence = self.rows.sequences[row]
        assert sequence is not None
        prompt = sequence.request.tokens
        if end <= len(prompt):
            return prompt[first:end]
        return np.concatenate([prompt, self.rows.drawn(row)])[first:end]
