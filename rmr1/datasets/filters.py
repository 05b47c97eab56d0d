"""What a candidate is dropped for: each test gives a reason, and what it found, or None.

Cheap tests come first, and the near-duplicate test last: a pair that is dropped for another reason
must not keep a later one out.
"""

from __future__ import annotations

from dataclasses import dataclass

from rmr1.datasets.build_config import BuildConfig, FilterConfig
from rmr1.datasets.contamination import Benchmarks
from rmr1.datasets.near_duplicates import NearDuplicates, Sketch
from rmr1.datasets.sources import NO_USER_TURN, Candidate
from rmr1.datasets.store import PairStore
from rmr1.prompts import encode, load_prompt

EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
SAME_ANSWERS = "identical answers"
STRAY_TOKEN = "stray token"
REPEATED = "repeated pair"
OTHER_LABEL = "repeated, other label"
TOO_LONG = "prompt too long"
NEAR_DUPLICATE = "near duplicate"
CONTAMINATED = "in {}"  # a benchmark

# Where one order is this close to the limit the other is counted too: how a text is cut into
# tokens changes by a few where answers meet other neighbours.
_NEAR_THE_LIMIT = 32


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a candidate is not kept; `detail` names what it repeats, or the text that was found."""

    reason: str
    detail: str = ""


def unfit(candidate: Candidate, stray_tokens: list[str]) -> Dropped | None:
    """The tests that look at one candidate alone."""
    texts = [turn["content"] for turn in candidate.conversation]
    if not candidate.conversation or candidate.conversation[-1]["role"] != "user":
        return Dropped(NO_USER_TURN)
    if not texts[-1].strip():
        return Dropped(EMPTY_PROMPT)
    if not candidate.chosen.strip() or not candidate.rejected.strip():
        return Dropped(EMPTY_ANSWER)
    if candidate.chosen.strip() == candidate.rejected.strip():
        return Dropped(SAME_ANSWERS)
    for token in stray_tokens:
        if any(token in text for text in (*texts, candidate.chosen, candidate.rejected)):
            return Dropped(STRAY_TOKEN, token)
    return None


class LengthFilter:
    """Tokens of the judge's prompt, by the model and the prompt that will judge."""

    def __init__(self, config: FilterConfig) -> None:
        from rmr1.models import load_tokenizer, resolve_model

        self._tokenizer = load_tokenizer(resolve_model(config.model))
        self._prompt = load_prompt(config.prompt_style, tuple(config.prompt_without))
        self._limit = config.max_prompt_tokens or 0

    def dropped(self, candidate: Candidate) -> Dropped | None:
        """Whether the prompt is over the limit in either order."""
        longest = self._tokens(candidate, "A")
        if abs(longest - self._limit) <= _NEAR_THE_LIMIT:
            longest = max(longest, self._tokens(candidate, "B"))
        return Dropped(TOO_LONG, f"{longest} tokens") if longest > self._limit else None

    def _tokens(self, candidate: Candidate, label: str) -> int:
        pair = candidate.pair("A" if label == "A" else "B")
        return len(encode(self._tokenizer, self._prompt.render(pair)))


class Filters:
    """All tests of a build. `keep` stores a candidate that passes them."""

    def __init__(self, config: BuildConfig, store: PairStore) -> None:
        self._store, self._config = store, config.filters
        self._length = LengthFilter(config.filters) if config.filters.model else None
        paths = config.contamination.paths
        overlap = config.contamination.overlap
        self.benchmarks = Benchmarks(paths, overlap=overlap) if paths else None
        self._similar: NearDuplicates | None = None
        if (threshold := config.filters.near_duplicates) is not None:
            self._similar = NearDuplicates(
                store.database,
                lambda key: self._compared(store.candidate(key)),
                threshold=threshold,
                seed=config.seed,
            )

    def _compared(self, candidate: Candidate) -> str:
        """What near-duplicates are found by. A pair is one text, whichever answer is better."""
        turns = [turn["content"] for turn in candidate.conversation]
        if self._config.similar_by == "conversation":
            return "\n".join(turns)
        return "\n".join([*turns, *sorted((candidate.chosen, candidate.rejected))])

    def keep(self, candidate: Candidate, content: str, origin: str) -> Dropped | bool:
        """Store a candidate of a source, or say why not. True: its id was taken and is another."""
        if dropped := unfit(candidate, self._config.stray_tokens):
            return dropped
        if (key := self._store.known(content)) is not None:
            earlier = self._store.candidate(key)
            same = earlier.chosen == candidate.chosen
            return Dropped(REPEATED if same else OTHER_LABEL, earlier.id)
        if self.benchmarks and (hit := self.benchmarks.hit(candidate.conversation)):
            told = f"{hit.item} ({hit.overlap:.0%})"
            return Dropped(CONTAMINATED.format(hit.benchmark), told)
        if self._length and (dropped := self._length.dropped(candidate)):
            return dropped
        sketch: Sketch | None = None
        if self._similar:
            sketch = self._similar.sketch(self._compared(candidate))
            if (key := self._similar.earlier(sketch)) is not None:
                return Dropped(NEAR_DUPLICATE, self._store.candidate(key).id)
        key, renamed = self._store.add(candidate, content, origin)
        if self._similar and sketch:
            self._similar.add(key, sketch)
        return renamed
