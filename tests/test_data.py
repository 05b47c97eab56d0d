"""Pairs and their files: what goes in comes out, and every bad line is named."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmr1.data import Message, Pair, pair_from_row, read_pairs, shuffled_epochs, write_pairs

GOOD: dict[str, Any] = {
    "id": "p1",
    "source": "mine",
    "conversation": [{"role": "user", "content": "Why?"}],
    "answer_a": "Because.",
    "answer_b": "No idea.",
    "label": "A",
    "kind": "chat",
}
QUICK = settings(max_examples=40, deadline=None)
# Among other letters: emoji with joiners and skin tones, CJK, right-to-left, line separators that
# str.splitlines takes for line ends, NUL and DEL.
LETTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from('🙂👩‍🔬👍🏽日本語한국어שלום\u2028\u2029\x85\x00\x7f\r\n\t"\\'),
)
TEXTS = st.text(LETTERS, max_size=20)
# "Non-empty" is more than blanks.
FILLED = TEXTS.filter(lambda text: bool(text.strip()))


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=3))
    turns: list[Message] = [
        {"role": role, "content": draw(TEXTS)}  # type: ignore[typeddict-item]
        for role in [*roles, "user"]
    ]
    return Pair(
        id=draw(FILLED),
        source=draw(FILLED),
        conversation=tuple(turns),
        answer_a=draw(FILLED),
        answer_b=draw(FILLED),
        label=draw(st.sampled_from(["A", "B"])),
        kind=draw(st.sampled_from(["chat", "reasoning"])),
        trace=draw(TEXTS),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@QUICK
@given(st.lists(pairs(), min_size=1, max_size=4, unique_by=lambda pair: pair.id))
def test_pairs_survive_a_file(folder: Path, written: list[Pair]) -> None:
    path = folder / "new" / "pairs.jsonl"
    assert write_pairs(path, written) == len(written)
    assert read_pairs(path) == written


def test_a_full_disk_leaves_the_old_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = Pair("1", "s", ({"role": "user", "content": "q"},), "a", "b", "A", "chat")
    write_pairs(path, [pair])
    write_text = Path.write_text

    def fills_up(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fills_up)
        with pytest.raises(OSError, match="No space left"):
            write_pairs(path, [pair, pair])
    assert read_pairs(path) == [pair]
    assert [one.name for one in tmp_path.iterdir()] == ["pairs.jsonl"]


@QUICK
@given(pairs())
def test_swapping_exchanges_answers_and_label(pair: Pair) -> None:
    swapped = pair.swapped()
    assert (swapped.answer_a, swapped.answer_b) == (pair.answer_b, pair.answer_a)
    assert {swapped.label, pair.label} == {"A", "B"}
    assert swapped.trace == ""
    assert swapped.swapped() == replace(pair, trace="")


def test_blank_lines_and_unknown_fields_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"\n  \n{json.dumps({**GOOD, 'mine': 1})}\r\n\n", encoding="utf-8")
    assert [pair.id for pair in read_pairs(path)] == ["p1"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n", encoding="utf-8-sig")
    assert [pair.id for pair in read_pairs(path)] == ["p1"]
    path.write_text(f"\n\ufeff{json.dumps(GOOD)}\n", encoding="utf-8")  # in the first line only
    assert "line 2: no JSON" in message(path)


def test_pairs_are_written_by_the_ending_of_the_name(tmp_path: Path) -> None:
    pair = pair_from_row(GOOD)
    for name in ("pairs.jsonl", "pairs.parquet"):
        assert write_pairs(tmp_path / "new" / name, [pair]) == 1
        assert read_pairs(tmp_path / "new" / name) == [pair]


def message(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked by the caller
        read_pairs(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "field", "got"),
    [
        ({"label": "C"}, '"label" must be "A" or "B"', "'C'"),
        ({"label": "a"}, '"label"', "'a'"),
        ({"label": None}, '"label"', "None"),
        ({"label": ["A"]}, '"label"', "['A']"),
        ({"kind": "math"}, '"kind" must be "chat" or "reasoning"', "'math'"),
        ({"answer_a": ""}, '"answer_a" must be a non-empty text', "''"),
        ({"answer_b": " \n\t"}, '"answer_b" must be a non-empty text', "' \\n\\t'"),
        ({"answer_b": 7}, '"answer_b"', "7"),
        ({"answer_a": "half \ud83d"}, '"answer_a" holds half a surrogate pair', "character 5"),
        ({"id": ""}, '"id"', "''"),
        ({"source": None}, '"source"', "None"),
        ({"trace": 3}, '"trace" must be a text', "3"),
        ({"trace": False}, '"trace" must be a text', "False"),
        ({"conversation": []}, '"conversation" must be a non-empty list', ""),
        ({"conversation": "Why?"}, '"conversation" must be a non-empty list', ""),
        ({"conversation": ["Why?"]}, '"conversation[0]" must be an object', ""),
        ({"conversation": [{"role": "human", "content": "x"}]}, '"conversation[0].role"', "human"),
        ({"conversation": [{"content": "x"}]}, '"conversation[0].role"', "None"),
        (
            {"conversation": [GOOD["conversation"][0], {"role": "user", "content": 5}]},
            '"conversation[1].content" must be a text',
            "5",
        ),
        (
            {"conversation": [{"role": "assistant", "content": "x"}]},
            '"conversation" must end with a user turn',
            "",
        ),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(
    tmp_path: Path, change: dict[str, Any], field: str, got: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, **change})}\n")
    told = message(path)
    assert told.startswith(f"{path}, line 3: field {field}")
    assert got in told


@pytest.mark.parametrize("field", [*GOOD])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({key: value for key, value in GOOD.items() if key != field}))
    told = message(path)
    assert told.startswith(f'{path}, line 1: field "{field}" is missing')
    found = told.split("found ")[1]
    assert field not in found  # what is there is listed, so a misspelt name shows
    assert all(key in found for key in GOOD if key != field)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "p2", ', "no JSON (.* at column 13)"),
        (b"id,answer", "no JSON (Expecting value at column 1)"),
        (b'["p2"]', "a row must be a JSON object, got list"),
        (b"[" * 100_000, "no JSON that can be read"),
        (b"1" * 5000, "no JSON that can be read"),
        (b'{"id": "caf\xe9"}', "the bytes are no UTF-8 (at byte 11 of the line)"),
        ('{"id": "é"}'.encode("utf-16"), "the bytes are no UTF-8"),
    ],
    ids=["torn", "csv", "list", "deep", "endless number", "latin-1", "utf-16"],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    told = message(path)
    assert told.startswith(f"{path}, line 2: ")
    before, _, after = reason.partition(".*")
    assert before in told
    assert after in told
    assert len(told) < 400  # the line itself is not repeated


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "holds no pairs" in message(tmp_path / "empty.jsonl")
    assert "no such file" in message(tmp_path / "absent.jsonl")


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for path, told in [
        (tmp_path / "folder.jsonl", "is a folder"),
        (tmp_path / "pipe.jsonl", "is a pipe"),
        (Path("/dev/null"), "is a device or a socket"),
        (tmp_path / "link.jsonl", "no such file"),
    ]:
        assert message(path) == f"{path}: {told}; give the path of a JSONL file"


def test_a_repeated_id_is_named_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [GOOD, {**GOOD, "id": "p2"}, {**GOOD, "source": "other"}]
    path.write_text("\n" + "\n".join(map(json.dumps, rows)))
    assert f"{path}, line 4: field \"id\" is 'p1', as in line 2; give each" in message(path)


def test_a_row_is_what_asdict_gives() -> None:
    pair = pair_from_row(GOOD)
    assert pair.trace == ""
    assert pair_from_row({**GOOD, "trace": None}) == pair
    assert pair_from_row(json.loads(json.dumps(asdict(pair)))) == pair


def test_a_parquet_column_of_traces_may_have_gaps(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**GOOD, "id": "a", "trace": "because"}, {**GOOD, "id": "b", "trace": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert [pair.trace for pair in read_pairs(tmp_path / "pairs.parquet")] == ["because", ""]


def test_epochs_hold_every_row_once_and_resume() -> None:
    rows = list(range(7))
    drawn = list(islice(shuffled_epochs(rows, 3), 21))
    epochs = [drawn[:7], drawn[7:14], drawn[14:]]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(islice(shuffled_epochs(rows, 3), 10, 21)) == drawn[10:]
    assert list(islice(shuffled_epochs(rows, 4), 21)) != drawn
