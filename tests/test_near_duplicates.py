"""Near-duplicates: what is planted is found, what is different stays, and the recall is as told."""

from __future__ import annotations

import random
import sqlite3

import numpy as np
import pytest

from rmr1.datasets.near_duplicates import (
    CANDIDATES,
    SIGNATURE,
    NearDuplicates,
    band_rows,
    found_share,
)
from rmr1.datasets.shingles import Hashes, jaccard, mix, ngrams, normal, shingles

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(rng: random.Random, words: int = 120) -> str:
    return " ".join(
        "".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(words)
    ).capitalize()


class Stream:
    """Texts one after the other; says which earlier one each repeats."""

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        self.texts: dict[int, str] = {}
        database = sqlite3.connect(":memory:")
        self.near = NearDuplicates(database, self.texts.__getitem__, threshold=threshold, seed=seed)

    def see(self, text: str) -> int | None:
        sketch = self.near.sketch(text)
        found = self.near.earlier(sketch)
        if found is None:
            key = len(self.texts)
            self.texts[key] = text
            self.near.add(key, sketch)
        return found


def test_planted_near_duplicates_are_found_and_others_stay() -> None:
    rng = random.Random(0)
    originals = [text(rng) for _ in range(60)]
    stream = Stream()
    assert [stream.see(one) for one in originals] == [None] * 60
    for number, one in enumerate(originals):
        words = one.split()
        words[number] = "other"  # one word of 120
        assert stream.see(" ".join(words)) == number
        assert stream.see(f"  {one.upper()}\n") == number  # case and spaces do not count
        assert stream.see(one + " and a few words more") == number
        half = words[:60] + text(rng, 60).split()
        assert stream.see(" ".join(half)) is None


def test_the_first_of_the_stream_stays_whatever_the_seed() -> None:
    rng = random.Random(1)
    pair = text(rng), text(rng)
    for seed in (0, 1, 2):
        stream = Stream(seed=seed)
        assert [stream.see(one) for one in (*pair, *pair[::-1])] == [None, None, 1, 0]


@pytest.mark.parametrize("one", ["a", "いろはにほへとちりぬるを", "?!", "🙂"])
def test_short_texts_and_other_scripts(one: str) -> None:
    stream = Stream()
    assert [stream.see(one), stream.see("something else entirely"), stream.see(one)][:2] == [
        None
    ] * 2
    assert stream.see(one) == 0


def at_similarity(rng: np.random.Generator, similarity: float, size: int) -> tuple[Hashes, Hashes]:
    """Two sets whose Jaccard similarity is at least the wanted one, by as little as can be."""
    shared = int(np.ceil(2 * size * similarity / (1 + similarity)))
    numbers = np.unique(mix(rng.integers(0, 1 << 62, 2 * size, np.uint64)))
    left = numbers[:size]
    right = np.concatenate([left[:shared], numbers[size : 2 * size - shared]])
    return np.sort(left), np.sort(right)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_recall_at_the_threshold_is_what_the_docstring_says(threshold: float) -> None:
    rng = np.random.default_rng(0)
    found = 0
    trials = 300
    for trial in range(trials):
        left, right = at_similarity(rng, threshold, 400)
        assert threshold <= jaccard(left, right) < threshold + 0.005
        database = sqlite3.connect(":memory:")
        near = NearDuplicates(database, lambda key: "", threshold=threshold, seed=trial)
        one, other = near.sketch_of(left), near.sketch_of(right)
        found += bool(set(one.buckets) & set(other.buckets))
    promised = found_share(threshold, band_rows(threshold))
    assert promised >= 0.99
    assert found / trials >= promised - 3 * (promised * (1 - promised) / trials) ** 0.5 - 1e-9


def test_the_figures_of_the_docstring() -> None:
    assert (band_rows(0.8), SIGNATURE // band_rows(0.8)) == (8, 32)
    assert found_share(0.8, 8) == pytest.approx(0.997, abs=5e-4)
    assert found_share(0.87, 8) > 0.9999
    assert found_share(0.5, 8) < 0.12  # few are compared in vain


def test_the_estimate_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    near = NearDuplicates(sqlite3.connect(":memory:"), lambda key: "", threshold=0.8, seed=0)
    left, right = at_similarity(rng, 0.5, 3000)  # longer than one block of the table
    same = near.sketch_of(left).signature == near.sketch_of(right).signature
    assert float(same.mean()) == pytest.approx(0.5, abs=4 * 0.5 / SIGNATURE**0.5)


def test_a_crowd_in_the_same_buckets_does_not_hide_a_duplicate() -> None:
    """Texts filled into one form: far more candidates than are compared."""
    rng = random.Random(2)
    form = text(rng, 100)
    stream = Stream(threshold=0.9)
    filled = [f"{form} {text(rng, 12)}" for _ in range(2 * CANDIDATES)]
    assert all(stream.see(one) is None for one in filled)
    assert all(stream.see(one + " x") == number for number, one in enumerate(filled))


def test_shingles_are_the_same_everywhere() -> None:
    # A hash that depended on the process would make every build another one.
    assert shingles("ab").tolist() == [14916191407800947827]
    assert ngrams("One, two: THREE!", 3).tolist() == ngrams("one two three", 3).tolist()
    assert len(ngrams("one two", 3)) == 0
    assert len(ngrams("我们都是好人", 3)) == 4  # no spaces: every character is a word
    assert normal(" Ａ  b\n") == "a b"
