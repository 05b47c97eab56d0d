"""Files of judgments that grow line by line and survive being cut off anywhere."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from rmr1.data import Pair


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """The file, mended, for this process alone.

    ValueError when another one has it open, or when it ends in what no log ends in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        lock(stream, path)
        repair_tail(path)
        yield stream


def lock(stream: IO[Any], path: Path) -> None:
    """Have an open file for this process alone until it is closed. ValueError: another has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path}: another process is writing to it; wait for it, or give another output"
        ) from None
    except OSError:  # a file system without locks
        pass


def content_of(pair: Pair) -> str:
    """A hash of all that a judgment depends on: a rebuilt file may give an id to another pair."""
    told = repr([pair.conversation, pair.answer_a, pair.answer_b, pair.label])
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def append(stream: TextIO, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows and see them onto the disk: from here on they are not made again."""
    stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    stream.flush()
    os.fsync(stream.fileno())


def repair_tail(path: Path) -> bool:
    """Mend a last line that a killed run left half written; True when there was one.

    A whole row that lacks only its newline is kept, a torn one is cut. ValueError, and the file
    stays as it is, where the end is no beginning of a row, or the line before it is none: somebody
    named a file of another kind.
    """
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return False
    end = content.rfind(b"\n") + 1
    tail = content[end:].rstrip(b"\0")  # a crash of the machine can leave zeros
    before = content[: end - 1].rpartition(b"\n")[2] if end else b""
    if not b'{"'.startswith(tail[:2]) or (before.strip() and not _is_row(before)):
        raise ValueError(f"{path}: this is no file of judgments; give another output")
    whole = _is_row(content[end:])
    with path.open("r+b") as stream:
        if whole:
            stream.seek(0, os.SEEK_END)
            stream.write(b"\n")
        else:
            stream.truncate(end)
    return True


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (RecursionError, ValueError):
        return False
