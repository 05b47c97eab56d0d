"""Texts as sets of 64-bit numbers: what near-duplicates and contamination are counted in.

A shingle is a run of neighbouring characters, an n-gram one of neighbouring words. Both are hashed
by the same rolling polynomial, which numpy evaluates for a whole text at once. The same text gives
the same numbers on every machine and in every process.

Legend: C characters or words of a text, n length of a run.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)
# Scripts without spaces between words: there every character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]|[^\W_]+")


def normal(text: str) -> str:
    """A text without what does not tell two texts apart: case, width, runs of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a text, case folded, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def mix(values: Hashes) -> Hashes:
    """Spread numbers over all 64 bits (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def runs(codes: Hashes, n: int) -> Hashes:
    """A hash of every run of n neighbours, in their order; none if there are fewer."""
    if len(codes) < n:
        return np.empty(0, np.uint64)
    total = np.zeros(len(codes) - n + 1, np.uint64)  # [C - n + 1]
    for offset in range(n):  # Horner's rule, for all runs at once, modulo 2**64
        total = total * _BASE + codes[offset : len(codes) - n + 1 + offset]
    return mix(total)


def shingles(text: str, n: int = 8) -> Hashes:
    """The distinct runs of n characters of a text, sorted; a shorter text is one run."""
    codes = np.frombuffer(normal(text).encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.unique(runs(mix(codes.astype(np.uint64) + np.uint64(1)), min(n, len(codes))))


def word_codes(found: Sequence[str]) -> Hashes:
    """A number for every word, ready for `runs`."""
    codes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found]
    return mix(np.array(codes, np.uint64))


def ngrams(text: str, n: int) -> Hashes:
    """The distinct runs of n words of a text, sorted; none if it has fewer words."""
    return np.unique(runs(word_codes(words(text)), n))


def jaccard(left: Hashes, right: Hashes) -> float:
    """The share of two sorted sets that is in both, between 0 and 1."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(1, len(left) + len(right) - shared)
