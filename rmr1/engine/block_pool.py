"""Which blocks of the paged KV cache are in use, by how many sequences, and what they hold.

A block that no sequence uses any more keeps its keys and values, and can be found by what it holds,
until its place is needed: prompts that begin alike, in one call or in several, share their blocks.
What a full block of a prompt holds is named by a digest of all tokens up to its end.

Source: the prefix cache of vLLM (hash-chained blocks), of which this is an independent version.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np


def block_digests(tokens: np.ndarray, block_size: int) -> list[bytes]:
    """Digests of the full blocks of a sequence, tokens [T] int64: each covers all before it too."""
    digests = []
    digest = b""
    for end in range(block_size, len(tokens) + 1, block_size):
        block = tokens[end - block_size : end].tobytes()
        digest = blake2b(digest + block, digest_size=16).digest()
        digests.append(digest)
    return digests


class BlockPool:
    """A fixed number of blocks with reference counts. Block ids are 0 .. count - 1.

    `lazy`: a block takes memory only once it is used. Then what is kept for later is given up
    before ever new blocks are begun, as soon as it is more than was in use at any time.
    """

    def __init__(self, count: int, *, lazy: bool = False) -> None:
        self.count, self.lazy = count, lazy
        self.users = np.zeros(count, dtype=np.int32)  # sequences that use a block
        self.begun = 0  # blocks below this have been used at some time
        self._peak = 0  # the most that were in use at a time
        self._blank: list[int] = []  # begun, without contents; a stack: warm memory first
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused with contents, oldest first
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that `take` could give now."""
        return self.count - self.begun + len(self._blank) + len(self._kept)

    @property
    def cached(self) -> int:
        """Blocks that can be found by what they hold."""
        return len(self._by_digest)

    def take(self, count: int) -> list[int]:
        """Blocks for new contents, each with one user: blank ones, then the longest unused."""
        assert count <= self.free
        blocks = [self._next() for _ in range(count)]
        self.users[blocks] = 1
        self._peak = max(self._peak, self.begun - len(self._blank) - len(self._kept))
        return blocks

    def _next(self) -> int:
        if self._blank:
            return self._blank.pop()
        if self.begun < self.count and not (self.lazy and len(self._kept) > self._peak):
            self.begun += 1
            return self.begun - 1
        block, _ = self._kept.popitem(last=False)
        del self._by_digest[self._digest_of.pop(block)]
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each."""
        for block in blocks:
            if self.users[block] == 0:
                del self._kept[block]
            self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each block of a sequence, in its order.

        The last ones are given up first: a chain is found from its beginning, so what is left of it
        stays useful.
        """
        for block in reversed(blocks):
            assert self.users[block] > 0
            self.users[block] -= 1
            if self.users[block]:
                continue
            if block in self._digest_of:
                self._kept[block] = None
            else:
                self._blank.append(block)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a chain; `share` them before `take`."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, block: int, digest: bytes) -> None:
        """Let a used block be found; a digest that is known already stays with its first block."""
        assert self.users[block] > 0
        if digest not in self._by_digest and block not in self._digest_of:
            self._by_digest[digest] = block
            self._digest_of[block] = digest

    def forget(self) -> None:
        """Nothing that any block holds is valid any more, as when the weights have changed."""
        self._blank.extend(reversed(self._kept))
        self._kept.clear()
        self._by_digest.clear()
        self._digest_of.clear()
