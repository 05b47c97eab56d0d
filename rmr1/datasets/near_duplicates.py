"""Near-duplicates of a stream: MinHash signatures, banded into buckets that live on disk.

A text is the set of its 8-character shingles. Its signature is the least of `SIGNATURE` seeded
hashes over that set; two signatures agree in a place with the probability that is the sets' Jaccard
similarity s. Signatures are cut into bands of r places, and texts that share a whole band are
compared: first by their signatures, then by the sets themselves. So nothing under the threshold is
ever called a duplicate, and of pairs at similarity s

    1 - (1 - s**r)**bands

are found. r is the largest for which that is at least 99% at s = threshold (measured by
tests/test_near_duplicates.py: at 0.8, r = 8 and 32 bands, 99.7%), so recall grows from there:
99.99% at 0.87. The first text of the stream stays; the same stream and seed give the same result.

Of a text's candidates the 50 that share most bands are compared: a bound on the time where a whole
data set is filled into one form. Legend: K signature places, N shingles, r places of a band.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rmr1.datasets.shingles import Hashes, jaccard, mix, shingles

SIGNATURE = 256
RECALL = 0.99
CANDIDATES = 50
# Six standard deviations of the estimate: a true pair does not fail it.
_MARGIN = 6 * 0.5 / SIGNATURE**0.5
_AT_ONCE = 128  # shingles: the table of their hashes stays in the cache

Signature = NDArray[np.uint32]


def found_share(similarity: float, rows: int) -> float:
    """The share of pairs at a similarity that share a band of `rows` places."""
    return float(1 - (1 - similarity**rows) ** (SIGNATURE // rows))


def band_rows(threshold: float) -> int:
    """Places of a band: the most for which the recall at the threshold is at least RECALL."""
    return max(rows for rows in range(1, 65) if rows == 1 or found_share(threshold, rows) >= RECALL)


@dataclass(frozen=True, slots=True)
class Sketch:
    """A text's shingles [N], signature [K] and the numbers of its buckets."""

    shingles: Hashes
    signature: Signature
    buckets: list[int]


class NearDuplicates:
    """The texts so far, by their keys.

    Args:
        database: where signatures and buckets are kept; two tables are made in it.
        text_of: the text of a key that was added.
        threshold: Jaccard similarity from which a text is a duplicate, above 0 and at most 1.
        seed: of the hash functions.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        text_of: Callable[[int], str],
        *,
        threshold: float,
        seed: int,
    ) -> None:
        self._database, self._text_of, self._threshold = database, text_of, threshold
        self._rows = band_rows(threshold)
        draw = np.random.Generator(np.random.PCG64(seed))
        self._scale = draw.integers(0, 1 << 63, SIGNATURE, np.uint64) * np.uint64(2) + np.uint64(1)
        self._shift = draw.integers(0, 1 << 63, SIGNATURE, np.uint64)
        database.execute("CREATE TABLE signature (key INTEGER PRIMARY KEY, places BLOB)")
        database.execute(
            "CREATE TABLE bucket (number INTEGER, key INTEGER, PRIMARY KEY (number, key))"
            " WITHOUT ROWID"
        )

    def sketch(self, text: str) -> Sketch:
        """What a text is compared by."""
        return self.sketch_of(shingles(text))

    def sketch_of(self, runs: Hashes) -> Sketch:
        """The same from the text's shingles. A text without any repeats none."""
        least = np.full(SIGNATURE, np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(runs), _AT_ONCE):
            part = runs[start : start + _AT_ONCE, None]  # [N, 1]
            least = np.minimum(least, (part * self._scale + self._shift).min(axis=0))  # [K]
        signature = (least >> np.uint64(32)).astype(np.uint32)
        bands = SIGNATURE // self._rows
        places = signature[: bands * self._rows].reshape(bands, self._rows).astype(np.uint64)
        number = mix(np.arange(bands, dtype=np.uint64))  # [bands]
        for place in range(self._rows):
            number = mix(number ^ places[:, place])
        return Sketch(runs, signature, [int(value) for value in number.view(np.int64)])

    def earlier(self, sketch: Sketch) -> int | None:
        """The key of an earlier text that this one repeats, or None."""
        slots = ",".join("?" * len(sketch.buckets))
        candidates = self._database.execute(
            f"SELECT key, places FROM (SELECT key, count(*) AS shared FROM bucket WHERE number IN"
            f" ({slots}) GROUP BY key ORDER BY shared DESC, key LIMIT {CANDIDATES})"
            " JOIN signature USING (key) ORDER BY key",
            sketch.buckets,
        ).fetchall()
        for key, places in candidates:
            estimate = float((np.frombuffer(places, np.uint32) == sketch.signature).mean())
            if estimate < self._threshold - _MARGIN:
                continue
            if jaccard(sketch.shingles, shingles(self._text_of(key))) >= self._threshold:
                return int(key)
        return None

    def add(self, key: int, sketch: Sketch) -> None:
        """Remember a text that stays."""
        self._database.execute(
            "INSERT INTO signature VALUES (?, ?)", (key, sketch.signature.tobytes())
        )
        self._database.executemany(
            "INSERT OR IGNORE INTO bucket VALUES (?, ?)",
            [(number, key) for number in sketch.buckets],
        )
