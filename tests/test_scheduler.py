"""The scheduler alone. In place of a model there is a chain of hashes, kept in a paged cache.

What a token's keys are depends on all tokens before it, as in a model: here it is the hash of the
token and of what the cache holds of the token before. What is drawn depends on it and on the
sequence alone. So a step that writes to a wrong slot, reads a block that somebody else has
overwritten, or shares what is not alike, ends in other tokens than a loop without a cache.
"""

from __future__ import annotations

import random
from itertools import count

import numpy as np
import pytest

from rmr1.engine.block_pool import BlockPool
from rmr1.engine.sampling import SamplingParams
from rmr1.engine.scheduler import Scheduler, Step
from rmr1.engine.sequences import Request, Rows, Sequence, new_sequences

WORDS = 50
FLAGS = np.zeros(WORDS, dtype=np.uint8)


def draw(state: int, key: int) -> int:
    return hash((state, key, 1)) % WORDS


def alone(sequence: Sequence) -> list[int]:
    """What a sequence draws, without a cache."""
    state, drawn = 0, list[int]()
    for token in sequence.request.tokens.tolist():
        state = hash((state, token))
    for _ in range(sequence.request.params.max_new_tokens):
        drawn.append(draw(state, sequence.key))
        state = hash((state, drawn[-1]))
    return drawn


