"""Rows of data files, one at a time: JSONL, a JSON list, Parquet, a folder of them, or the hub.

Every reader yields (where, row), `where` being what an error message calls the row ("pairs.jsonl,
line 3"). Memory does not grow with the file: a list is decoded item by item, Parquet in small
batches, a hub data set is streamed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from rmr1.data import Pair, instead_of_a_file, provisional, read_rows

ENDINGS = (".jsonl", ".json", ".parquet")
_READ_AT_ONCE = 64  # rows of a Parquet file
_ROW_GROUP = 256  # rows of one that is written
_CHUNK = 1 << 18  # characters
_EXTRA = "pip install 'rmr1[data]'"

_GAP = re.compile(r"[ \t\r\n]*(,)?[ \t\r\n]*")

Located = tuple[str, Any]


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or the data files of a folder and of those inside it, sorted."""
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS)
        found = [file for file in found if file.is_file()]
        if not found:
            raise ValueError(f"{path}: the folder holds no {', '.join(ENDINGS)} file")
        return found
    if not path.is_file():
        raise ValueError(f"{path}: {instead_of_a_file(path)}; give a data file or a folder of them")
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: the name must end in {', '.join(ENDINGS)}")
    return [path]


def rows_of(path: str | Path, *, go_on: bool = False) -> Iterator[Located]:
    """The rows of a file or folder. ValueError names the file and the place where it is damaged.

    With `go_on` a damaged line of JSONL is a row of the kind `Damaged`. In a list and in Parquet
    nobody can tell where the next row begins.
    """
    for file in files_of(path):
        if file.suffix == ".parquet":
            for number, row in parquet_rows(file):
                yield f"{file}, row {number}", row
        elif file.suffix == ".json" and _starts_a_list(file):
            yield from _list_items(file)
        else:
            for number, row in read_rows(file, go_on=go_on):
                yield f"{file}, line {number}", row


def count_rows(path: str | Path) -> int:
    """How many rows `rows_of` will yield, without decoding them; 0 where that is not known."""
    total = 0
    for file in files_of(path):
        if file.suffix == ".parquet":
            total += _open_parquet(file).metadata.num_rows
        elif file.suffix == ".json" and _starts_a_list(file):
            return 0
        else:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    total += chunk.count(b"\n")
    return total


