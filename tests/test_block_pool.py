"""Blocks of the paged cache: who uses them, what they hold, and which is given up first.

The random test drives the pool as the scheduler does, beside a model that keeps plain lists.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rmr1.engine.block_pool import BlockPool, block_digests

SIZE = 4


def digests_of(tokens: list[int], size: int = SIZE) -> list[bytes]:
    return block_digests(np.array(tokens, dtype=np.int64), size)


def kept(pool: BlockPool, digests: list[bytes]) -> list[int]:
    """Blocks that hold these digests and that nobody uses, as a sequence leaves them behind."""
    blocks = pool.take(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    return blocks


# --- Digests -------------------------------------------------------------------------------------


def test_a_digest_covers_all_tokens_before_it() -> None:
    one, other = digests_of([1, 2, 3, 4, 5, 6, 7, 8]), digests_of([1, 2, 3, 9, 5, 6, 7, 8])
    assert len(one) == len(other) == 2
    assert one[0] != other[0]
    assert one[1] != other[1]  # the same block after another beginning
    assert digests_of([5, 6, 7, 8])[0] != one[1]
    assert digests_of([1, 2, 3, 4, 1, 2, 3, 4])[0] != digests_of([1, 2, 3, 4, 1, 2, 3, 4])[1]


def test_digests_are_of_full_blocks_and_of_nothing_after_them() -> None:
    tokens = list(range(11))
    assert digests_of(tokens[:3]) == []
    assert [len(digests_of(tokens[:n])) for n in (4, 7, 8, 11)] == [1, 1, 2, 2]
    assert digests_of(tokens)[:1] == digests_of(tokens[:5])
    assert digests_of(tokens, 1)[:4] == digests_of(tokens[:4], 1)
    assert len(set(digests_of([7] * 40, 1))) == 40


def test_tokens_do_not_run_into_one_another() -> None:
    """1, 23 and 12, 3 have one decimal text; 256 and 1, 0 one run of bytes without zeros."""
    pairs = [[1, 23], [12, 3], [256, 0], [0, 1], [1, 0], [0, 256], [-1, 0], [2**32, 0]]
    assert len({digests_of(pair, 2)[0] for pair in pairs}) == len(pairs)


# --- Users, and the order of eviction ------------------------------------------------------------


def test_a_block_is_free_when_its_last_user_has_gone() -> None:
    pool = BlockPool(4)
    blocks = pool.take(3)
    assert len(set(blocks)) == 3
    assert pool.free == 1
    pool.share(blocks)
    pool.release(blocks)
    assert pool.free == 1
    assert pool.users[blocks].tolist() == [1, 1, 1]
    pool.release(blocks)
    assert pool.free == 4
    assert not pool.users.any()


def test_blank_blocks_go_before_kept_ones_and_then_the_longest_unused() -> None:
    pool = BlockPool(5)
    [first], [second], [third] = (kept(pool, digests_of([n] * SIZE)) for n in range(3))
    assert pool.free == 5
    assert pool.cached == 3
    blank = pool.take(2)
    assert not {first, second, third} & set(blank)
    assert pool.cached == 3
    # Used again, so the one that goes last.
    pool.share([first])
    pool.release([first])
    assert [pool.take(1)[0] for _ in range(3)] == [second, third, first]
    assert pool.cached == pool.free == 0


def test_a_lazy_pool_gives_up_what_is_kept_before_it_grows_past_twice_its_use() -> None:
    """Eager memory is there anyway: what is kept stays until the last blank block is gone."""
    begun = {}
    for lazy in (False, True):
        pool = BlockPool(100, lazy=lazy)
        for n in range(20):  # one after the other, two blocks in use at a time
            kept(pool, digests_of([n] * 2 * SIZE))
        begun[lazy] = pool.begun
        assert pool.cached == pool.begun
        assert pool.free == 100
    assert begun == {False: 40, True: 4}
    blocks = pool.take(50)  # more in use than ever: blocks are begun as they are needed
    assert len(set(blocks)) == 50
    assert pool.begun == 52  # two are kept
    pool.release(blocks)
    assert set(pool.take(50)) == set(blocks)  # and used again before others


def test_a_chain_is_given_up_from_its_end() -> None:
    pool = BlockPool(6)
    chain, other = digests_of(list(range(16))), digests_of([9] * 8)
    blocks = kept(pool, chain)
    younger = kept(pool, other)
    for length in (3, 2, 1, 0):
        pool.take(1)
        assert pool.find(chain) == blocks[:length]
        assert pool.find(other) == younger
    pool.take(1)
    assert pool.find(other) == younger[:1]


def test_find_takes_the_longest_known_beginning() -> None:
    pool = BlockPool(8)
    chain = digests_of(list(range(16)))
    blocks = kept(pool, chain)
    assert pool.find(chain) == blocks
    assert pool.find(chain[:2]) == blocks[:2]
    assert pool.find(digests_of([*range(8), *[7] * 8])) == blocks[:2]
    assert pool.find(digests_of([7, *range(1, 16)])) == []
    assert pool.find([]) == []
    assert pool.free == 8  # it only looks


def test_a_kept_block_that_is_shared_cannot_be_taken() -> None:
    pool = BlockPool(2)
    chain = digests_of([1] * SIZE)
    [block] = kept(pool, chain)
    pool.share(pool.find(chain))
    assert pool.free == 1
    assert pool.users[block] == 1
    assert pool.take(1) != [block]
    assert pool.find(chain) == [block]  # in use, and still to be found
    pool.share([block])
    pool.release([block])
    assert pool.free == 0
    pool.release([block])
    assert pool.free == 1


def test_what_is_known_already_stays_with_its_first_block() -> None:
    pool = BlockPool(3)
    [digest], [another] = digests_of([1] * SIZE), digests_of([2] * SIZE)
    first, second = pool.take(2)
    pool.publish(first, digest)
    pool.publish(second, digest)
    pool.publish(first, another)  # it holds what it held
    assert pool.cached == 1
    assert pool.find([digest]) == [first]
    assert pool.find([another]) == []
    pool.release([second])
    assert pool.take(2)[1:] != [first]
    assert pool.find([digest]) == [first]


def test_an_evicted_block_is_found_no_more_and_may_hold_something_else() -> None:
    pool = BlockPool(1)
    [old], [new] = digests_of([1] * SIZE), digests_of([2] * SIZE)
    kept(pool, [old])
    [block] = pool.take(1)
    assert pool.find([old]) == []
    pool.publish(block, new)
    pool.release([block])
    assert pool.find([new]) == [block]
    assert pool.find([old]) == []


def test_forget_leaves_the_blocks_in_use_and_nothing_to_find() -> None:
    pool = BlockPool(4)
    chain = digests_of([1] * 8)
    kept(pool, chain)
    used = pool.take(1)
    pool.publish(used[0], digests_of([3] * SIZE)[0])
    pool.forget()
    assert pool.cached == 0
    assert pool.free == 3
    assert pool.find(chain) == []
    pool.release(used)  # it is not kept: what it held is not valid any more
    assert pool.find(digests_of([3] * SIZE)) == []
    assert sorted(pool.take(4)) == [0, 1, 2, 3]


def test_what_must_not_happen_is_an_assertion() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.take(3)
    blocks = pool.take(2)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks[:1])
    with pytest.raises(AssertionError):
        pool.publish(blocks[0], b"digest")


# --- Against a model, by chance ------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """Sequences begin on what is known, publish, fork, end; now and then all is forgotten."""

    COUNT = 9
    LAZY = False

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.COUNT, lazy=self.LAZY)
        self.running: list[tuple[list[int], list[bytes]]] = []  # blocks, digests
        self.digest_of: dict[int, bytes] = {}
        self.unused: list[int] = []  # with contents, the longest unused first

    def users(self) -> Counter[int]:
        return Counter(block for blocks, _ in self.running for block in blocks)

    def known(self, digests: list[bytes]) -> list[int]:
        block_of = {digest: block for block, digest in self.digest_of.items()}
        found = []
        for digest in digests:
            if digest not in block_of:
                break
            found.append(block_of[digest])
        return found

    @rule(kinds=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def begin(self, kinds: list[int]) -> None:
        digests = digests_of(kinds, 1)
        found, used = self.known(digests), self.users()
        assert self.pool.find(digests) == found
        self.pool.share(found)
        self.unused = [block for block in self.unused if block not in found]
        missing = len(digests) - len(found)
        assert self.pool.free == self.COUNT - len(used | Counter(found))
        if missing > self.pool.free:
            self.running.append((found, digests[: len(found)]))
            self.end(len(self.running) - 1)
            return
        taken = self.pool.take(missing)
        blank = set(range(self.COUNT)) - set(used) - set(found) - set(self.unused)
        evicted = [block for block in taken if block not in blank]
        assert evicted == self.unused[: len(evicted)]
        assert len(set(taken)) == missing
        if not self.LAZY:
            assert len(evicted) == missing - min(missing, len(blank))
        for block in evicted:
            self.unused.remove(block)
            del self.digest_of[block]
        self.running.append((found + taken, digests))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), count=st.integers(1, 5))
    def publish(self, which: int, count: int) -> None:
        blocks, digests = self.running[which % len(self.running)]
        for block, digest in list(zip(blocks, digests, strict=True))[:count]:
            self.pool.publish(block, digest)
            if block not in self.digest_of and digest not in self.digest_of.values():
                self.digest_of[block] = digest

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        blocks, digests = self.running[which % len(self.running)]
        self.pool.share(blocks)
        self.running.append((list(blocks), digests))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        blocks, _ = self.running.pop(which % len(self.running))
        self.pool.release(blocks)
        left = self.users()
        for block in reversed(blocks):
            if block not in left and block in self.digest_of:
                self.unused.append(block)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.unused.clear()
        self.digest_of.clear()

    @invariant()
    def the_same(self) -> None:
        users = self.users()
        assert self.pool.users.tolist() == [users[block] for block in range(self.COUNT)]
        assert self.pool.free == self.COUNT - len(users)
        assert self.pool.cached == len(self.digest_of)
        for digest in self.digest_of.values():
            assert self.pool.find([digest]) == self.known([digest])

    def teardown(self) -> None:
        while self.running:
            self.end(0)
        assert sorted(self.pool.take(self.COUNT)) == list(range(self.COUNT))
        assert self.pool.cached == 0


class LazyPoolMachine(PoolMachine):
    """The same with memory that is taken as it comes into use."""

    LAZY = True


TestPool, TestLazyPool = PoolMachine.TestCase, LazyPoolMachine.TestCase
for case in (TestPool, TestLazyPool):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