class Engine:
    """Scheduler, rows and pool, and the cache of hashes that its steps are run on."""

    def __init__(self, blocks: int = 32, size: int = 4, rows: int = 8, budget: int = 16) -> None:
        self.pool, self.rows, self.size = BlockPool(blocks), Rows(rows, blocks), size
        self.budget = budget
        self.scheduler = Scheduler(self.pool, self.rows, size, budget)
        self.cache = np.zeros(blocks * size, dtype=np.int64)
        self.numbers = count()
        self.waiting: set[Sequence] = set()  # neither finished nor cancelled
        self.done: list[Sequence] = []
        self.drew: list[Sequence] = []  # in the last step

    def add(self, prompt: list[int], n: int = 1, new: int = 4) -> list[Sequence]:
        params = SamplingParams(n=n, max_new_tokens=new)
        request = Request(np.array(prompt, dtype=np.int64), params, next(self.numbers), FLAGS)
        request.hash_blocks(self.size)
        sequences = new_sequences(request, self.numbers)
        self.scheduler.add(sequences)
        self.waiting.update(sequences)
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)
        self.waiting.discard(sequence)

    def blocks(self, sequence: Sequence) -> list[int]:
        return self.rows.tables[sequence.row, : self.rows.blocks[sequence.row]].tolist()

    def step(self) -> Step:
        """Plan, compute, draw, and let the finished ones go."""
        step = self.scheduler.plan()
        self.check(step)
        for source, target in step.copies:
            old, new = (slice(b * self.size, (b + 1) * self.size) for b in (source, target))
            self.cache[new] = self.cache[old]
        states = self.compute(step)
        drawn = []
        self.drew = []
        for row, source in zip(step.rows.tolist(), step.source.tolist(), strict=True):
            one = self.rows.sequences[row]
            assert one is not None
            self.drew.append(one)
            drawn.append(draw(states[step.wanted[source]], one.key))
        assert len(set(step.rows.tolist())) == len(step.rows)
        tokens = np.array(drawn, dtype=np.int64)
        self.rows.draw(step.rows, tokens, np.zeros((2, len(drawn)), dtype=np.float32))
        for row in step.rows[self.rows.count[step.rows] >= self.rows.limit[step.rows]].tolist():
            sequence = self.scheduler.finish(row)
            self.waiting.remove(sequence)
            self.done.append(sequence)
        self.check_order()
        return step

    def compute(self, step: Step) -> list[int]:
        """The hash after each token, by the arrays of the step alone."""
        states = []
        for s, (begin, end) in enumerate(zip(step.starts, step.starts[1:], strict=False)):
            for token in range(begin, end):
                place = int(step.positions[token])
                before = 0
                if place:
                    block = int(step.tables[s, (place - 1) // self.size])
                    before = int(self.cache[block * self.size + (place - 1) % self.size])
                self.cache[step.slots[token]] = hash((before, int(step.tokens[token])))
                states.append(int(self.cache[step.slots[token]]))
        return states

    def check(self, step: Step) -> None:
        """The arrays of a step go together."""
        total, sequences = len(step.tokens), len(step.contexts)
        assert 0 < total <= self.budget
        assert step.positions.shape == step.slots.shape == (total,)
        assert [x.dtype for x in (step.tokens, step.slots)] == [np.int64] * 2
        others = (step.positions, step.tables, step.contexts, step.starts, step.wanted)
        assert [x.dtype for x in others] == [np.int32] * 5
        assert all(x.flags.c_contiguous for x in (*others, step.tokens, step.slots))
        assert step.starts[0] == 0
        assert step.starts[-1] == total
        lengths = np.diff(step.starts)
        assert lengths.min() >= 1
        assert (lengths[: step.decoding] == 1).all()
        assert step.tables.shape[0] == sequences == len(lengths)
        assert step.tables.shape[1] * self.size >= step.contexts.max()
        for s, (begin, end) in enumerate(zip(step.starts, step.starts[1:], strict=False)):
            places = step.positions[begin:end]
            assert places.tolist() == list(
                range(step.contexts[s] - (end - begin), step.contexts[s])
            )
            used = step.tables[s, : -(-step.contexts[s] // self.size)]
            assert used.min() >= 0
            assert used.max() < self.pool.count
            assert len(set(used.tolist())) == len(used)
            assert (self.pool.users[used] > 0).all()
            slots = used[places // self.size].astype(np.int64) * self.size + places % self.size
            assert step.slots[begin:end].tolist() == slots.tolist()
        assert len(set(step.slots.tolist())) == total
        lasts = set((step.starts[1:] - 1).tolist())
        assert set(step.wanted.tolist()) <= lasts
        assert step.wanted[: step.decoding].tolist() == list(range(step.decoding))
        assert sorted(set(step.source.tolist())) == list(range(len(step.wanted)))
        targets = [target for _, target in step.copies]
        assert len(set(targets)) == len(targets)
        assert not {source for source, _ in step.copies} & set(targets)

    def check_order(self) -> None:
        """Who came first runs first."""
        running = {one for one in self.rows.sequences if one is not None}
        assert running <= self.waiting
        if running and running < self.waiting:
            last = max(one.number for one in running)
            assert last < min(one.number for one in self.waiting - running)

    def run(self) -> int:
        steps = 0
        while self.waiting:
            self.step()
            steps += 1
        return steps

    def assert_idle(self) -> None:
        assert self.pool.free == self.pool.count
        assert not self.pool.users.any()
        assert self.rows.free == self.rows.capacity
        assert self.scheduler.running == []
        for sequence in self.done:
            assert sequence.tokens.tolist() == alone(sequence)


def tokens(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(WORDS), k=length)


# --- Budget, chunks ------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [8, 9, 31])
def test_the_budget_is_used_and_never_exceeded(budget: int) -> None:
    engine = Engine(budget=budget, blocks=100)
    for seed in range(6):
        engine.add(tokens(20, seed))
    left = 6 * 20
    while left:  # as long as there are prompts every step is full
        step = engine.step()
        assert len(step.tokens) == min(budget, left + step.decoding)
        left -= len(step.tokens) - step.decoding
    engine.run()
    engine.assert_idle()
    assert len(engine.done) == 6


def test_a_prompt_comes_in_pieces_beside_those_that_decode() -> None:
    engine = Engine(budget=8)
    engine.add(tokens(6), new=9)
    engine.step()
    [long] = engine.add(tokens(20, seed=1))
    pieces = []
    for _ in range(3):
        step = engine.step()
        assert step.decoding == 1
        pieces.append(np.diff(step.starts).tolist()[1:])
        assert (len(step.rows) == 2) == (len(pieces) == 3)  # drawn from when it is complete
    assert pieces == [[7], [7], [6]]
    assert engine.rows.count[long.row] == 1
    engine.run()
    engine.assert_idle()


def test_prompts_are_computed_in_order_of_arrival() -> None:
    engine = Engine(budget=10)
    first, second, third = (engine.add(tokens(7, seed), new=1)[0] for seed in range(3))
    assert np.diff(engine.step().starts).tolist() == [7, 3]
    assert engine.done == [first]
    assert np.diff(engine.step().starts).tolist() == [4, 6]
    assert engine.done == [first, second]
    engine.step()
    assert engine.done == [first, second, third]
    engine.assert_idle()


# --- Samples of one prompt -----------------------------------------------------------------------


def test_samples_share_a_prompt_and_copy_its_last_block() -> None:
    engine = Engine()
    samples = engine.add(tokens(10), n=4)
    step = engine.step()
    assert len(step.tokens) == 10  # computed once
    assert step.wanted.tolist() == [9]
    assert step.source.tolist() == [0, 0, 0, 0]
    assert engine.drew == samples
    assert engine.pool.free == 32 - 3
    shared = engine.blocks(samples[0])
    assert all(engine.blocks(one) == shared for one in samples)
    assert engine.pool.users[shared].tolist() == [4, 4, 4]
    step = engine.step()
    assert [source for source, _ in step.copies] == [shared[2]] * 3  # the last to write keeps it
    assert engine.pool.users[shared].tolist() == [4, 4, 1]
    assert engine.pool.free == 32 - 6
    assert step.decoding == 4
    assert all(not engine.step().copies for _ in range(2))
    engine.assert_idle()
    assert len({tuple(alone(one)) for one in samples}) == 4


def test_a_prompt_of_whole_blocks_needs_no_copies() -> None:
    engine = Engine()
    engine.add(tokens(8), n=3)
    engine.step()
    assert engine.pool.free == 32 - 2
    assert engine.step().copies == []
    assert engine.pool.free == 32 - 2 - 3
    engine.run()
    engine.assert_idle()


def test_a_sample_that_is_gone_needs_no_copy() -> None:
    engine = Engine()
    samples = engine.add(tokens(10), n=4)
    engine.step()
    engine.cancel(samples[1])
    engine.cancel(samples[3])
    assert len(engine.step().copies) == 1
    engine.run()
    engine.assert_idle()


def test_samples_that_find_no_row_enter_later() -> None:
    engine = Engine(rows=3, budget=64)
    samples = engine.add(tokens(10), n=5, new=3)
    assert engine.step().rows.shape == (3,)
    assert engine.drew == samples[:3]
    engine.step()
    engine.step()
    assert set(engine.done) == set(samples[:3])
    step = engine.step()
    assert len(step.tokens) == 2  # two full blocks are still there
    assert engine.drew == samples[3:]
    engine.run()
    engine.assert_idle()


# --- Beginnings in common ------------------------------------------------------------------------


def test_prompts_share_a_beginning_in_one_step() -> None:
    engine = Engine(budget=64)
    common = tokens(9)
    [first] = engine.add(common + tokens(4, seed=1))
    [second] = engine.add(common + tokens(7, seed=2))
    step = engine.step()
    assert np.diff(step.starts).tolist() == [13, 16 - 8]
    assert engine.blocks(first)[:2] == engine.blocks(second)[:2]
    assert not set(engine.blocks(first)[2:]) & set(engine.blocks(second)[2:])
    engine.run()
    engine.assert_idle()


def test_prompts_share_a_beginning_with_those_that_have_gone() -> None:
    engine = Engine(budget=64)
    engine.add(tokens(13))
    engine.run()
    engine.add(tokens(13))
    assert len(engine.step().tokens) == 1
    engine.run()
    engine.add([*tokens(13), 1, 2, 3])
    assert len(engine.step().tokens) == 4
    engine.run()
    engine.add([7, *tokens(13)[1:]])
    assert len(engine.step().tokens) == 13
    engine.run()
    engine.assert_idle()


def test_the_last_token_is_always_computed() -> None:
    engine = Engine(budget=64)
    for wanted in (12, 4):  # of whole blocks, the last one again
        engine.add(tokens(12))
        step = engine.step()
        assert len(step.tokens) == wanted
        assert step.wanted.tolist() == [wanted - 1]
        engine.run()
    engine.assert_idle()


def test_pieces_of_a_prompt_are_found_before_it_is_complete() -> None:
    engine = Engine(budget=8)
    [first] = engine.add(tokens(20))
    engine.step()
    engine.cancel(first)
    engine.add(tokens(20))
    step = engine.step()
    assert step.positions.tolist() == list(range(8, 16))
    engine.run()
    engine.assert_idle()


# --- Too little memory ---------------------------------------------------------------------------


def test_the_youngest_is_put_back_and_draws_the_same() -> None:
    engine = Engine(blocks=6, budget=64)
    sequences = [engine.add(tokens(7, seed), new=10)[0] for seed in range(3)]
    engine.step()
    assert [one.row >= 0 for one in sequences] == [True, True, False]  # one block in reserve
    while engine.scheduler.preemptions == 0:
        before = engine.rows.drawn(sequences[1].row).tolist()
        engine.step()
    assert sequences[0].row >= 0
    assert sequences[1].row < 0
    assert sequences[1].tokens.tolist() == before
    assert 0 < len(before) < 10
    engine.run()
    assert engine.done == sequences
    engine.assert_idle()


def test_blocks_of_one_put_back_are_found_again() -> None:
    engine = Engine(blocks=7, budget=64)
    first, second = (engine.add(tokens(8, seed), new=9)[0] for seed in range(2))
    while engine.scheduler.preemptions == 0:
        engine.step()
    assert len(second.tokens) > 4
    engine.cancel(first)
    known = len(second.request.tokens) + len(second.tokens)
    step = engine.step()
    # Full blocks, with drawn tokens too, but for the one that was taken from it.
    assert step.positions.tolist() == list(range(step.positions[0], known))
    assert step.positions[0] >= 8
    engine.run()
    engine.assert_idle()


@pytest.mark.parametrize(("prompt", "new"), [(14, 7), (6, 15), (20, 1)])
def test_a_pool_that_holds_one_sequence(prompt: int, new: int) -> None:
    engine = Engine(blocks=5, budget=8)  # 20 tokens: the last one drawn is not kept
    sequences = [one for seed in range(5) for one in engine.add(tokens(prompt, seed), n=2, new=new)]
    engine.run()
    assert set(engine.done) == set(sequences)
    engine.assert_idle()
    assert (engine.scheduler.preemptions > 0) == (prompt == 6)  # the others enter one by one


def test_the_oldest_never_waits_however_many_come() -> None:
    engine = Engine(blocks=8, rows=6, budget=12)
    [oldest] = engine.add(tokens(6), new=25)
    steps = 0
    while oldest in engine.waiting:
        for seed in range(2):
            engine.add(tokens(3, seed=9 * steps + seed), n=2, new=9)
        engine.step()
        assert oldest in engine.drew
        steps += 1
    assert steps == 25
    assert engine.scheduler.preemptions > 2
    engine.run()
    engine.assert_idle()


# --- Cancelling, and beginning anew --------------------------------------------------------------


def test_cancel_in_every_state() -> None:
    engine = Engine(blocks=12, rows=4, budget=8)
    [decoding] = engine.add(tokens(5), new=9)
    engine.step()
    [prefilling] = engine.add(tokens(17, seed=1))
    [waiting] = engine.add(tokens(8, seed=2))
    engine.step()
    assert engine.rows.count[decoding.row] == 2
    assert engine.rows.done[prefilling.row] == 7
    assert waiting.row < 0
    last = engine.add(tokens(3, seed=3), n=2)
    for sequence in (waiting, prefilling, decoding):
        engine.cancel(sequence)
    assert engine.pool.free == 12
    assert engine.rows.free == 4
    engine.step()
    assert engine.drew == last
    engine.run()
    assert engine.done == last
    assert not engine.scheduler.unfinished
    engine.assert_idle()


def test_cancel_one_that_was_put_back() -> None:
    engine = Engine(blocks=6, budget=64)
    first, second = (engine.add(tokens(8, seed), new=9)[0] for seed in range(2))
    while engine.scheduler.preemptions == 0:
        engine.step()
    assert len(second.tokens)
    engine.cancel(second)
    engine.run()
    assert engine.done == [first]
    assert not engine.scheduler.unfinished
    engine.assert_idle()


def test_the_first_sample_may_be_cancelled_before_the_others_begin() -> None:
    engine = Engine(budget=8)
    first, second, third = engine.add(tokens(13), n=3)
    engine.step()
    engine.cancel(first)
    step = engine.step()
    assert step.positions.tolist() == list(range(8, 13))
    assert engine.drew == [second, third]
    engine.run()
    engine.assert_idle()


@pytest.mark.parametrize("rows", [1, 2])
def test_who_is_cancelled_in_the_queue_leaves_nothing(rows: int) -> None:
    engine = Engine(rows=rows, budget=8)
    first, second, third = (engine.add(tokens(8, seed), new=1)[0] for seed in range(3))
    engine.cancel(third)
    engine.run()
    assert engine.done == [first, second]
    assert not engine.scheduler.unfinished


def test_restart_computes_everything_anew() -> None:
    engine = Engine(blocks=6, budget=8)
    sequences = [one for seed in range(3) for one in engine.add(tokens(9, seed), n=2, new=9)]
    while engine.scheduler.preemptions == 0:
        engine.step()
    engine.scheduler.restart()
    assert engine.pool.free == 6
    assert engine.pool.cached == 0
    assert engine.rows.free == 8
    assert not any(len(one.tokens) or one.logprobs.shape[1] for one in engine.waiting)
    engine.cache[:] = -1  # nothing of it may be read
    step = engine.step()
    assert step.positions.tolist() == list(range(8))
    engine.run()
    assert set(engine.done) == set(sequences)
    engine.assert_idle()


# --- By chance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "size", "rows", "budget"),
    [(7, 4, 8, 8), (26, 1, 4, 5), (9, 3, 2, 2), (2, 16, 8, 64), (40, 2, 12, 16), (60, 4, 16, 100)],
)
def test_random_requests(blocks: int, size: int, rows: int, budget: int) -> None:
    chance = random.Random(blocks)
    engine = Engine(blocks, size, rows, budget)
    longest = blocks * size
    beginnings = [tokens(12, seed) for seed in range(3)]
    added = cancelled = restarts = 0
    while added < 100 or engine.waiting:
        if added < 100 and chance.random() < 0.4:
            beginning = chance.choice(beginnings)[: chance.randrange(13)]
            prompt = beginning + chance.choices(range(WORDS), k=chance.randint(1, 6))
            new = chance.randint(1, min(12, longest - len(prompt) + 1))
            added += len(engine.add(prompt, n=chance.choice([1, 1, 2, 5]), new=new))
        if engine.waiting and chance.random() < 0.05:
            engine.cancel(min(engine.waiting, key=lambda one: hash((one.number, added))))
            cancelled += 1
        if chance.random() < 0.01:
            engine.scheduler.restart()
            restarts += 1
        if engine.waiting:
            engine.step()
    assert len(engine.done) + cancelled == added
    assert cancelled > 3
    assert restarts > 0
    assert engine.scheduler.preemptions > 0 or blocks in (2, 60)
    engine.assert_idle()