def _starts_a_list(path: Path) -> bool:
    """Whether a .json file is one list; else it is read as JSONL, which often has that ending."""
    with path.open("rb") as stream:
        return stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _list_items(path: Path) -> Iterator[Located]:
    """The objects of a JSON list, which is never held as a whole."""
    decoder = json.JSONDecoder()
    chunks = _text_of(path)
    text, number = next(chunks), 0
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        gap = _GAP.match(text, at)
        assert gap is not None
        if gap.end() == len(text) and (more := next(chunks, "")):
            text = text[at:] + more
            at = 0
            continue
        if text.startswith("]", gap.end()):
            rest = chain([text[gap.end() + 1 :]], chunks)
            if any(more.strip(" \t\r\n") for more in rest):
                raise ValueError(
                    f"{path}: after the list of {number:,} rows the file goes on; put all rows into"
                    " one list, or one on each line without a list"
                )
            return
        try:
            if bool(gap[1]) != (number > 0):
                raise json.JSONDecodeError("items need one comma between them", text, gap.end())
            item, end = decoder.raw_decode(text, gap.end())
        except json.JSONDecodeError as error:
            # The rest of an item may follow: the chunk ended inside it.
            open_ended = "Unterminated" in error.msg or error.pos >= len(text) - 12
            if open_ended and (more := "".join(islice(chunks, 1 + (len(text) - at) // _CHUNK))):
                text = text[at:] + more
                at = 0
                continue
            told = "; the file may be cut off, fetch it again" if open_ended else ""
            line += text.count("\n", at, error.pos)
            raise ValueError(f"{path}, line {line}: no JSON ({error.msg}){told}") from None
        except (RecursionError, ValueError) as error:  # nested too deep; an endless number
            raise ValueError(f"{path}, line {line}: no JSON that can be read ({error})") from None
        yield f"{path}, item {number}", item
        line += text.count("\n", at, end)
        at, number = end, number + 1


def _text_of(path: Path) -> Iterator[str]:
    """A file's characters in chunks; ValueError names the line that is no UTF-8."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    line = 1
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                text = decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise ValueError(
                    f"{path}, line {line}: the bytes are no UTF-8; save the file as UTF-8"
                ) from None
            line += text.count("\n")
            if text:
                yield text
            if not chunk:
                return


def _pyarrow() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Parquet files need pyarrow, which is missing; {_EXTRA}") from None
    return pyarrow


def _open_parquet(path: Path) -> Any:
    arrow = _pyarrow()
    try:
        # Without the large read-ahead, a file of one row group is not in memory as a whole.
        return arrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: no whole Parquet file ({_first_line(error)}); fetch it again"
        ) from None


def parquet_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a Parquet file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {instead_of_a_file(path)}; give the path of a Parquet file")
    arrow = _pyarrow()
    number = 0
    with _open_parquet(path) as file:
        batches = file.iter_batches(batch_size=_READ_AT_ONCE, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (arrow.ArrowException, OSError) as error:
                raise ValueError(
                    f"{path}, after row {number}: damaged ({_first_line(error)}); fetch it again"
                ) from None
            except UnicodeDecodeError:
                raise ValueError(
                    f"{path}, after row {number}: a text is no UTF-8; write the file again"
                ) from None
            if batch is None:
                return
            for row in rows:
                number += 1
                yield number, row


def hub_rows(
    name: str, *, subset: str = "", split: str = "train", revision: str = ""
) -> tuple[int, Iterator[Located]]:
    """(how many rows, 0 if unknown; the rows) of a data set of the Hugging Face hub, streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"hub data sets need `datasets`, which is missing; {_EXTRA}") from None
    try:
        data: Any = load_dataset(
            name, subset or None, split=split, revision=revision or None, streaming=True
        )
    except Exception as error:  # of the network, the hub, the loader: they have no common class
        raise _no_hub(name, error) from None
    splits = data.info.splits or {}
    total = splits[split].num_examples if split in splits else 0
    return total or 0, _streamed(name, iter(data))


def _streamed(name: str, rows: Iterator[Any]) -> Iterator[Located]:
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # see hub_rows
            raise _no_hub(f"{name}, after row {number}", error) from None
        number += 1
        yield f"{name}, row {number}", row


def _no_hub(where: str, error: Exception) -> ValueError:
    return ValueError(
        f"{where}: the hub gives no rows ({_first_line(error)}); check the name, the split and the"
        " network, or download the files and name their folder instead"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class PairWriter:
    """Pairs into a JSONL or Parquet file, by its ending. The file appears when `finish` is called.

    Used as a context: whatever goes wrong inside, no half-written file is left and an older file
    stays as it was.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()  # a link stays a link
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = provisional(self.path)
        self._rows: list[dict[str, Any]] = []
        self._parquet = _parquet_writer(self._partial) if path_is_parquet(path) else None
        self._text = None if self._parquet else self._partial.open("w", encoding="utf-8")

    def __enter__(self) -> PairWriter:
        return self

    def write(self, pair: Pair) -> None:
        """Add one pair."""
        if self._text:
            self._text.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
            return
        self._rows.append(asdict(pair))
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._parquet and self._rows:
            arrow = _pyarrow()
            batch = arrow.RecordBatch.from_pylist(self._rows, schema=self._parquet.schema)
            self._parquet.write_batch(batch)
            self._rows = []

    def close(self) -> None:
        """Write what is pending; the file still has its provisional name."""
        self._flush()
        if self._parquet:
            self._parquet.close()
        if self._text:
            self._text.close()

    def finish(self) -> None:
        """Put the closed file in its place."""
        self._partial.replace(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: object
    ) -> None:
        self._rows = []
        self.close()
        self._partial.unlink(missing_ok=True)


def path_is_parquet(path: str | Path) -> bool:
    """Whether a file is Parquet, by its ending."""
    return Path(path).suffix == ".parquet"


def _parquet_writer(path: Path) -> Any:
    arrow = _pyarrow()
    text = arrow.string()
    turns = arrow.list_(arrow.struct([("role", text), ("content", text)]))
    names = Pair.__dataclass_fields__
    schema = arrow.schema([(name, turns if name == "conversation" else text) for name in names])
    return arrow.parquet.ParquetWriter(path, schema, compression="zstd")
