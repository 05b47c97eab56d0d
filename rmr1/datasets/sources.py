"""Rows of the public preference sets become candidates: pairs whose answers have no side yet.

One function per format, from a decoded row to a `Candidate`. A row with other columns is a
ValueError that shows what was found and what is wanted; a well-formed row that makes no pair is
`Unfit`, with one of the reasons that the build's table lists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, get_args

from rmr1.data import Kind, Label, Message, Pair, Role, pair_from_row, refuse_half_characters
from rmr1.verdict import parse_verdict

FormatName = Literal["skywork", "code-preference-pairs", "math-step-dpo", "rm-r1", "trl", "pairs"]

NO_USER_TURN = "no user turn last"
OTHER_CONVERSATIONS = "two conversations"
NO_ASSISTANT = "no assistant turn last"
NO_RIGHT_VERDICT = "trace without the right verdict"
NOT_APART = "answers not told apart"


class Unfit(Exception):
    """A row that makes no pair; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A better and a worse answer to one conversation.

    `source` and `id` are "" where the row names none, `kind` is None where the format does not
    say. A `trace` names sides, so its pair comes with the `label` that it was written for.
    """

    conversation: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str = ""
    id: str = ""
    kind: Kind | None = None
    trace: str = ""
    label: Label | None = None

    @property
    def content(self) -> str:
        """Twenty hex digits of what is judged: the same for both orders and both labels."""
        parts = [list(map(dict, self.conversation)), *sorted((self.chosen, self.rejected))]
        text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

    def pair(self, label: Label) -> Pair:
        """The pair with the better answer on side `label`. Source, id and kind are filled in."""
        assert self.kind is not None
        first, second = (self.chosen, self.rejected)[:: 1 if label == "A" else -1]
        return Pair(
            self.id, self.source, self.conversation, first, second, label, self.kind, self.trace
        )


def candidate_from_row(row: Any, form: FormatName) -> Candidate:
    """Read one decoded row. Raises ValueError (other columns or types) or `Unfit`."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with columns, got {type(row).__name__}")
    read: dict[FormatName, Callable[[dict[str, Any]], Candidate]] = {
        "skywork": _skywork,
        "code-preference-pairs": _code_preference_pairs,
        "math-step-dpo": _math_step_dpo,
        "rm-r1": _rm_r1,
        "trl": _trl,
        "pairs": _pairs,
    }
    return read[form](row)


def _need(row: dict[str, Any], form: FormatName, *columns: str) -> None:
    """ValueError unless the row has every column."""
    if set(columns) <= set(row):
        return
    missing = [name for name in columns if name not in row]
    raise ValueError(
        f"no column {', '.join(missing)}; format {form} needs {', '.join(columns)}, found"
        f" {', '.join(map(str, row)) or 'nothing'}"
    )


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f'column "{column}" must be a text, got {value!r:.80}')
    refuse_half_characters(value, f'column "{column}"')
    return value


def _messages(row: dict[str, Any], column: str) -> tuple[Message, ...]:
    value = row[column]
    if not isinstance(value, list):
        raise ValueError(f'column "{column}" must be a list of messages, got {value!r:.80}')
    turns: list[Message] = []
    for index, turn in enumerate(value):
        where = f'column "{column}[{index}]'
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise ValueError(f'{where}" must have role and content, got {turn!r:.80}')
        if turn["role"] not in get_args(Role):
            raise ValueError(f'{where}.role" must be one of {", ".join(get_args(Role))}, got'
                             f" {turn['role']!r:.80}")  # fmt: skip
        if not isinstance(turn["content"], str):
            raise ValueError(f'{where}.content" must be a text, got {turn["content"]!r:.80}')
        refuse_half_characters(turn["content"], f'{where}.content"')
        turns.append({"role": turn["role"], "content": turn["content"]})
    return tuple(turns)


