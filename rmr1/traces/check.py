"""Whether a judgment may be distilled from, and how a second model is asked for a better one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rmr1.data import Message, Pair
from rmr1.verdict import FormatError, parse_verdict

Pass = Literal["teacher", "corrector"]

WRONG = "wrong verdict"
_CORRECTION = """\
{problem}: answer {label} is the better one. Judge the two answers anew, in the format that was \
asked for, so that what you write leads to the verdict <answer>[[{label}]]</answer>. Find out what \
this judgment overlooked and argue from the answers themselves. Whoever reads yours knows neither \
this judgment nor this message: mention neither of them."""
# A trace that speaks of what its writer was told teaches a judge to claim the same.
_TOLD = re.compile(
    r"(first|previous|earlier|initial|flawed|original) (judge?ment|verdict|evaluation)"
    r"|(correct|right|given|true|provided|reference|gold) (label|verdict)"
    r"|I (was|am|have been) (told|asked|instructed|informed)"
    r"|(I|we) (already )?know (that )?((answer|response|assistant) )?[AB] is"
    r"|(told|informed|instructed|given) (that )?((answer|response|assistant) )?[AB] is"
    r"|(reference|ground[- ]truth|label|answer key) (says|states|indicates|shows|prefers|favou?rs)"
    r"|(instructions?|messages?|prompt|user) (says?|states?|tells?|told|requires?|demands?)"
    r" ((me|us) )?(that )?the (verdict|judge?ment|better)",
    re.IGNORECASE,
)
_QUOTE = re.compile(r"<quote_([AB])>.*?</quote_\1>", re.DOTALL)


def fault_of(text: str, pair: Pair, step: Pass, *, cut: bool, strict: bool) -> str:
    """Why a judgment is no trace for a pair; empty where it is one.

    `strict` asks for the whole chain of rubrics. What the second model writes must not speak of
    what it was told; what it quotes may.
    """
    if cut:
        return "cut by max_new_tokens"
    verdict = parse_verdict(text)
    if verdict.answer is None:
        return f"no verdict ({verdict.error.name})"
    if verdict.answer != pair.label:
        return WRONG
    if strict and verdict.error != FormatError.OK:
        return f"format ({verdict.error.name})"
    if step == "corrector" and _TOLD.search(_QUOTE.sub("", text)):
        return "speaks of what it was told"
    return ""


def correction(chat: Sequence[Message], flawed: str, fault: str, pair: Pair) -> list[Message]:
    """What the second model is asked: the pair, the flawed judgment, and the right verdict."""
    problem = "That verdict is wrong" if fault == WRONG else f"That is no judgment ({fault})"
    return [
        *chat,
        # Some servers refuse an empty turn.
        {"role": "assistant", "content": flawed.strip() or "(no answer)"},
        {"role": "user", "content": _CORRECTION.format(problem=problem, label=pair.label)},
    ]
