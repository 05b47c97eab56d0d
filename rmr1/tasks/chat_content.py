"""Chat families on content: `on_topic`, `grounded` (read a short text) and `address` (a letter).

In each the wrong answer is drawn like the right one, with one fact exchanged: the topic or its
aspect, the value that the text gives, or the name of the reader or the writer.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from rmr1.tasks.family import Family, Item, Split
from rmr1.tasks.topics import ASPECTS, TOPICS, Topic
from rmr1.tasks.words import (
    COLOURS,
    NAMES,
    NUMBERS,
    OBJECTS,
    PEOPLE,
    PLACES,
    first_words,
    wording,
)

# --- on_topic -----------------------------------------------------------------------------------

_TOPIC_REQUESTS = (
    "{q} It is for my {p}.",
    "My {p} wants to know: {q}",
    "I ask for my {p}. {q}",
    "{q} My {p} is new to it.",
    "A question from my {p}: {q}",
    "My {p} likes {topic}. {q}",
    "Please help my {p}. {q}",
)
_TOPIC_REQUESTS_HELDOUT = (
    "Here is what my {p} asked me: {q}",
    "{q} I want to tell my {p}.",
)
# {b} is what the answer is about; {a} is only mentioned, in right and wrong answers alike.
_TOPIC_FRAMES = (
    "For {b}, {tip}.",
    "For {b}, {tip}.",
    "With {b}, {tip}.",
    "My advice on {b}: {tip}.",
    "People who know {b} say: {tip}.",
    "I know little about {a}. For {b}, {tip}.",
)
_TOPIC_OPENERS = ("", "", "", "Good question.", "Sure.", "Let me see.")
# Words a quote must not end with.
_LOOSE = frozenset(("a", "and", "the", "of", "in", "to", "for", "by", "with", "near", "before"))
_TOPIC_CLOSERS = ("", "", "", "It works well.", "Have fun.", "That helps a lot.")


def _without_loose_end(quote: str) -> str:
    """The quote without a last "a", "and", "for" … that points at words beyond it."""
    words = quote.split()
    while words[-1] in _LOOSE:
        words.pop()
    return " ".join(words)


def _topic_answer(rng: Random, topic: Topic, aspect: int, mentioned: str) -> tuple[str, str]:
    """An answer with the tip of one topic and aspect, and the quote that shows what it is about."""
    tip = topic.tips[aspect]
    frame = rng.choice(_TOPIC_FRAMES)
    body = frame.format(a=mentioned, b=topic.name, tip=tip)
    start = body.rindex(f"{topic.name}")
    answer = f"{rng.choice(_TOPIC_OPENERS)} {body} {rng.choice(_TOPIC_CLOSERS)}".strip()
    return answer, _without_loose_end(first_words(body[start:], 6).rstrip("."))


def _draw_on_topic(rng: Random, split: Split) -> Item:
    topic, other_topic = rng.sample(TOPICS, 2)
    aspect, other_aspect = rng.sample(range(len(ASPECTS)), 2)
    person = rng.choice(PEOPLE)
    asked = ASPECTS[aspect]
    name, side = topic.name, asked.name
    question = wording(rng, split, asked.questions, (asked.heldout_question,))
    request = wording(rng, split, _TOPIC_REQUESTS, _TOPIC_REQUESTS_HELDOUT)
    mode = rng.randrange(3)
    if mode == 0:  # another topic, the same aspect
        wrong_topic, wrong_aspect = other_topic, aspect
        missed = f"not {name}"
    elif mode == 1:  # the same topic, another aspect
        wrong_topic, wrong_aspect = topic, other_aspect
        missed = f"not {side}"
    else:
        wrong_topic, wrong_aspect = other_topic, other_aspect
        missed = f"not {name}"
    chosen, chosen_quote = _topic_answer(rng, topic, aspect, other_topic.name)
    # A wrong answer about another topic may mention the asked one, to be no less fluent.
    mentioned = other_topic.name if wrong_topic is topic else name
    rejected, rejected_quote = _topic_answer(rng, wrong_topic, wrong_aspect, mentioned)
    return Item(
        params=(name, side),
        question=request.format(q=question.format(topic=name), p=person, topic=name),
        chosen=chosen,
        rejected=rejected,
        chosen_quote=chosen_quote,
        rejected_quote=rejected_quote,
        chosen_note=f"about {name} and {side}, as asked",
        rejected_note=f"about {wrong_topic.name} and {ASPECTS[wrong_aspect].name}, {missed}",
        rubric=((f"about {name}", 50), (f"about the {side}", 40), ("friendly words", 10)),
        justify=f"The reader asked about {name} and {side}.",
    )


# --- grounded -----------------------------------------------------------------------------------


class _Fact(NamedTuple):
    """One sentence of a text: who has how many of which thing, of what colour, and where."""

    who: str
    number: str
    colour: str
    thing: str
    place: str


_FACT_FRAMES = (
    "{who} has {number} {colour} {thing} in the {place}.",
    "{who} keeps {number} {colour} {thing} in the {place}.",
    "In the {place}, {who} has {number} {colour} {thing}.",
    "{who} left {number} {colour} {thing} in the {place}.",
)
_TEXT_REQUESTS = (
    "{text} {q}",
    "Read this: {text} {q}",
    "Text: {text} Question: {q}",
    "{q} Here is the text: {text}",
    "Here is a short text. {text} {q}",
    "Please read and answer. {text} {q}",
)
_TEXT_REQUESTS_HELDOUT = (
    "Look here: {text} Now tell me: {q}",
    "{q} Find it in this note: {text}",
)
# What can be asked: questions (the last is held out) and answers; [ ] marks the quote.
_ASKED: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "colour": (
        ("What colour {are} the {thing}?", "Tell me the colour of the {thing}."),
        "Can you name the colour of the {thing}?",
        (
            "The [{thing} {are} {v}].",
            "The colour of the [{thing} is {v}].",
            "The text says that the [{thing} {are} {v}].",
            "I would say that the [{thing} {are} {v}].",
        ),
    ),
    "who": (
        ("Who has the {thing}?", "Whose {thing} {are} in the text?"),
        "Can you name the owner of the {thing}?",
        (
            "The {thing} [belong{s} to {v}].",
            "That [would be {v}].",
            "The text says that the {thing} [belong{s} to {v}].",
            "The owner of the [{thing} is {v}].",
        ),
    ),
    "place": (
        ("Where {are} the {thing}?", "In which place {are} the {thing}?"),
        "Can you say where the {thing} {are}?",
        (
            "The {thing} [{are} in the {v}].",
            "You find the {thing} [in the {v}].",
            "The text says that the {thing} [{are} in the {v}].",
            "Look for the {thing} [in the {v}].",
        ),
    ),
    "count": (
        ("How many {thing} does {who} have?", "How many {thing} are in the text?"),
        "Can you count the {thing} in the text?",
        (
            "There [are {v} {thing}].",
            "The text speaks [of {v} {thing}].",
            "I can count [{v} {thing}] here.",
            "It says that there [are {v} {thing}].",
        ),
    ),
}


def _draw_facts(rng: Random) -> tuple[tuple[_Fact, _Fact], bool]:
    """Two facts that differ in every part, and whether they are about several things each."""
    many = rng.random() < 0.5
    who, colour = rng.sample(NAMES, 2), rng.sample(COLOURS, 2)
    thing, place = rng.sample(OBJECTS, 2), rng.sample(PLACES, 2)
    number = rng.sample(NUMBERS, 2) if many else ["a", "a"]
    first, second = (
        _Fact(who[i], number[i], colour[i], thing[i][1 if many else 0], place[i]) for i in (0, 1)
    )
    return (first, second), many


def _value(fact: _Fact, asked: str) -> str:
    return {"colour": fact.colour, "who": fact.who, "place": fact.place, "count": fact.number}[
        asked
    ]


def _text_answer(rng: Random, frames: tuple[str, ...], parts: dict[str, str]) -> tuple[str, str]:
    marked = rng.choice(frames).format_map(parts)
    quote = marked[marked.index("[") + 1 : marked.index("]")]
    return marked.replace("[", "").replace("]", ""), quote


def _draw_grounded(rng: Random, split: Split) -> Item:
    (fact, other), many = _draw_facts(rng)
    asked = rng.choice(("colour", "who", "place", "count") if many else ("colour", "who", "place"))
    true = _value(fact, asked)
    wrong = _value(other, asked)
    if rng.random() < 0.4:  # a value that the text does not give
        bank = {"colour": COLOURS, "who": NAMES, "place": PLACES, "count": NUMBERS}[asked]
        wrong = rng.choice([value for value in bank if value not in (true, wrong)])
    questions, heldout_question, frames = _ASKED[asked]
    parts = {
        "thing": fact.thing,
        "who": fact.who,
        "are": "are" if many else "is",
        "s": "" if many else "s",
    }
    sentences = [rng.choice(_FACT_FRAMES).format(**f._asdict()) for f in (fact, other)]
    rng.shuffle(sentences)
    question = wording(rng, split, questions, (heldout_question,)).format_map(parts)
    request = wording(rng, split, _TEXT_REQUESTS, _TEXT_REQUESTS_HELDOUT)
    chosen, chosen_quote = _text_answer(rng, frames, {**parts, "v": true})
    rejected, rejected_quote = _text_answer(rng, frames, {**parts, "v": wrong})
    return Item(
        params=(asked, fact, other),
        question=request.format(text=" ".join(sentences), q=question),
        chosen=chosen,
        rejected=rejected,
        chosen_quote=chosen_quote,
        rejected_quote=rejected_quote,
        chosen_note=f"says {true}, as in the text",
        rejected_note=f"says {wrong}, not {true} as in the text",
        rubric=(("agrees with the text", 80), ("answers the question", 20)),
        justify="The answer must come from the text.",
    )


# --- address ------------------------------------------------------------------------------------

_GREETINGS = ("Dear {r}", "Hello {r}", "Hi {r}")
_CLOSINGS = ("Yours, {s}", "Best wishes, {s}", "Love, {s}", "From {s}")
# (what the note is for, what the note says)
_PURPOSES = (
    ("to say thanks for the {x}", ("thank you for the {x}.", "many thanks for the lovely {x}.")),
    ("to ask for the {x}", ("may I have the {x} back?", "could you bring me the {x}?")),
    ("to say sorry about the {x}", ("I am sorry about the {x}.", "I feel bad about the {x}.")),
    ("with news about the {x}", ("the {x} is here now.", "we have found the {x}.")),
)
_EXTRAS = ("", "", "I hope you are well.", "See you soon.")
_LETTER_REQUESTS = (
    "Write a short note from {s} to {r} {p}.",
    "{s} wants to write to {r} {p}. Write the note.",
    "Please write to {r} for {s} {p}.",
    "I am {s}. Help me write to {r} {p}.",
    "My name is {s}. Write a note to {r} {p}.",
    "Write to {r} {p}. It is from {s}.",
    "{r} should get a note from {s} {p}.",
)
_LETTER_REQUESTS_HELDOUT = (
    "Can you draft a message to {r} {p}? The sender is {s}.",
    "{s} needs a message for {r} {p}.",
)


def _letter(rng: Random, reader: str, writer: str, says: tuple[str, ...], x: str) -> list[str]:
    """A letter in three parts: greeting with comma, body, closing with the writer's name."""
    body = f"{rng.choice(says).format(x=x)} {rng.choice(_EXTRAS)}".strip()
    greeting = rng.choice(_GREETINGS).format(r=reader)
    return [f"{greeting},", body, rng.choice(_CLOSINGS).format(s=writer)]