def _name(row: dict[str, Any]) -> str:
    """The row's own id, "" if it has none."""
    value = row.get("id")
    if isinstance(value, str):
        refuse_half_characters(value, 'column "id"')
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _from_conversations(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[tuple[Message, ...], str, str]:
    """What two whole conversations share, and the last answer of each."""
    if not (chosen and rejected and chosen[-1]["role"] == rejected[-1]["role"] == "assistant"):
        raise Unfit(NO_ASSISTANT)
    if chosen[:-1] != rejected[:-1]:
        raise Unfit(OTHER_CONVERSATIONS)
    return tuple(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"]


def _skywork(row: dict[str, Any]) -> Candidate:
    """Skywork-Reward-Preference: `chosen` and `rejected` are whole conversations."""
    _need(row, "skywork", "chosen", "rejected", "source")
    shared, good, bad = _from_conversations(_messages(row, "chosen"), _messages(row, "rejected"))
    return Candidate(shared, good, bad, source=_text(row, "source"), id=_name(row))


def _code_preference_pairs(row: dict[str, Any]) -> Candidate:
    """Code-Preference-Pairs: `input` and two answers, of which one has a bug."""
    _need(row, "code-preference-pairs", "input", "accepted", "rejected")
    return Candidate(_user(_text(row, "input")), _text(row, "accepted"), _text(row, "rejected"))


def _math_step_dpo(row: dict[str, Any]) -> Candidate:
    """Math-Step-DPO: both answers begin with the same steps, in a column of their own."""
    _need(row, "math-step-dpo", "prompt", "initial_reason_steps", "full_chosen", "full_rejected")
    start = _text(row, "initial_reason_steps")
    good, bad = start + _text(row, "full_chosen"), start + _text(row, "full_rejected")
    return Candidate(_user(_text(row, "prompt")), good, bad)


def _joined(given: tuple[Message, ...], own: tuple[Message, ...]) -> tuple[Message, ...]:
    """A prompt and the turns after it, which may begin with the prompt's last ones once more.

    Either may be without the system turns, so these are compared by themselves.
    """
    heads = [tuple(takewhile(lambda turn: turn["role"] == "system", part)) for part in (given, own)]
    told, heard = given[len(heads[0]) :], own[len(heads[1]) :]
    most = min(len(told), len(heard))
    common = next(n for n in range(most, -1, -1) if told[len(told) - n :] == heard[:n])
    return (heads[1] or heads[0]) + told + heard[common:]


def _trl(row: dict[str, Any]) -> Candidate:
    """TRL's preference format: texts or messages, the prompt in its column or in both answers."""
    _need(row, "trl", "chosen", "rejected")
    prompt = row.get("prompt")
    given: tuple[Message, ...] = ()
    if isinstance(prompt, list):
        given = _messages(row, "prompt")
    elif prompt is not None:
        given = _user(_text(row, "prompt"))
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        own, good, bad = _from_conversations(_messages(row, "chosen"), _messages(row, "rejected"))
        # Some sets have the prompt in its column and in both conversations as well.
        shared = own if isinstance(prompt, str) and own else _joined(given, own)
    else:
        good, bad, shared = _text(row, "chosen"), _text(row, "rejected"), given
        if prompt is None:
            same = takewhile(lambda both: both[0] == both[1], zip(good, bad, strict=False))
            start = re.sub(r"\S+\Z", "", "".join(letter for letter, _ in same))  # whole words
            if not start.strip():
                raise ValueError(
                    "chosen and rejected begin with different words, so there is no prompt in them;"
                    " format trl needs prompt, chosen, rejected"
                )
            shared, good, bad = _user(start.rstrip()), good[len(start) :], bad[len(start) :]
    source = row.get("source")
    return Candidate(
        shared, good, bad, source=source if isinstance(source, str) else "", id=_name(row)
    )


def _pairs(row: dict[str, Any]) -> Candidate:
    """This project's own pairs. They are placed anew, but for those with a trace."""
    # Its checks say "empty" of an answer, which is a reason here and no fault of the file.
    sides = [row.get("answer_a"), row.get("answer_b")]
    blank = [isinstance(text, str) and not text.strip() for text in sides]
    filled = {f"answer_{side}": "-" for side, empty in zip("ab", blank, strict=True) if empty}
    pair = pair_from_row({**row, **filled})
    answers = ("" if blank[0] else pair.answer_a, "" if blank[1] else pair.answer_b)
    good, bad = answers if pair.label == "A" else answers[::-1]
    return Candidate(
        pair.conversation,
        good,
        bad,
        source=pair.source,
        id=pair.id,
        kind=pair.kind,
        trace=pair.trace,
        label=pair.label if pair.trace else None,
    )


# The layouts in which RM-R1's published sets show a pair, and their speakers. Models that think by
# themselves are told what to do in the same turn, before and after it. The misspelt name stands in
# side B of some of them, and only where A is better.
_ONE_TURN = re.compile(
    r"^\[Client Question\]\n(.*)\n\n\[The Start of Chatbot A's Response\]\n(.*)\n"
    r"\[The End of Chatbot A's Response\]\n\n\[The Start of Chatbot B's Response\]\n(.*)\n"
    r"\[The End of Chatbot B's Response\]\s*$",
    re.DOTALL | re.MULTILINE,
)
_TURNS = re.compile(
    r"^\[The Start of the Conversation between Chatbot A and the Client\]\n(.*)\n"
    r"\[The End of the Conversation between Chatbot A and the Client\]\n\n"
    r"\[The Start of the Conversation between Chatbot B and the Client\]\n(.*)\n"
    r"\[The End of the Conversation between Chatbot B and the Client\]\s*$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(
    r"^\[(?:Client Question|The (?:Start|End) of (?:Chatbot [AB]'s Response|the Conversation"
    r" between Chatbot [AB] and the Client))\](?=\s*$)",
    re.MULTILINE,
)
_SPEAKER = re.compile(r"^(User|Chatbot A|Chatbot B|Chabot B): ", re.MULTILINE)
_SIDES: dict[str, Label] = {"model_a": "A", "model_b": "B"}


def _speeches(text: str) -> tuple[Message, ...]:
    """A printed conversation as messages; `Unfit` where speakers do not take turns."""
    parts = _SPEAKER.split(text)
    turns: list[Message] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        role: Role = "user" if speaker == "User" else "assistant"
        turns.append({"role": role, "content": said.removesuffix("\n")})
    whole = not parts[0] and len(turns) % 2 == 0
    if not whole or any((turn["role"] == "user") != (at % 2 == 0) for at, turn in enumerate(turns)):
        raise Unfit(NOT_APART)  # a turn that begins a line with "User: ", say
    return tuple(turns)


def _rm_r1(row: dict[str, Any]) -> Candidate:
    """RM-R1's own sets: the judge's whole prompt, and who won or (traced set) what was written."""
    _need(row, "rm-r1", "context_messages", "winner")
    prompt, winner = _messages(row, "context_messages"), _text(row, "winner")
    shown = prompt[-1]["content"] if prompt else ""
    marks = _MARK.findall(shown)
    found = _ONE_TURN.search(shown) or _TURNS.search(shown)
    if not found or len(set(marks)) < len(marks):  # then a text holds a mark, and could end there
        raise Unfit(NOT_APART)
    if found.re is _ONE_TURN:
        shared, answers = _user(found[1]), (found[2], found[3])
    else:
        shared, *both = _from_conversations(_speeches(found[1]), _speeches(found[2]))
        answers = (both[0], both[1])
    if winner in _SIDES:
        good, bad = answers if winner == "model_a" else answers[::-1]
        return Candidate(shared, good, bad)
    verdict = parse_verdict(winner)
    truth = row.get("ground_truth")
    if not isinstance(truth, str | None):
        raise ValueError(f'column "ground_truth" must be a text, got {truth!r:.80}')
    right = verdict.answer if "ground_truth" not in row else _SIDES.get(truth or "")
    if verdict.answer is None or verdict.answer == "tie" or verdict.answer != right:
        raise Unfit(NO_RIGHT_VERDICT)
    good, bad = answers if verdict.answer == "A" else answers[::-1]
    return Candidate(shared, good, bad, kind=verdict.task_type, trace=winner, label=verdict.answer)
