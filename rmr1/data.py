"""Preference pairs: the one record that every stage reads, and its files.

One line of a JSONL file is one pair (a row of a Parquet file has the same fields):

    {"id": "…", "source": "…", "conversation": [{"role": "user", "content": "…"}],
     "answer_a": "…", "answer_b": "…", "label": "A", "kind": "reasoning", "trace": "…"}

`trace` may be absent or null: it is a judgment text to distil from, used by `rmr1 sft` only.
"""

from __future__ import annotations

import codecs
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, TypedDict, TypeVar, get_args

Label = Literal["A", "B"]
Kind = Literal["chat", "reasoning"]
Role = Literal["system", "user", "assistant"]
Row = TypeVar("Row")


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one conversation, and which of them is better.

    `source` names where the pair comes from ("tasks/arithmetic"); figures are grouped by it.
    `conversation` ends with the user turn that both answers reply to.
    """

    id: str
    source: str
    conversation: tuple[Message, ...]
    answer_a: str
    answer_b: str
    label: Label
    kind: Kind
    trace: str = ""

    def swapped(self) -> Pair:
        """The same pair with the answers exchanged. The trace names sides, so it is dropped."""
        label: Label = "B" if self.label == "A" else "A"
        return Pair(
            self.id, self.source, self.conversation, self.answer_b, self.answer_a, label, self.kind
        )


_TEXT_FIELDS = ("id", "source", "answer_a", "answer_b")
_REQUIRED = (*_TEXT_FIELDS, "conversation", "label", "kind")


def _conversation(value: Any) -> tuple[Message, ...]:
    """Check the turns of a conversation; ValueError says which field is wrong and why."""
    if not isinstance(value, list) or not value:
        raise ValueError('field "conversation" must be a non-empty list of messages')
    turns: list[Message] = []
    for index, turn in enumerate(value):
        where = f'field "conversation[{index}]'
        if not isinstance(turn, dict):
            raise ValueError(f'{where}" must be an object with "role" and "content"')
        if turn.get("role") not in get_args(Role):
            roles = ", ".join(get_args(Role))
            raise ValueError(f'{where}.role" must be one of {roles}, got {turn.get("role")!r}')
        if not isinstance(turn.get("content"), str):
            raise ValueError(f'{where}.content" must be a text, got {turn.get("content")!r}')
        refuse_half_characters(turn["content"], f'{where}.content"')
        turns.append({"role": turn["role"], "content": turn["content"]})
    if turns[-1]["role"] != "user":
        raise ValueError('field "conversation" must end with a user turn')
    return tuple(turns)


def refuse_half_characters(text: str, what: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a surrogate pair ({text[error.start]!r} at character"
            f" {error.start}); write the whole character"
        ) from None


def pair_from_row(row: Any) -> Pair:
    """Build a pair from one decoded JSON row; ValueError names the field that is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, got {type(row).__name__}")
    missing = [field for field in _REQUIRED if field not in row]
    if missing:
        raise ValueError(
            f'field "{missing[0]}" is missing (a pair needs {", ".join(_REQUIRED)};'
            f" found {', '.join(map(str, row)) or 'nothing'})"
        )
    for field in _TEXT_FIELDS:
        if not isinstance(row[field], str) or not row[field].strip():
            raise ValueError(f'field "{field}" must be a non-empty text, got {row[field]!r}')
        refuse_half_characters(row[field], f'field "{field}"')
    if row["label"] not in get_args(Label):
        raise ValueError(f'field "label" must be "A" or "B", got {row["label"]!r}')
    if row["kind"] not in get_args(Kind):
        raise ValueError(f'field "kind" must be "chat" or "reasoning", got {row["kind"]!r}')
    trace = row.get("trace")
    if trace is None:  # what a column of Parquet holds where there is no value
        trace = ""
    if not isinstance(trace, str):
        raise ValueError(f'field "trace" must be a text, got {trace!r}')
    refuse_half_characters(trace, 'field "trace"')
    return Pair(
        id=row["id"],
        source=row["source"],
        conversation=_conversation(row["conversation"]),
        answer_a=row["answer_a"],
        answer_b=row["answer_b"],
        label=row["label"],
        kind=row["kind"],
        trace=trace,
    )


def instead_of_a_file(path: Path) -> str:
    """What stands at a path where no regular file is."""
    if path.is_dir():
        return "is a folder"
    if path.is_fifo():  # files are read more than once, which a pipe does not stand
        return "is a pipe"
    return "is a device or a socket" if path.exists() else "no such file"


@dataclass(frozen=True, slots=True)
class Damaged:
    """What stands for a line that holds no row, where the reader goes on after it."""

    reason: str


def read_rows(path: str | Path, *, go_on: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (line number, decoded row) of a JSONL file; blank lines are skipped.

    ValueError names the file and the line where the text is no UTF-8 or no JSON. With `go_on` a
    `Damaged` comes in place of that row, and the lines after it follow.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {instead_of_a_file(path)}; give the path of a JSONL file")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:  # some editors and spreadsheets begin a file with a mark
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = _decoded(line)
            except ValueError as error:
                if not go_on:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                row = Damaged(str(error))
            yield number, row


def _decoded(line: bytes) -> Any:
    """The JSON of a line; ValueError says why there is none."""
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the bytes are no UTF-8 (at byte {error.start} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file may be cut off, fetch it again"
        raise ValueError(f"no JSON ({error.msg} at column {error.colno}){cut}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; an endless number
        raise ValueError(f"no JSON that can be read ({error})") from None


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a JSONL or Parquet file of pairs. ValueError names the file, the line and the field.

    Ids may not repeat: judgments of a pair are found again by its id.
    """
    pairs = []
    lines: dict[str, int] = {}  # id -> where it stands
    unit = "line"
    rows: Callable[[str | Path], Iterator[tuple[int, Any]]] = read_rows
    if Path(path).suffix == ".parquet":
        from rmr1.datasets.row_files import parquet_rows  # pyarrow is an extra

        unit, rows = "row", parquet_rows
    for number, row in rows(path):
        try:
            pair = pair_from_row(row)
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}") from None
        first = lines.setdefault(pair.id, number)
        if first != number:
            raise ValueError(
                f'{path}, {unit} {number}: field "id" is {pair.id!r}, as in {unit} {first}; give'
                " each pair an id of its own"
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: the file holds no pairs")
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> int:
    """Write pairs as JSONL, or as Parquet by the name's ending; return how many were written."""
    path, rows = Path(path), list(pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from rmr1.datasets.row_files import PairWriter  # pyarrow is an extra

        with PairWriter(path) as writer:
            for pair in rows:
                writer.write(pair)
            writer.close()
            writer.finish()
    else:
        lines = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in rows]
        write_whole(path, "".join(lines))
    return len(rows)


def provisional(path: Path) -> Path:
    """A name beside a file to write it under: of its own, as another process may write it too."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: a full disk must not cost what was there.

    A link stays a link; a pipe or /dev/stdout, where nothing is replaced, is written to.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    partial = provisional(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def shuffled_epochs(pairs: Sequence[Row], seed: int) -> Iterator[Row]:
    """Every row once an epoch, for ever, in an order that depends on seed and epoch only.

    A run that resumes skips as many rows as it had drawn and goes on as if never stopped.
    """
    epoch = 0
    while True:
        order = list(range(len(pairs)))
        Random(f"{seed}/{epoch}").shuffle(order)
        yield from (pairs[index] for index in order)
        epoch += 1
