"""From tokens to text: decoding, and stop strings that may lie across token borders."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

# Tokens of context decoded before the shortest tail that can hold a stop string: decoders treat the
# very first token apart (a leading space is dropped), and special tokens add no text.
_CONTEXT = 8

# Where a character is not whole, decoders put this.
_BROKEN = "\ufffd"

# Tokens decoded in one call while the texts of a vocabulary are made.
_AT_ONCE = 64


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of the tokens without special ones; added tokens that are not special stay."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class TokenTexts:
    """What each token of a vocabulary adds to a text that has begun.

    That is not what the token decodes to alone: decoders drop spaces at the beginning of a text,
    some put them between tokens. A token is `unsure` where no text can be told. If texts do not
    `join`, since what a token adds depends on its neighbours, they are those of tokens alone.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        count = min(vocabulary, len(tokenizer))
        alone = [decode(tokenizer, [token]) for token in range(count)]
        anchor = _anchor(tokenizer, alone)
        after = None if anchor is None else _texts_after(tokenizer, anchor, count)
        self.join = after is not None
        texts = list[str | None](alone) if after is None else after
        self.unsure = np.ones(vocabulary, dtype=bool)  # [V], also what the tokenizer does not know
        # At the beginning of a text the start of its first token may be lacking, nothing else.
        self.unsure[:count] = [
            text is None or not text.endswith(first) or (not text and _quiet(tokenizer, token))
            for token, (text, first) in enumerate(zip(texts, alone, strict=True))
        ]
        self._texts = [text or "" for text in texts]
        self.longest = max(map(len, self._texts), default=0)
        self._joined = "\0".join(self._texts)
        self._begins = np.cumsum([0, *(len(text) + 1 for text in self._texts[:-1])])
        self._from_start = _Sorted(self._texts)
        self._from_end = _Sorted([text[::-1] for text in self._texts])

    def holding(self, part: str) -> np.ndarray:
        """The tokens whose text holds `part`."""
        places, place = [], self._joined.find(part)
        while place >= 0:
            places.append(place)
            place = self._joined.find(part, place + 1)
        return np.searchsorted(self._begins, places, side="right") - 1

    def starting(self, head: str) -> np.ndarray:
        """The tokens whose text begins with `head`."""
        return self._from_start.starting(head)

    def ending(self, end: str) -> np.ndarray:
        """The tokens whose text ends with `end`."""
        return self._from_end.starting(end[::-1])

    def equal(self, text: str) -> np.ndarray:
        """The tokens with this text."""
        return self._from_start.equal(text)


class _Sorted:
    """Texts in order, so that those with a given beginning lie side by side."""

    def __init__(self, texts: list[str]) -> None:
        order = sorted(range(len(texts)), key=texts.__getitem__)
        self._texts = [texts[place] for place in order]
        self._order = np.array(order, dtype=np.int64)

    def starting(self, head: str) -> np.ndarray:
        first = bisect_left(self._texts, head)
        last = bisect_right(self._texts, head, lo=first, key=lambda text: text[: len(head)])
        return self._order[first:last]

    def equal(self, text: str) -> np.ndarray:
        return self._order[bisect_left(self._texts, text) : bisect_right(self._texts, text)]


def _anchor(tokenizer: Any, alone: list[str]) -> int | None:
    """A token of plain letters: a text has begun after it, and copies of it are easily told apart.

    As long as possible, so that few others contain it. Of single letters the last: in vocabularies
    with tokens for bytes these come first, and a byte changes what bytes beside it decode to.
    """
    plain = [token for token, text in enumerate(alone) if text.isascii() and text.isalpha()]
    for token in sorted(reversed(plain), key=lambda token: -len(alone[token])):
        text = decode(tokenizer, [token, token])[len(alone[token]) :]
        # If it cannot overlap itself, it is found nowhere but where it stands.
        if text and not any(text.endswith(text[:size]) for size in range(1, len(text))):
            return token
    return None


