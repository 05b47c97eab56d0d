"""What a family of embedded tasks is, and how one drawn item becomes a labelled `Pair`.

A family draws *items*: a question, a right answer, a wrong answer and the reasons, as plain text
without a side. This file places the answers (A or B by a fair coin), writes the chain-of-rubrics
trace for that placement, and keeps train and held-out apart: the parameters of an item (the
numbers, words and topics that decide which answer is right) are hashed, and the hash decides the
split. So no question of the held-out set can occur in training under any seed or wording, nor with
other details around it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from rmr1.data import Kind, Label, Pair

Split = Literal["train", "heldout"]

# One parameter set in five is held out.
_HELDOUT_OF = 5


@dataclass(frozen=True, slots=True)
class Item:
    """One task before its answers are placed.

    `params` are what the right answer depends on, not the wording and not the details around it
    (for whom, on what occasion); they decide the split.
    `solution` (reasoning) is the judge's own working and ends with its result. `rubric` (chat) is
    (criterion, percent) with percents that sum to 100, `justify` says why these criteria.
    A quote is a verbatim part of its answer; a note says in a few words what that quote shows.
    """

    params: tuple[object, ...]
    question: str
    chosen: str
    rejected: str
    chosen_quote: str
    rejected_quote: str
    chosen_note: str
    rejected_note: str
    solution: str = ""
    rubric: tuple[tuple[str, int], ...] = ()
    justify: str = ""


class Family(NamedTuple):
    """A named source of items; `draw(rng, split)` may use the split to choose its wording."""

    name: str
    kind: Kind
    draw: Callable[[Random, Split], Item]


def split_of(family: str, params: tuple[object, ...]) -> Split:
    """The split a parameter set belongs to: a property of the parameters, not of any seed."""
    digest = zlib.crc32(repr((family, params)).encode())
    return "heldout" if digest % _HELDOUT_OF == 0 else "train"


def draw_item(family: Family, rng: Random, split: Split) -> Item:
    """Draw items until one belongs to the split."""
    for _ in range(1000):
        item = family.draw(rng, split)
        if split_of(family.name, item.params) == split:
            return item
    raise AssertionError(f"family {family.name}: 1,000 draws and none belongs to {split}")


def write_trace(item: Item, kind: Kind, label: Label) -> str:
    """The chain-of-rubrics judgment that gives `label`, in the format of PAPER.md.

    With the item's true label this is a trace to distil from. With the other label it is a
    well-formed judgment that is wrong (the notes change sides with the verdict).
    """
    a_is_chosen = label == "A"
    return judgment_text(
        item,
        kind,
        label,
        quotes=(item.chosen_quote, item.rejected_quote)
        if a_is_chosen
        else (item.rejected_quote, item.chosen_quote),
        notes=(item.chosen_note, item.rejected_note)
        if a_is_chosen
        else (item.rejected_note, item.chosen_note),
    )


def judgment_text(
    item: Item, kind: Kind, label: Label, *, quotes: tuple[str, str], notes: tuple[str, str]
) -> str:
    """Lay out a judgment: task type, solution or rubric, quotes and notes of A and B, verdict."""
    if kind == "reasoning":
        head = f"<type>Reasoning</type>\n<solution>{item.solution}</solution>"
    else:
        lines = "\n".join(
            f"{number}. {text} ({percent}%)"
            for number, (text, percent) in enumerate(item.rubric, start=1)
        )
        head = f"<type>Chat</type>\n<rubric>\n{lines}\n<justify>{item.justify}</justify>\n</rubric>"
    return (
        f"{head}\n<eval>\n"
        f"<quote_A>{quotes[0]}</quote_A>\n<summary_A>{notes[0]}</summary_A>\n"
        f"<quote_B>{quotes[1]}</quote_B>\n<summary_B>{notes[1]}</summary_B>\n"
        f"</eval>\n<answer>[[{label}]]</answer>"
    )


def place(item: Item, family: Family, label: Label, identity: str) -> Pair:
    """Put the right answer on the side that `label` names and attach the trace."""
    a, b = (item.chosen, item.rejected) if label == "A" else (item.rejected, item.chosen)
    return Pair(
        id=identity,
        source=f"tasks/{family.name}",
        conversation=({"role": "user", "content": item.question},),
        answer_a=a,
        answer_b=b,
        label=label,
        kind=family.kind,
        trace=write_trace(item, family.kind, label),
    )
