"""Requests, the samples made for them, and the rows of those that run.

What is known of the rows lies in arrays over all rows, so that a step of generation has no loop
over sequences; a loop runs only over those that start, end or need a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rmr1.engine.block_pool import block_digests
from rmr1.engine.detokenize import StopStrings
from rmr1.engine.endings import BEFORE, ENDS, MAY_END, ONLY_AFTER
from rmr1.engine.sampling import SamplingParams, sequence_key

Array = np.ndarray


@dataclass(slots=True, eq=False)
class Request:
    """A prompt to be continued `params.n` times.

    `index` is the prompt's place in its call: the noise depends on it, or on `draws_as` where that
    is given. `flags` [V] and `stops` say what ends a sample, see `endings.py`.
    """

    tokens: Array  # [P] int64
    params: SamplingParams
    index: int
    flags: Array  # [V] uint8
    stops: StopStrings | None = None
    digests: list[bytes] = field(default_factory=list)
    draws_as: int | None = None

    def hash_blocks(self, block_size: int) -> None:
        """Name what the prompt's full blocks hold."""
        self.digests = block_digests(self.tokens, block_size)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request. `number` is its place in the order of arrival."""

    request: Request
    sample: int
    number: int
    key: int
    row: int = -1
    cancelled: bool = False
    # What it had drawn when it lost its row.
    tokens: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    logprobs: Array = field(default_factory=lambda: np.empty((2, 0), dtype=np.float32))

    # How often it has lost what it had drawn, to new weights.
    restarts: int = 0
    _digests: list[bytes] | None = None

    def restart(self) -> None:
        """Forget what was drawn."""
        self._digests = None
        if len(self.tokens):
            self.tokens, self.logprobs = self.tokens[:0], self.logprobs[:, :0]
            self.restarts += 1

    def digests(self, block_size: int) -> list[bytes]:
        """Of the full blocks of a sequence without a row, prompt and drawn tokens."""
        if not len(self.tokens):
            return self.request.digests
        if self._digests is None:  # it may wait for many steps, and is asked at each
            known = np.concatenate([self.request.tokens, self.tokens])
            self._digests = block_digests(known, block_size)
        return self._digests


def new_sequences(request: Request, numbers: Iterator[int]) -> list[Sequence]:
    """The samples of a request; `numbers` gives each its place in the order of arrival."""
    seed, samples = request.params.seed, range(request.params.n)
    index = request.index if request.draws_as is None else request.draws_as
    prompt = request.params.first_prompt + index
    return [
        Sequence(request, sample, next(numbers), sequence_key(seed, prompt, sample))
        for sample in samples
    ]


class Rows:
    """The running sequences, as arrays over R rows."""

    def __init__(self, rows: int, table_width: int) -> None:
        self.capacity = rows
        self.sequences: list[Sequence | None] = [None] * rows
        self.tables = np.full((rows, table_width), -1, dtype=np.int32)
        self.blocks = np.zeros(rows, dtype=np.int64)  # blocks in the table
        self.known = np.zeros(rows, dtype=np.int64)  # tokens, prompt and drawn
        self.done = np.zeros(rows, dtype=np.int64)  # of them with keys and values in the cache
        self.count = np.zeros(rows, dtype=np.int64)  # tokens drawn
        self.limit = np.zeros(rows, dtype=np.int64)  # max_new_tokens
        self.last = np.zeros(rows, dtype=np.int64)  # the token drawn last
        self.keys = np.zeros(rows, dtype=np.uint64)
        self.temperature = np.zeros(rows, dtype=np.float32)
        self.top_k = np.zeros(rows, dtype=np.int32)
        self.top_p = np.zeros(rows, dtype=np.float32)
        self.min_p = np.zeros(rows, dtype=np.float32)
        self.tokens = np.empty((rows, 0), dtype=np.int64)
        self.logprobs = np.empty((2, rows, 0), dtype=np.float32)  # full, and sampled, distribution
        # What tokens mean differs between requests: the tables in use by id, and which a row uses.
        self._flag_tables: dict[int, Array] = {}
        self._flag_table = np.zeros(rows, dtype=np.int64)  # 0: none
        self._free = list(range(rows - 1, -1, -1))

    @property
    def free(self) -> int:
        """Rows that nobody uses."""
        return len(self._free)

    def start(self, sequence: Sequence) -> int:
        """Give a sequence a row, with what it had drawn before."""
        row = sequence.row = self._free.pop()
        params, drawn = sequence.request.params, len(sequence.tokens)
        self._widen(params.max_new_tokens)
        self.sequences[row] = sequence
        self.known[row] = len(sequence.request.tokens) + drawn
        self.done[row] = 0
        self.blocks[row] = 0
        self.count[row] = drawn
        self.limit[row] = params.max_new_tokens
        self.keys[row] = sequence.key
        table = sequence.request.flags
        self._flag_tables[id(table)] = table
        self._flag_table[row] = id(table)
        self.temperature[row] = params.temperature
        self.top_k[row], self.top_p[row], self.min_p[row] = params.top_k, params.top_p, params.min_p
        self.tokens[row, :drawn] = sequence.tokens
        self.logprobs[:, row, :drawn] = sequence.logprobs
        return row

    def stop(self, row: int) -> Sequence:
        """Take the row from its sequence, which keeps what it has drawn."""
        sequence = self.sequences[row]
        assert sequence is not None
        drawn = int(self.count[row])
        sequence._digests = None
        sequence.tokens = self.tokens[row, :drawn].copy()
        sequence.logprobs = self.logprobs[:, row, :drawn].copy()
        sequence.row = -1
        self.sequences[row] = None
        self._flag_table[row] = 0
        table = id(sequence.request.flags)
        if not (self._flag_table == table).any():
            del self._flag_tables[table]
        self._free.append(row)
        return sequence

    def drawn(self, row: int) -> Array:
        """The tokens a row has drawn so far."""
        return self.tokens[row, : int(self.count[row])]

    def draw(self, rows: Array, tokens: Array, logprobs: Array) -> None:
        """One more token for each of these rows: tokens [B], logprobs [2, B]."""
        place = self.count[rows]
        self.tokens[rows, place] = tokens
        self.logprobs[:, rows, place] = logprobs
        self.last[rows] = tokens
        self.count[rows] += 1
        self.known[rows] += 1

    def flags(self, rows: Array, tokens: Array) -> Array:
        """What the tokens that these rows drew last mean, ENDS and MAY_END: [B] -> [B] uint8."""
        before = self.tokens[rows, np.maximum(self.count[rows] - 2, 0)]
        if len(self._flag_tables) == 1:
            [table] = self._flag_tables.values()
            return _meaning(table, tokens, before)
        found = np.empty(len(rows), dtype=np.uint8)
        for number in np.unique(self._flag_table[rows]):
            here = self._flag_table[rows] == number
            found[here] = _meaning(self._flag_tables[int(number)], tokens[here], before[here])
        return found

    def add_blocks(self, row: int, blocks: list[int]) -> None:
        """Append to the table of a row."""
        used = int(self.blocks[row])
        self.tables[row, used : used + len(blocks)] = blocks
        self.blocks[row] = used + len(blocks)

    def _widen(self, width: int) -> None:
        have = self.tokens.shape[1]
        if width > have:
            more = ((0, 0), (0, width - have))
            self.tokens = np.pad(self.tokens, more)
            self.logprobs = np.pad(self.logprobs, ((0, 0), *more))


def _meaning(flags: Array, tokens: Array, before: Array) -> Array:
    """ENDS and MAY_END of tokens [B], by a table of flags [V] and the tokens before them [B]."""
    found = flags[tokens]
    alone = (found & ONLY_AFTER != 0) & (flags[before] & BEFORE == 0)
    return np.where(alone, found & ENDS, found & (ENDS | MAY_END))
