"""What ends a sample: the model's own end tokens, a request's, and its stop strings."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rmr1.engine.config_json import end_token_ids, read_json
from rmr1.engine.detokenize import StopStrings, TokenTexts
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.sampling import SamplingParams

# Bits of what a token may mean: it ends a sample; a stop string may be complete with it, with
# ONLY_AFTER only if the token before it has BEFORE.
ENDS, MAY_END, ONLY_AFTER, BEFORE = 1, 2, 4, 8

# Settings whose tables are kept, the ones used last: a service may see ever new ones. Requests hold
# their own tables as long as they live.
_KEPT = 32


class Endings:
    """Tables over the vocabulary, made once for each setting."""

    def __init__(self, config: ModelConfig, tokenizer: Any) -> None:
        self._words, self._tokenizer = config.vocab_size, tokenizer
        self._own = _end_tokens(config, tokenizer)
        self._stops = lru_cache(_KEPT)(self._make_stops)
        self._flags = lru_cache(_KEPT)(self._make_flags)

    def tokens(self, params: SamplingParams) -> list[int]:
        """Every token that ends a sample."""
        own = set() if params.ignore_eos else self._own
        return sorted(own.union(params.stop_token_ids))

    def flags(self, params: SamplingParams) -> np.ndarray:
        """What each token may mean, [V] uint8; the same array for the same settings."""
        return self._flags(params.stop, params.stop_token_ids, params.ignore_eos)

    def stops(self, params: SamplingParams) -> StopStrings | None:
        """The matcher of the stop strings, if there are any."""
        return self._stops(params.stop) if params.stop else None

    @cached_property
    def _texts(self) -> TokenTexts:
        """Made when a stop string is first seen: it takes about 10 us a token."""
        return TokenTexts(self._tokenizer, self._words)

    def _make_stops(self, stop: tuple[str, ...]) -> StopStrings:
        return StopStrings(self._tokenizer, stop, self._words, self._texts)

    def _make_flags(
        self, stop: tuple[str, ...], stop_token_ids: tuple[int, ...], ignore_eos: bool
    ) -> np.ndarray:
        params = SamplingParams(stop=stop, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos)
        flags = np.zeros(self._words, dtype=np.uint8)
        flags[[token for token in self.tokens(params) if token < self._words]] |= ENDS
        stops = self.stops(params)
        if stops is not None:
            flags[stops.may_end] |= MAY_END
            flags[stops.only_after] |= ONLY_AFTER
            flags[stops.before] |= BEFORE
        return flags


def _end_tokens(config: ModelConfig, tokenizer: Any) -> set[int]:
    """The tokens with which the model ends a turn, by its tokenizer, config and generation config.

    They often differ: an instruct model's tokenizer names the end of a turn, its config the end of
    a text, and only generation_config.json both.
    """
    sources = [tokenizer.eos_token_id, config.eos_token_id]
    path = Path(str(getattr(tokenizer, "name_or_path", ""))) / "generation_config.json"
    if path.is_file():
        raw = read_json(path)
        try:
            sources.append(end_token_ids(raw))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    ends: set[int] = set()
    for source in sources:
        if source is not None:
            ends.update([source] if isinstance(source, int) else source)
    return ends
