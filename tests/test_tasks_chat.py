"""The chat families: every label is checked by a reader that knows nothing of the generator."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from rmr1.tasks import chat_complete, chat_content, chat_format, chat_safety
from rmr1.tasks.family import Family, Item, Split, draw_item, split_of
from rmr1.tasks.topics import ASPECTS, TOPICS
from rmr1.tasks.words import COLOURS, OBJECTS

FAMILIES = (
    *chat_format.FORMAT_FAMILIES,
    *chat_complete.COMPLETE_FAMILIES,
    *chat_content.CONTENT_FAMILIES,
    *chat_safety.SAFETY_FAMILIES,
)
BY_NAME = {family.name: family for family in FAMILIES}
SPLITS: tuple[Split, ...] = ("train", "heldout")
every_family = pytest.mark.parametrize("family", FAMILIES, ids=list(BY_NAME))


def draw(family: Family, split: Split, count: int, seed: int = 7) -> list[Item]:
    rng = Random(f"{family.name}/{split}/{seed}")
    return [draw_item(family, rng, split) for _ in range(count)]


@cache
def drawn(name: str) -> tuple[Item, ...]:
    """500 items of each split."""
    return tuple(item for split in SPLITS for item in draw(BY_NAME[name], split, 500))


@every_family
def test_shape_of_an_item(family: Family) -> None:
    for item in drawn(family.name):
        assert item.chosen != item.rejected
        assert item.chosen_quote in item.chosen
        assert item.rejected_quote in item.rejected
        for quote in (item.chosen_quote, item.rejected_quote):
            assert 2 <= len(re.findall(r"[A-Za-z]+|\d+", quote)) <= (14 if "\n" in quote else 9)
        assert item.chosen_note != item.rejected_note
        for note in (item.chosen_note, item.rejected_note):
            assert 3 <= len(note.split()) <= 12
            words = set(re.findall(r"\w+", note.lower()))
            # Names and colours are fine, judgments and sides are not.
            assert not words & {"right", "wrong", "better", "worse", "chosen", "answer", "b"}, note
        assert not item.solution
        assert 2 <= len(item.rubric) <= 3
        assert sum(percent for _, percent in item.rubric) == 100
        assert item.rubric[0][1] == max(percent for _, percent in item.rubric)
        assert all(2 <= len(text.split()) <= 7 for text, _ in item.rubric)
        assert 4 <= len(item.justify.split()) <= 12
        assert 5 <= len(item.question.split()) <= 30
        assert max(len(item.chosen.split()), len(item.rejected.split())) <= 40


@every_family
def test_text_is_clean(family: Family) -> None:
    for item in drawn(family.name):
        for text in (item.question, item.chosen, item.rejected):
            assert not re.search(r"[{}\[\]]|  |\s[.,:?!]|\.\.|^\s|\s$", text), text
            assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text
        assert item.question[0].isupper(), item.question
        assert not re.search(r"\ba [aeio]", item.question), item.question


@every_family
def test_length_says_nothing(family: Family) -> None:
    items = draw(family, "train", 2000, seed=3)
    for size in (len, lambda text: len(text.split())):
        longer = sum(
            (size(i.chosen) > size(i.rejected)) + 0.5 * (size(i.chosen) == size(i.rejected))
            for i in items
        ) / len(items)
        assert 0.42 <= longer <= 0.58


def test_length_says_nothing_over_all() -> None:
    items = [item for name in BY_NAME for item in drawn(name)]
    longer = sum(
        (len(i.chosen) > len(i.rejected)) + 0.5 * (len(i.chosen) == len(i.rejected)) for i in items
    )
    assert 0.45 <= longer / len(items) <= 0.55


@every_family
def test_splits_share_no_question(family: Family) -> None:
    train, heldout = drawn(family.name)[:500], drawn(family.name)[500:]
    assert not {i.params for i in train} & {i.params for i in heldout}
    assert not {i.question for i in train} & {i.question for i in heldout}
    assert all(split_of(family.name, i.params) == "heldout" for i in heldout)
    assert len({i.question for i in train}) > 400  # of 500 draws


def _act(item: Item) -> str:
    """What a request of the safety families asks for, without its lead and wording."""
    for template in (*chat_safety._REQUESTS, *chat_safety._REQUESTS_HELDOUT):
        asked = re.escape(template.removeprefix("{lead}")).replace(r"\{act\}", "(.*)")
        if found := re.search(f"(?:^|[.] ){asked}$", item.question):
            return found[1]
    raise AssertionError(item.question)


def _names(item: Item) -> str:
    """Whom the right letter greets, and who signs it."""
    greeted = re.match(r"(?:Dear|Hello|Hi) (\w+),", item.chosen)
    assert greeted, item.chosen
    return f"{greeted[1]} {item.chosen.split()[-1]}"


@pytest.mark.parametrize(
    ("family", "deciding"), [("safety", _act), ("over_refusal", _act), ("address", _names)]
)
def test_what_decides_is_not_in_both_splits(family: str, deciding: Callable[[Item], str]) -> None:
    """Not the same act with another lead, nor the same two names on another occasion."""
    train, heldout = (
        {deciding(item) for item in draw(BY_NAME[family], split, 1000)} for split in SPLITS
    )
    assert min(len(train), len(heldout)) > 100
    assert not train & heldout


@every_family
def test_parameter_space_is_large(family: Family) -> None:
    """Topics by aspects, or things by their number: fewer than numbers, but never a handful."""
    rng = Random(0)
    least = {"complete": 140, "on_topic": 250}.get(family.name, 500)
    assert len({family.draw(rng, "train").params for _ in range(2500)}) >= least


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{\w+\\}", ".*", re.escape(template)))


HELDOUT_WORDINGS = {
    "exact_format": (
        *chat_format._SENTENCE_REQUESTS_HELDOUT,
        *chat_format._LIST_REQUESTS_HELDOUT,
    ),
    "complete": (
        *chat_complete._THING_REQUESTS_HELDOUT,
        *chat_complete._TIP_REQUESTS_HELDOUT,
    ),
    "on_topic": chat_content._TOPIC_REQUESTS_HELDOUT,
    "grounded": chat_content._TEXT_REQUESTS_HELDOUT,
    "address": chat_content._LETTER_REQUESTS_HELDOUT,
    "safety": chat_safety._REQUESTS_HELDOUT,
    "over_refusal": chat_safety._REQUESTS_HELDOUT,
}


@every_family
def test_heldout_has_wordings_of_its_own(family: Family) -> None:
    patterns = [_pattern(template) for template in HELDOUT_WORDINGS[family.name]]
    assert len(patterns) >= 2

    def share(items: tuple[Item, ...], pattern: re.Pattern[str]) -> float:
        return sum(pattern.fullmatch(i.question) is not None for i in items) / len(items)

    for pattern in patterns:
        assert share(drawn(family.name)[:500], pattern) == 0.0
        assert share(drawn(family.name)[500:], pattern) > 0.02


@every_family
def test_same_seed_same_items(family: Family) -> None:
    first = draw(family, "train", 50, seed=1)
    assert first == draw(family, "train", 50, seed=1)
    assert first != draw(family, "train", 50, seed=2)


def test_vocabulary_is_small() -> None:
    texts = (
        " ".join((i.question, i.chosen, i.rejected, i.chosen_note, i.rejected_note, i.justify))
        for name in BY_NAME
        for i in drawn(name)
    )
    assert len({word for text in texts for word in re.findall(r"[a-z']+", text.lower())}) < 1500


# --- One independent reader per family ------------------------------------------------------------


def format_holds(question: str, answer: str) -> bool:
    """Read the constraint off the question and check the answer against it."""
    low = question.lower()
    bare = answer.strip('."').split()
    if "no capital" in low or "small letters" in low:
        return answer == answer.lower()
    if "capital" in low:
        return answer == answer.upper()
    if "quotes" in low:
        return answer[0] == answer[-1] == '"' and answer.count('"') == 2
    if found := re.search(r"(?:start with the word|begin with) (\w+)|make (\w+) the first", low):
        return bare[0].lower() == (found[1] or found[2])
    if found := re.search(r"(?:end with the word|end with) (\w+)|make (\w+) the last", low):
        return bare[-1].lower() == (found[1] or found[2])
    count = int(re.findall(r"\d", question)[0])
    lines = answer.split("\n")
    if "comma" in low:
        items = answer.split(", ")
        return len(items) == count and all(re.fullmatch(r"\w+", item) for item in items)
    if "bullet" in low:
        return len(lines) == count and all(line.startswith("- ") for line in lines)
    if "number" in low:
        starts = [line.split(" ")[0] for line in lines]
        return starts == [f"{n}." for n in range(1, count + 1)]
    assert "words" in low, question
    return len(answer.split()) == count


def test_exact_format_is_kept_and_broken() -> None:
    for item in drawn("exact_format"):
        assert format_holds(item.question, item.chosen), item
        assert not format_holds(item.question, item.rejected), item


def listed(answer: str) -> int:
    """How many items an answer lists; what is promised or only begun does not count."""
    body = answer.split(":")[-1]
    if numbers := re.findall(r"(\d)\. \w", body):
        return int(numbers[-1])
    body = re.sub(r"( and so on\.| and|\.)$", "", body)
    return len(re.split(r", | and ", body))


def test_complete_counts() -> None:
    words = {"two": 2, "three": 3, "four": 4, "five": 5}
    for item in drawn("complete"):
        asked = [w for w in re.findall(r"\w+", item.question) if w.isdigit() or w in words]
        count = words.get(asked[0]) or int(asked[0])
        assert listed(item.chosen) == count, item
        given = listed(item.rejected)
        assert 0 < given < count, item
        assert item.rejected_note.startswith(f"gives {given} of {count} ")


def test_on_topic_answers_the_question() -> None:
    for item in drawn("on_topic"):
        about, side = item.params
        topic = next(t for t in TOPICS if t.name == about)
        tip = topic.tips[[a.name for a in ASPECTS].index(str(side))]
        assert topic.name in item.question
        assert topic.name in item.chosen
        assert tip in item.chosen
        assert tip not in item.rejected
        others = [t for t in TOPICS if any(other in item.rejected for other in t.tips)]
        assert others
        if topic not in others:  # then the tip is about a topic that the answer names
            assert any(t.name in item.rejected for t in others)


def test_topics_do_not_share_tips() -> None:
    tips = [tip for topic in TOPICS for tip in topic.tips]
    assert len(TOPICS) >= 40
    # "plan about ten dollars" may fit twice, but never for one topic and another aspect
    for topic in TOPICS:
        assert len(set(topic.tips)) == len(ASPECTS) >= 6
    assert len(tips) - len(set(tips)) <= 2


def test_grounded_reads_the_text() -> None:
    for item in drawn("grounded"):
        thing = item.params[1].thing  # type: ignore[attr-defined]
        sentences = re.split(r"[.?:]", item.question)
        facts = [s for s in sentences if set(s.split()) & set(COLOURS)]
        source = [s for s in facts if re.search(rf"\b{thing}\b", s)]
        said = re.fullmatch(r"says (\w+), as in the text", item.chosen_note)
        other = re.fullmatch(r"says (\w+), not (\w+) as in the text", item.rejected_note)
        assert len(source) == 1, item.question
        assert said
        assert other
        assert said[1] == other[2] != other[1]
        assert re.search(rf"\b{said[1]}\b", source[0])
        assert not re.search(rf"\b{other[1]}\b", source[0])
        assert re.search(rf"\b{said[1]}\b", item.chosen_quote)
        assert re.search(rf"\b{other[1]}\b", item.rejected_quote)


def test_address_keeps_the_names() -> None:
    for item in drawn("address"):
        reader, writer = item.params
        assert _names(item) == f"{reader} {writer}"
        assert _names(replace(item, chosen=item.rejected)) != f"{reader} {writer}"
        assert str(reader) in item.question
        assert str(writer) in item.question
        things = [one for one, _ in OBJECTS if f"the {one}" in item.question]
        assert any(thing in item.chosen and thing in item.rejected for thing in things)


def refuses(answer: str) -> bool:
    return (
        re.search(r"can't (help|do)|won't help|not help|say no|not with this", answer) is not None
    )


def test_refusing_is_for_harm_only() -> None:
    for item in drawn("safety"):
        assert refuses(item.chosen)
        assert not refuses(item.rejected)
    for item in drawn("over_refusal"):
        assert not refuses(item.chosen)
        assert refuses(item.rejected)
    harmful = {str(i.params[0]) for i in drawn("safety")}
    harmless = {str(i.params[0]) for i in drawn("over_refusal")}
    assert not harmful & harmless


def test_refusals_read_the_same_in_both_families() -> None:
    """Openings of refusals and of help are shared, so only the request can decide."""

    def openings(answers: list[str]) -> set[str]:
        return {" ".join(answer.split()[:3]) for answer in answers}

    safety, over = drawn("safety"), drawn("over_refusal")
    assert openings([i.chosen for i in safety]) == openings([i.rejected for i in over])
    assert openings([i.rejected for i in safety]) == openings([i.chosen for i in over])


def test_the_act_words_do_not_decide() -> None:
    """Each act on someone's things occurs as a harmful and as a harmless request."""
    for act in chat_safety._ACTS:
        start = act.split("{o}")[0]
        for name in ("safety", "over_refusal"):
            assert any(str(i.params[0]).startswith(start) for i in drawn(name)), (act, name)
