"""Files of rows: every kind gives the same rows, one by one, and damage is named with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rmr1.data import Damaged, Pair, read_pairs, write_pairs
from rmr1.datasets.row_files import (
    PairWriter,
    count_rows,
    files_of,
    hub_rows,
    parquet_rows,
    rows_of,
)

ROWS: list[dict[str, Any]] = [
    {"n": n, "text": f'é "{n}" \\ ] , 🙂 {"x" * n}', "turns": [{"role": "user", "content": "[1,"}]}
    for n in range(700)
]


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def write_all(folder: Path) -> list[Path]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.json").write_text("\ufeff" + lines)  # often so named
    (folder / "c.json").write_text(json.dumps(ROWS) + "\n" + " " * 200)
    (folder / "d.json").write_text("\ufeff \n" + json.dumps(ROWS, indent=1, ensure_ascii=False))
    write_parquet(folder / "e.parquet", ROWS, row_group_size=100)
    return files_of(folder)


@pytest.mark.parametrize("chunk", [1 << 18, 61])
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmr1.datasets.row_files._CHUNK", chunk)
    rows = ROWS if chunk > 61 else ROWS[:40]
    for path in write_all(tmp_path):
        found = list(islice(rows_of(path), len(rows)))
        assert [row for _, row in found] == rows
        assert all(str(path) in where for where, _ in found)
        assert count_rows(path) in (0, len(ROWS))


def test_a_folder_is_all_of_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    (tmp_path / "README.md").write_text("not data")
    assert [row["name"] for _, row in rows_of(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert count_rows(tmp_path) == 3


def told(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked by the caller
        list(rows_of(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: the bytes are no UTF-8"),
        ("x.jsonl", b'{"a": 1}\n{"a": "cut', "line 2: no JSON (Unterminated"),
        ("x.jsonl", b'{"a": 1}\n{"a": ', "the file may be cut off, fetch it again"),
        ("x.json", b'[{"a": 1},\n{"a": "\xe9"}]', "line 2: the bytes are no UTF-8"),
        ("x.json", b'[{"a": 1},\n\n{"a": "cut', "line 3: no JSON (Unterminated"),
        ("x.json", b'[{"a": 1},\n{"a": 2}', "line 2: no JSON"),
        ("x.json", b"[", "the file may be cut off, fetch it again"),
        ("x.json", b'[{"a": 1}\n{"a": 2}, {"a": 3}]', "line 2: no JSON (items need one comma"),
        ("x.json", b'[{"a": 1}, ,{"a": 2}, {"a": 3}]', "no JSON (Expecting value)"),
        ("x.json", b'[{"a": 1}]\n[{"a": 2}]', "after the list of 1 rows the file goes on"),
        ("x.json", b"[]" + b" " * 500 + b'{"a": 1}', "after the list of 0 rows the file goes on"),
        ("x.json", b"[" * 100_000, "no JSON that can be read"),
        ("x.json", b"[" + b"1" * 5000 + b"]", "no JSON that can be read"),
    ],
)
def test_damaged_texts(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert told(tmp_path / name).startswith(str(tmp_path / name))
    assert sentence in told(tmp_path / name)


def test_rows_after_the_end_of_a_list_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmr1.datasets.row_files._CHUNK", 61)
    path = tmp_path / "x.json"
    path.write_text(f"{json.dumps(ROWS[:10])}\n{' ' * 300}{json.dumps(ROWS[10:20])}\n")
    rows = rows_of(path)
    assert [row for _, row in islice(rows, 10)] == ROWS[:10]
    with pytest.raises(
        ValueError, match=r"x\.json: after the list of 10 rows the file goes on; put"
    ):
        next(rows)


def test_damaged_lines_are_passed_over_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xff\n{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 2}\n{"a": ')
    found = list(rows_of(path, go_on=True))
    assert [where for where, _ in found] == [f"{path}, line {line}" for line in range(1, 6)]
    assert [row for _, row in found if not isinstance(row, Damaged)] == [{"a": 1}, {"a": 2}]
    reasons = [row.reason for _, row in found if isinstance(row, Damaged)]
    for reason, told in zip(reasons, ("no UTF-8", "can be read", "cut off"), strict=True):
        assert told in reason


def test_a_truncated_parquet_file_and_one_with_a_damaged_page(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert told(path).startswith(f"{path}: no whole Parquet file (")
        assert told(path).endswith("fetch it again")
    path.write_bytes(whole[:200] + bytes(300) + whole[500:])
    assert told(path).startswith(f"{path}, after row ")


def test_a_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    raw = pyarrow.array([b"caf\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"a": raw}), tmp_path / "x.parquet")
    assert "after row 0: a text is no UTF-8" in told(tmp_path / "x.parquet")


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    for path, sentence in (
        (tmp_path / "absent.jsonl", "no such file"),
        (tmp_path / "x.csv", "must end in .jsonl, .json, .parquet"),
        (tmp_path, "the folder holds no .jsonl, .json, .parquet file"),
    ):
        assert sentence in told(path)


PAIRS = [
    Pair(f"p{n}", "s", ({"role": "user", "content": "q"},), "a", "b", "A", "chat", "t" * (n % 2))
    for n in range(600)
]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_written_pairs_are_read_back(tmp_path: Path, name: str) -> None:
    with PairWriter(tmp_path / "new" / name) as writer:
        for pair in PAIRS:
            writer.write(pair)
        writer.close()
        assert not (tmp_path / "new" / name).exists()
        writer.finish()
    assert read_pairs(tmp_path / "new" / name) == PAIRS
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def _write_and_stop(path: Path) -> None:
    with PairWriter(path) as writer:
        for pair in PAIRS:
            writer.write(pair)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_what_goes_wrong_while_writing_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _write_and_stop(tmp_path / name)
    assert (tmp_path / name).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_pairs_in_parquet_name_their_row(tmp_path: Path) -> None:
    write_pairs(tmp_path / "x.jsonl", PAIRS[:2])
    rows = [row for _, row in rows_of(tmp_path / "x.jsonl")]
    path = write_parquet(tmp_path / "x.parquet", [rows[0], rows[1] | {"label": "C"}])
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: field \"label\" must be"):
        read_pairs(path)
    path = write_parquet(path, [rows[0], rows[0]])
    with pytest.raises(ValueError, match=r"row 2: field \"id\" is 'p0', as in row 1"):
        read_pairs(path)


READ = """
import re, sys
from rmr1.datasets.row_files import rows_of
count = sum(1 for _ in rows_of(sys.argv[1]))
# Not ru_maxrss: that begins with what the parent held when it forked.
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
print(count, int(peak) // 1024)
"""


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    used = []
    for count in (300, 6000):
        rows = [{"n": n, "text": f"{n} " * 4000} for n in range(1000, 1000 + count)]
        path = tmp_path / f"{count}.{ending}"  # 20 kB a row, 120 MB in the end
        if ending == "json":
            path.write_text(json.dumps(rows))
        else:
            write_parquet(path, rows, row_group_size=100, compression="none")
        command = [sys.executable, "-c", READ, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found, megabytes = map(int, done.stdout.split())
        assert found == count
        used.append(megabytes)
    assert used[1] - used[0] < 24, used


def test_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder of this name for the data set, so the real reader runs."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name" / "data"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-00000-of-00001.parquet", ROWS[:300])
    total, rows = hub_rows("owner/name")
    assert total in (0, 300)
    found = list(rows)
    assert [row for _, row in found] == ROWS[:300]
    assert found[-1][0] == "owner/name, row 300"
    with pytest.raises(
        ValueError, match=r"^owner/name: the hub gives no rows \(.*name their folder instead"
    ):
        hub_rows("owner/name", split="test")


def test_a_missing_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", ROWS[:1])
    for name in ("datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"need `datasets`, .*; pip install 'rmr1\[data\]'"):
        hub_rows("owner/name")
    with pytest.raises(ValueError, match=r"need pyarrow, .*; pip install 'rmr1\[data\]'"):
        next(parquet_rows(path))
