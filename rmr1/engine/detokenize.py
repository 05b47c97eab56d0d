"""From tokens to text: decoding, and stop strings that may lie across token borders."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

# Tokens of context decoded before the shortest tail that can hold a stop string: decoders treat the
# very first token apart (a leading space is dropped), and special tokens add no text.
_CONTEXT = 8


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of the tokens without special ones; added tokens that are not special stay."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class StopStrings:
    """Finds the first stop string of a growing sequence, at little cost per token.

    A stop string can only become complete with a token that holds its last character, so a table
    over the vocabulary, looked up for the whole batch at once, leaves few sequences to decode, and
    of those only the tail is decoded.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], vocabulary: int) -> None:
        assert stop
        self._tokenizer = tokenizer
        self._stop = stop
        # A token has at least one byte, so this many tokens hold the longest stop string.
        self._tail = max(len(text.encode()) for text in stop) + _CONTEXT
        # [V] bool: tokens with which a stop string may become complete.
        self.may_end = self._last_characters(vocabulary)

    def _last_characters(self, vocabulary: int) -> np.ndarray:
        everything = np.ones(vocabulary, dtype=bool)
        last = {text[-1] for text in self._stop}
        if any(character.isspace() for character in last):
            return everything  # decoders drop or add spaces around a token that stands alone
        # Half of a multi-byte character decodes to the replacement character.
        last.add("\ufffd")
        known = range(min(vocabulary, len(self._tokenizer)))
        ends = [not last.isdisjoint(decode(self._tokenizer, [token])) for token in known]
        everything[: len(ends)] = ends
        return everything

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Where in `decode(tokenizer, token_ids)` the first stop string begins, if one does."""
        tail = decode(self._tokenizer, token_ids[-self._tail :])
        if tail.startswith("\ufffd"):
            # Cut inside a character: some decoders then give up a whole run of bytes.
            tail = decode(self._tokenizer, token_ids)
        if not any(text in tail for text in self._stop):
            return None
        return self.find_in(decode(self._tokenizer, token_ids))

    def find_in(self, text: str) -> int | None:
        """Where the first stop string begins in a text, if one does."""
        found = [place for place in map(text.find, self._stop) if place >= 0]
        return min(found, default=None)

    def held_back(self, text: str) -> int:
        """How many last characters of a text may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class TextStream:
    """The text of a growing sequence, as far as nothing that follows can change it.

    Held back are bytes of a character that is not whole yet, and an end that may be the beginning
    of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: StopStrings | None) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self.tokens = 0  # those whose text is in `_text`
        self._whole = deque([0])  # counts of tokens with whole characters; the first ones are read
        self._text = ""
        self.shown = 0  # characters that `read` has returned

    def read(self, token_ids: Sequence[int]) -> str:
        """The new text of the sequence, which begins as it did in the last call."""
        if len(token_ids) > self.tokens:
            # A few tokens before the new ones too: a decoder treats the very first token apart.
            first = self._whole[0]
            before = decode(self._tokenizer, token_ids[first : self.tokens])
            after = decode(self._tokenizer, token_ids[first:])
            if after.endswith("\ufffd") or len(after) < len(before):
                return ""  # in the middle of a character
            self._text += after[len(before) :]
            self.tokens = len(token_ids)
            self._whole.append(self.tokens)
            while self._whole[1] <= self.tokens - _CONTEXT:
                self._whole.popleft()
        safe = len(self._text)
        if self._stops is not None:
            safe -= self._stops.held_back(self._text)
        text = self._text[self.shown : safe]
        self.shown = max(self.shown, safe)
        return text
