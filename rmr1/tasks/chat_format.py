"""Chat family `exact_format`: an instruction whose format a program can check.

Nine kinds of constraint: a number of words, capitals, small letters, first word, last word, quotes,
a list with commas, bullet points, numbered lines. The wrong answer is fine in every other way: it
is drawn from the same sentences and breaks the asked format only.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from rmr1.tasks.family import Family, Item, Split
from rmr1.tasks.words import (
    CATEGORIES,
    SUBJECTS,
    Subject,
    first_words,
    upper_first,
    wording,
)


class _Answers(NamedTuple):
    """The two answers of an item with the evidence for each: (text, quote, note).

    Where the answer has to be counted, the quote is the whole of it: nine words or seven lines at
    most.
    """

    chosen: tuple[str, str, str]
    rejected: tuple[str, str, str]


# Words that read well both at the start and at the end of a sentence.
_EDGE_WORDS = (
    *("today", "tonight", "sometimes", "now", "again", "here", "outside", "often"),
    *("usually", "somehow", "quietly", "slowly", "indeed", "luckily"),
)
# Tails that fit any sentence of the bank, with one, two and three words.
_TAILS = ("", "again", "once more", "in my dream", "in my story")

_SENTENCE_REQUESTS = (
    "Write one sentence about the {s}. {C}.",
    "Tell me something about the {s}. {C}, please.",
    "Say something about the {s} and {c}.",
    "Please describe the {s}. {C}.",
    "I need a line about the {s}. {C}.",
    "{C}. The topic is the {s}.",
    "What can you say about the {s}? {C}.",
)
_SENTENCE_REQUESTS_HELDOUT = (
    "{C} and tell me about the {s}.",
    "Give me a line on the {s}, but {c}.",
)
_LIST_REQUESTS = (
    "Name some {s}. {C}.",
    "Please list some {s}. {C}.",
    "Which {s} do you know? {C}.",
    "Tell me a few {s} and {c}.",
    "I need a list of {s}. {C}, please.",
    "{C}. The list is about {s}.",
)
_LIST_REQUESTS_HELDOUT = (
    "{C} and name some {s}.",
    "Write down a few {s}, but {c}.",
)


def _compositions(subject: Subject) -> dict[int, list[str]]:
    """Every sentence about a subject, by its number of words (3 to 9)."""
    one, two = subject.adjectives
    found: dict[int, list[str]] = {}
    for adjectives in ("", one, two, f"{one} {two}"):
        for predicate in subject.predicates:
            for tail in _TAILS:
                words = f"The {adjectives} {subject.noun} {predicate} {tail}".split()
                found.setdefault(len(words), []).append(" ".join(words))
    return found


def _sentence(rng: Random, subject: Subject) -> str:
    """A sentence without tail and without full stop: 3 to 7 words."""
    one, two = subject.adjectives
    adjectives = rng.choice(("", one, two, f"{one} {two}"))
    return " ".join(f"The {adjectives} {subject.noun} {rng.choice(subject.predicates)}".split())


def _other_count(rng: Random, count: int, least: int) -> int:
    """A count that misses `count` by one or two, above as often as below."""
    step = rng.choice((1, 1, 2))
    return max(count - step, least) if rng.random() < 0.5 else count + step


def _word_count(rng: Random, subject: Subject, count: int) -> _Answers:
    by_length = _compositions(subject)
    other = _other_count(rng, count, least=3)
    chosen, rejected = (rng.choice(by_length[n]) + "." for n in (count, other))
    return _Answers(
        (chosen, chosen, f"has {count} words, as asked"),
        (rejected, rejected, f"has {other} words, not {count}"),
    )


def _capitals(rng: Random, subject: Subject) -> _Answers:
    chosen = _sentence(rng, subject).upper() + "."
    words = _sentence(rng, subject).split()
    start = 0
    if rng.random() < 0.5:  # all capitals but one word
        start = rng.randrange(len(words) - 1)
        words = [word.upper() for word in words]
        words[start + 1] = words[start + 1].lower()
    rejected = " ".join(words) + "."
    return _Answers(
        (chosen, first_words(chosen, 3), "all in capitals, as asked"),
        (rejected, " ".join(words[start : start + 2]), "not all in capitals"),
    )


def _small_letters(rng: Random, subject: Subject) -> _Answers:
    chosen = _sentence(rng, subject).lower() + "."
    rejected = _sentence(rng, subject) + "."
    if rng.random() < 0.4:
        rejected = rejected.upper()
    return _Answers(
        (chosen, first_words(chosen, 3), "all in small letters, as asked"),
        (rejected, first_words(rejected, 3), "not all in small letters"),
    )


def _with_edge(sentence: str, word: str, at_start: bool) -> str:
    """The sentence with an adverb put in front of it or behind it, and a full stop."""
    if at_start:
        return f"{upper_first(word)} {sentence[:1].lower()}{sentence[1:]}."
    return f"{sentence} {word}."


def _edge_word(rng: Random, subject: Subject, word: str, at_start: bool) -> _Answers:
    """The asked word first (or last); it fails with another word there or at the other end."""
    chosen = _with_edge(_sentence(rng, subject), word, at_start)
    base = _sentence(rng, subject)
    if rng.random() < 0.5:
        rejected = _with_edge(base, word, not at_start)
    else:
        other = rng.choice([w for w in _EDGE_WORDS if w != word])
        rejected = _with_edge(base, other, at_start)
    verb = "starts" if at_start else "ends"
    words = rejected.rstrip(".").lower().split()
    seen = words[0] if at_start else words[-1]

    def quote(text: str) -> str:
        return first_words(text, 3) if at_start else " ".join(text.split()[-3:])

    return _Answers(
        (chosen, quote(chosen), f"{verb} with {word}, as asked"),
        (rejected, quote(rejected), f"{verb} with {seen}, not {word}"),
    )


def _in_quotes(rng: Random, subject: Subject) -> _Answers:
    chosen = f'"{_sentence(rng, subject)}."'
    plain = _sentence(rng, subject)
    mode = rng.randrange(3)
    if mode == 0:
        rejected, quote = f"{plain}.", first_words(plain, 3)
    elif mode == 1:
        rejected, quote = f'"{plain}.', first_words(f'"{plain}', 3)
    else:  # only the noun is quoted
        rejected = plain.replace(subject.noun, f'"{subject.noun}"') + "."
        quote = first_words(rejected[: rejected.rindex('"') + 1], 4)
    return _Answers(
        (chosen, first_words(chosen, 6), "all in quotes, as asked"),
        (rejected, quote, "not all in quotes"),
    )


def _with_commas(rng: Random, items: tuple[str, ...], count: int) -> _Answers:
    chosen = ", ".join(rng.sample(items, count))
    good = f"has {count} items with commas, as asked"
    if rng.random() < 0.6:
        other = _other_count(rng, count, least=2)
        rejected = ", ".join(rng.sample(items, other))
        note = f"has {other} items, not {count}"
    else:
        rejected = rng.choice((" and ", " ", " - ")).join(rng.sample(items, count))
        note = "has no commas, not as asked"
    return _Answers((chosen, chosen, good), (rejected, rejected, note))


def _lines(rng: Random, items: tuple[str, ...], count: int, numbered: bool) -> _Answers:
    """A list on lines, numbered or with bullets; it fails by its count, its signs or its lines."""

    def lines(count: int, numbered: bool) -> str:
        drawn = enumerate(rng.sample(items, count), start=1)
        return "\n".join(f"{n}. {item}" if numbered else f"- {item}" for n, item in drawn)

    chosen = lines(count, numbered)
    other = 0
    mode = rng.random()
    if mode < 0.6:
        other = _other_count(rng, count, least=2)
        rejected = lines(other, numbered)
    elif mode < 0.9:
        rejected = lines(count, not numbered)
    else:
        rejected = ", ".join(rng.sample(items, count))
    what = "numbered lines" if numbered else "bullets"
    return _Answers(
        (chosen, chosen, f"has {count} {what}, as asked"),
        (rejected, rejected, f"has {other} {what}, not {count}"),
    )


_SubjectKind = tuple[str, str, tuple[str, ...], Callable[[Random, Subject], _Answers]]
# (kind, criterion, ways to ask for it, how to draw the answers)
_SUBJECT_KINDS: tuple[_SubjectKind, ...] = (
    (
        "capitals",
        "all in capitals",
        ("use only capital letters", "write all words in capitals", "put every word in capitals"),
        _capitals,
    ),
    (
        "small",
        "all in small letters",
        ("use only small letters", "write all words in small letters", "use no capital letters"),
        _small_letters,
    ),
    (
        "quotes",
        "all in quotes",
        ("put the whole answer in quotes", "use quotes around the answer"),
        _in_quotes,
    ),
)


def _draw_sentence(rng: Random) -> tuple[tuple[object, ...], str, str, str, _Answers]:
    """Draw (params, what it is about, clause, criterion, answers) of a one-sentence request."""
    subject = rng.choice(SUBJECTS)
    roll = rng.random()
    if roll < 0.3:
        count = rng.randint(4, 6)
        clause = rng.choice(("use exactly {} words", "write just {} words", "use {} words"))
        answers = _word_count(rng, subject, count)
        params: tuple[object, ...] = ("words", count, subject.noun)
        return params, subject.noun, clause.format(count), f"exactly {count} words", answers
    clauses: tuple[str, ...]
    if roll < 0.65:
        at_start = rng.random() < 0.5
        word = rng.choice(_EDGE_WORDS)
        if at_start:
            clauses = ("start with the word {}", "make {} the first word", "begin with {}")
        else:
            clauses = ("end with the word {}", "make {} the last word", "let it end with {}")
        verb = "starts" if at_start else "ends"
        answers = _edge_word(rng, subject, word, at_start)
        params = (verb, word, subject.noun)
        clause = rng.choice(clauses).format(word)
        return params, subject.noun, clause, f"{verb} with {word}", answers
    kind, criterion, clauses, make = rng.choice(_SUBJECT_KINDS)
    return (kind, subject.noun), subject.noun, rng.choice(clauses), criterion, make(rng, subject)


def _draw_list(rng: Random) -> tuple[tuple[object, ...], str, str, str, _Answers]:
    """Draw (params, what it is about, clause, criterion, answers) of a list request."""
    category = rng.choice(CATEGORIES)
    count = rng.randint(3, 5)
    roll = rng.random()
    if roll < 0.4:
        clauses = ("use {} items with commas", "put commas between {} items")
        answers = _with_commas(rng, category.items, count)
        kind, criterion = "commas", f"{count} items with commas"
    elif roll < 0.7:
        clauses = ("use {} bullet points", "give {} lines with bullet points")
        answers = _lines(rng, category.items, count, numbered=False)
        kind, criterion = "bullets", f"{count} bullet points"
    else:
        clauses = ("use {} numbered lines", "give {} lines with numbers")
        answers = _lines(rng, category.items, count, numbered=True)
        kind, criterion = "numbered", f"{count} numbered lines"
    clause = rng.choice(clauses).format(count)
    return (kind, count, category.name), category.name, clause, criterion, answers


def _draw_exact_format(rng: Random, split: Split) -> Item:
    if rng.random() < 0.7:
        params, about, clause, criterion, answers = _draw_sentence(rng)
        request = wording(rng, split, _SENTENCE_REQUESTS, _SENTENCE_REQUESTS_HELDOUT)
        about_criterion = f"about the {about}"
    else:
        params, about, clause, criterion, answers = _draw_list(rng)
        request = wording(rng, split, _LIST_REQUESTS, _LIST_REQUESTS_HELDOUT)
        about_criterion = f"names {about}"
    chosen, rejected = answers
    return Item(
        params=params,
        question=request.format(s=about, c=clause, C=upper_first(clause)),
        chosen=chosen[0],
        rejected=rejected[0],
        chosen_quote=chosen[1],
        rejected_quote=rejected[1],
        chosen_note=chosen[2],
        rejected_note=rejected[2],
        rubric=((criterion, 70), (about_criterion, 30)),
        justify="The request names a format that can be checked.",
    )


FORMAT_FAMILIES: tuple[Family, ...] = (Family("exact_format", "chat", _draw_exact_format),)