def _draw_address(rng: Random, split: Split) -> Item:
    reader, writer, third = rng.sample(NAMES, 3)
    purpose, says = rng.choice(_PURPOSES)
    x = rng.choice(OBJECTS)[0]
    mode = rng.randrange(4)
    # Whom the wrong letter greets and who signs it, and which of the two shows the fault.
    wrong_reader, wrong_writer, part = (
        (third, writer, 0),
        (writer, reader, 0),
        (reader, third, 2),
        (writer, writer, 0),
    )[mode]
    missed = f"not to {reader}" if part == 0 else f"not from {writer}"
    good = _letter(rng, reader, writer, says, x)
    bad = _letter(rng, wrong_reader, wrong_writer, says, x)
    request = wording(rng, split, _LETTER_REQUESTS, _LETTER_REQUESTS_HELDOUT)
    return Item(
        params=(reader, writer),
        question=request.format(r=reader, s=writer, p=purpose.format(x=x)),
        chosen=" ".join(good),
        rejected=" ".join(bad),
        chosen_quote=good[part],
        rejected_quote=bad[part],
        chosen_note=f"to {reader} from {writer}, as asked",
        rejected_note=f"to {wrong_reader} from {wrong_writer}, {missed}",
        rubric=((f"to {reader} from {writer}", 70), (f"speaks about the {x}", 30)),
        justify="The names in the request must be kept.",
    )


CONTENT_FAMILIES: tuple[Family, ...] = (
    Family("on_topic", "chat", _draw_on_topic),
    Family("grounded", "chat", _draw_grounded),
    Family("address", "chat", _draw_address),
)
