"""Chat family `complete`: so many things were asked for, and the wrong answer gives fewer.

Length says nothing: a fair coin picks the answer that is padded (a preamble, adjectives, tails),
and the padded answer is the longer one whichever it is. So half of the incomplete answers are
longer than the complete ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal, NamedTuple

from rmr1.tasks.family import Family, Item, Split
from rmr1.tasks.topics import TOPICS
from rmr1.tasks.words import CATEGORIES, first_words, upper_first, wording

_PURPOSES = (
    *("for a quiz", "for a poem", "for a game", "for a story", "for a picture", "for a test"),
    *("for my class", "for my sister", "for my friend", "for a song", "for a puzzle", "for a talk"),
)
_THING_REQUESTS = (
    "Name {n} {what} {why}.",
    "Please list {n} {what} {why}.",
    "Give me {n} {what} {why}.",
    "Can you tell me {n} {what} {why}?",
    "I need {n} {what} {why}. Which ones fit?",
    "Write down {n} {what} {why}.",
    "I am looking for {n} {what} {why}.",
)
_THING_REQUESTS_HELDOUT = (
    "Could you think of {n} {what} {why}?",
    "Which {what} would you take {why}? I want {n}.",
)
_TIP_REQUESTS = (
    "Give me {n} tips on {what}.",
    "Tell me {n} useful tips on {what}.",
    "I need {n} tips on {what}, please.",
    "Can you share {n} tips on {what}?",
    "Please write down {n} tips on {what}.",
    "I am new to {what}. Give me {n} tips.",
)
_TIP_REQUESTS_HELDOUT = (
    "What {n} tips do you have on {what}?",
    "Could you help me with {n} tips on {what}?",
)
_PREAMBLES = (
    "Here is my list for you:",
    "Sure, I can help with that:",
    "Thanks for asking, here you go:",
    "This is what I would say:",
)
_TAILS = ("if you can", "every time", "when you like", "whenever possible")
_NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}

# How a list ends: with its last item, with a promise of more, or cut off before the next item.
_End = Literal["last", "more", "cut"]
_WHOLE_ENDS: tuple[_End, ...] = ("last", "last", "more")
_SHORT_ENDS: tuple[_End, ...] = ("last", "last", "more", "cut")


class _Parts(NamedTuple):
    """Items as written, a way to pad item i, and the numbers or commas between them."""

    items: list[str]
    padded: list[str]
    numbered: bool


def _join(items: Sequence[str], numbered: bool, end: _End) -> str:
    """Write out a list, with numbers or with commas."""
    if numbered:
        text = " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
        return text + {"last": "", "more": " and so on", "cut": f" {len(items) + 1}."}[end]
    if end != "last":
        return ", ".join(items) + (" and" if end == "cut" else " and so on.")
    return f"{', '.join(items[:-1])} and {items[-1]}." if len(items) > 1 else f"{items[0]}."


def _things(rng: Random, items: Sequence[str], adjectives: Sequence[str], count: int) -> _Parts:
    drawn = rng.sample(items, count)
    padded = [f"{rng.choice(adjectives)} {item}" for item in drawn]
    return _Parts(drawn, padded, rng.random() < 0.5)


def _tips(rng: Random, tips: Sequence[str], count: int) -> _Parts:
    drawn = rng.sample(tips, count)
    return _Parts(drawn, [f"{tip} {rng.choice(_TAILS)}" for tip in drawn], True)


def _write(parts: _Parts, end: _End, preamble: str, padded_items: int) -> tuple[str, str]:
    """(answer, quote). The quote shows the last item: from its number, or the last six words."""
    items = [*parts.padded[:padded_items], *parts.items[padded_items:]]
    body = _join(items, parts.numbered, end)
    if not preamble:
        body = upper_first(body)
    if parts.numbered:
        quote = first_words(body[body.index(f"{len(items)}. {items[-1]}") :], 6)
    else:
        quote = " ".join(body.split()[-6:])
    return f"{preamble} {body}".strip(), quote


def _draw_complete(rng: Random, split: Split) -> Item:
    if rng.random() < 0.6:
        category = rng.choice(CATEGORIES)
        what, why, count = category.name, rng.choice(_PURPOSES), rng.randint(3, 5)
        given = max(count - rng.choice((1, 1, 2)), 2)
        good = _things(rng, category.items, category.adjectives, count)
        bad = _things(rng, category.items, category.adjectives, given)
        request = wording(rng, split, _THING_REQUESTS, _THING_REQUESTS_HELDOUT)
        unit = what
    else:
        topic = rng.choice(TOPICS)
        what, why, count = topic.name, "", rng.randint(2, 3)
        given = count - 1
        good, bad = _tips(rng, topic.tips, count), _tips(rng, topic.tips, given)
        request = wording(rng, split, _TIP_REQUESTS, _TIP_REQUESTS_HELDOUT)
        unit = "tips"
    preambles = ["", ""]
    padded = rng.randrange(2)  # 0: the complete answer is padded, 1: the incomplete one
    preambles[padded] = rng.choice(_PREAMBLES)
    longer_items = rng.randint(1, given) if why else given
    chosen, chosen_quote = _write(
        good, rng.choice(_WHOLE_ENDS), preambles[0], longer_items if padded == 0 else 0
    )
    rejected, rejected_quote = _write(
        bad, rng.choice(_SHORT_ENDS), preambles[1], longer_items if padded == 1 else 0
    )
    number = rng.choice((str(count), _NUMBER_WORDS[count]))
    return Item(
        params=(what, count),
        question=request.format(n=number, what=what, why=why),
        chosen=chosen,
        rejected=rejected,
        chosen_quote=chosen_quote,
        rejected_quote=rejected_quote,
        chosen_note=f"gives {count} of {count} {unit}, complete",
        rejected_note=f"gives {given} of {count} {unit}, not complete",
        rubric=((f"gives {count} {unit}", 80), ("does not stop early", 20)),
        justify=f"The reader asked for {count} {unit}, so all must be there.",
    )


COMPLETE_FAMILIES: tuple[Family, ...] = (Family("complete", "chat", _draw_complete),)