def _texts_after(tokenizer: Any, anchor: int, count: int) -> list[str | None] | None:
    """What tokens add after the anchor, many at once between copies of it.

    An entry is None if that is unknown; there is no list if it is another thing elsewhere.
    """
    name = decode(tokenizer, [anchor])
    again = decode(tokenizer, [anchor, anchor])[len(name) :]
    found: list[str | None] = []
    for first in range(0, count, _AT_ONCE):
        tokens = range(first, min(first + _AT_ONCE, count))
        text = decode(tokenizer, [one for token in tokens for one in (anchor, token)])
        parts = text[len(name) :].split(again)
        if text.startswith(name) and len(parts) == len(tokens):
            found += parts
            continue
        for token in tokens:
            text = decode(tokenizer, [anchor, token])
            found.append(text[len(name) :] if text.startswith(name) else None)
    # Every token with whole characters among others; those that end in white space also at the end
    # of a text, where some decoders drop it.
    whole = {
        token: text for token, text in enumerate(found) if text is not None and _BROKEN not in text
    }
    mixed = Random(0).sample(list(whole), len(whole))
    runs = [[*mixed[place : place + _AT_ONCE], anchor] for place in range(0, len(mixed), _AT_ONCE)]
    runs += [[token] for token, text in whole.items() if text[-1:].isspace()]
    for run in runs:
        joined = name + "".join(whole[token] for token in run)
        if decode(tokenizer, [anchor, *run]) != joined:
            return None
    return found


def _quiet(tokenizer: Any, token: int) -> bool:
    """Whether a token without text is not just special: half a character that is not shown?"""
    return not tokenizer.decode([token], skip_special_tokens=False)


class StopStrings:
    """Finds the first stop string of a growing sequence, at little cost per token.

    A stop string can only become complete with a token that holds the rest of it, so tables over
    the vocabulary, looked up for the whole batch at once, leave few sequences to decode, and of
    those only the tail is decoded.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...],
        vocabulary: int,
        texts: TokenTexts | None = None,  # of this vocabulary, if they are known already
    ) -> None:
        assert stop
        self._tokenizer = tokenizer
        self._stop = stop
        # A token has at least one byte, so this many tokens hold the longest stop string.
        self._tail = max(len(text.encode()) for text in stop) + _CONTEXT
        self._mark(TokenTexts(tokenizer, vocabulary) if texts is None else texts)

    def _mark(self, texts: TokenTexts) -> None:
        """Make the tables, [V] bool.

        `may_end`: tokens that hold the last character of a stop string. A space is in half of all
        tokens, so those that bring no more of the stop string are `only_after`: they count only
        after a token of `before`, which ends with the rest of it, or is a part of that.
        """
        sure, before = self._sure(texts) if texts.join else self._suspected(texts)
        self.may_end = sure.copy()
        for last in {one[-1] for one in self._stop}:
            self.may_end[texts.holding(last)] = True
        self.only_after, self.before = self.may_end & ~sure, before

    def _sure(self, texts: TokenTexts) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that may end a stop string whatever was before them, and `before`."""
        most = texts.longest
        sure, before = texts.unsure.copy(), texts.unsure.copy()
        before[texts.equal("")] = True  # special tokens: what matters stands before them
        for one in self._stop:
            sure[texts.holding(one)] = True
            for size in range(2, min(len(one), most + 1)):
                sure[texts.starting(one[-size:])] = True
            if rest := one[:-1]:
                before[texts.ending(rest)] = True
                for size in range(1, min(len(rest), most + 1)):
                    before[texts.equal(rest[-size:])] = True
            if not one.isascii():  # a token may begin with the rest of a character
                sure[texts.starting(_BROKEN)] = before[texts.starting(_BROKEN)] = True
            if _BROKEN in one:
                sure[:] = True  # a token that has none of it may break a character before it
        return sure, before

    def _suspected(self, texts: TokenTexts) -> tuple[np.ndarray, np.ndarray]:
        """The same if texts do not join: all characters but spaces are in their tokens still."""
        sure = texts.unsure.copy()
        sure[texts.holding(_BROKEN)] = True
        for one in self._stop:
            sure[slice(None) if one[-1].isspace() else texts.holding(one[-1])] = True
        return sure, sure

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Where in `decode(tokenizer, token_ids)` the first stop string begins, if one does."""
        tail = decode(self._tokenizer, token_ids[-self._tail :])
        if tail.startswith(_BROKEN):
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
            if after.endswith(_BROKEN) or len(after) < len(before):
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
