"""A judge on files, several answers ranked, and what a person sees of a judgment."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rmr1.best_of_n import rank
from rmr1.cli import main
from rmr1.data import Message, Pair
from rmr1.judge import Judge, pair_of
from rmr1.judge_file import judge_file
from rmr1.judgment_log import appending
from rmr1.judgment_view import to_json, view
from rmr1.models import POCKET
from rmr1.tasks.catalog import draw_pairs

CHAT = (
    "<type>Chat</type>\n<rubric>\n1. Right (60%)\n2. Short (40%)\n<justify>They asked.</justify>\n"
    "</rubric>\n<eval>\n<quote_A>The Nile is long.</quote_A> <quote_B>made up by me</quote_B>\n"
    "</eval>\n<answer>[[A]]</answer>"
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=160)


def test_a_judgment_is_taken_apart() -> None:
    shown = pair_of("Which?", "The Nile  is\nlong.", "No idea.")
    found = view(CHAT, shown)
    assert found.task_type == "chat"
    assert [(one.text, one.weight) for one in found.rubric] == [
        ("Right (60%)", 0.6), ("Short (40%)", 0.4),
    ]  # fmt: skip
    assert found.justification == "They asked."
    assert [(one.answer, one.found) for one in found.quotes] == [("A", True), ("B", False)]
    assert view("<type>Reasoning</type><solution> x </solution>", shown).solution == "x"
    assert view("", shown).rubric == ()


def comparisons(count: int) -> list[dict[str, Any]]:
    pairs = draw_pairs(count, seed=5, split="train")
    return [
        {"id": one.id, "prompt": one.conversation[0]["content"], "answer_a": one.answer_a,
         "answer_b": one.answer_b}
        for one in pairs
    ]  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_goes_on_where_it_was_cut(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmr1.judge_file.BATCH", 2)
    source = write(tmp_path / "in.jsonl", comparisons(5))
    whole = tmp_path / "whole.jsonl"
    told: list[tuple[int, int]] = []
    count = judge_file(judge, source, whole, progress=lambda done, all_: told.append((done, all_)))
    assert count == (5, 0)
    assert told[0] == (0, 5)
    assert {(2, 5), (4, 5), (5, 5)} < set(told)
    assert sorted(told) == told
    assert max(done for done, _ in told) == 5
    assert [row["id"] for row in read(whole)] == [row["id"] for row in comparisons(5)]
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[:3]) + '{"id": "tr')
    assert judge_file(judge, source, cut) == (2, 0)
    assert [row["verdict"] for row in read(cut)] == [row["verdict"] for row in read(whole)]
    assert judge_file(judge, source, cut) == (0, 0)
    with pytest.raises(ValueError, match="line 1: no judgment of row 1 of this input"):
        judge_file(judge, write(tmp_path / "other.jsonl", comparisons(7)[3:]), cut)


def test_no_two_comparisons_draw_alike_wherever_a_batch_begins(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", comparisons(1) * 6)
    whole = tmp_path / "whole.jsonl"
    judge_file(judge, source, whole, votes=8, swap=True)
    texts = [tuple(one["text"] for one in row["judgments"]) for row in read(whole)]
    assert len(set(texts)) == 6
    monkeypatch.setattr("rmr1.judge_file.BATCH", 2)
    parts = tmp_path / "parts.jsonl"
    parts.write_text("".join(whole.read_text().splitlines(keepends=True)[:3]))
    assert judge_file(judge, source, parts, votes=8, swap=True) == (3, 0)
    assert parts.read_bytes() == whole.read_bytes()


def test_what_something_else_made_is_not_taken_over(judge: Judge, tmp_path: Path) -> None:
    rows = comparisons(3)
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    judge_file(judge, source, output)
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:2]))
    before = output.read_text()
    with pytest.raises(ValueError, match="line 1: samples is 1, but this run has 3; give another"):
        judge_file(judge, source, output, votes=3)
    with pytest.raises(ValueError, match="swap is False, but this run has True"):
        judge_file(judge, source, output, swap=True)
    other = Judge(POCKET, style="rubric", max_new_tokens=160)
    with pytest.raises(ValueError, match="prompt_hash is "):
        judge_file(other, source, output)
    edited = [rows[0], {**rows[1], "answer_a": "another text"}, rows[2]]
    with pytest.raises(ValueError, match="line 2: content is "):
        judge_file(judge, write(source, edited), output)
    with appending(output), pytest.raises(ValueError, match="another process is writing"):
        judge_file(judge, source, output)
    assert output.read_text() == before
    assert read(output)[0]["model"].startswith("pocket@")


def test_a_row_that_is_too_long_does_not_hold_up_the_others(judge: Judge, tmp_path: Path) -> None:
    rows = comparisons(4)
    rows[2]["answer_b"] = "word " * 3000
    output = tmp_path / "out.jsonl"
    assert judge_file(judge, write(tmp_path / "in.jsonl", rows), output) == (4, 1)
    found = read(output)
    assert [row.get("skipped", "") for row in found] == ["", "", "prompt_too_long", ""]
    assert found[2]["verdict"] is None
    assert all(found[number]["text"] for number in (0, 1, 3))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["--output", "x.jsonl", "--prompt", "p", "--answer_a", "1", "--answer_b", "2"],
            "--json >",
        ),
        (["--prompt", "p", "--answers", "x.json", "--answer_b", "2"], "not both"),
        (["--input", "i", "--output", "o", "--json"], "drop --json"),
        (["--prompt", "p", "--answer_a", "", "--answer_b", "2"], "neither of them empty"),
    ],
)
def test_an_argument_that_would_do_nothing_is_refused(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", "--model", "pocket", *args]) == 2
    assert told in capsys.readouterr().err


def test_pairs_and_conversations_are_comparisons_too(judge: Judge, tmp_path: Path) -> None:
    pair = draw_pairs(1, seed=0, split="train")[0]
    turns: list[Message] = [
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "2 + 2?"},
    ]  # fmt: skip
    rows = [asdict(pair), {"prompt": turns, "answer_a": "4", "answer_b": "5"}]
    rows += [{"prompt": None, "conversation": turns, "answer_a": "4", "answer_b": "5"}]
    output = tmp_path / "out.jsonl"
    judge_file(judge, write(tmp_path / "in.jsonl", rows), output, votes=2, swap=True)
    first, second, third = read(output)
    assert (third["id"], len(third["judgments"])) == (3, 4)
    assert (first["id"], second["id"]) == (pair.id, 2)
    assert len(first["judgments"]) == 4


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "found prompt, chosen, rejected"),
        ({"answer_a": "a", "answer_b": "b"}, r"wanted prompt \(or conversation\)"),
        ({"prompt": 3, "answer_a": "a", "answer_b": "b"}, "prompt must be a text or a list"),
        ({"prompt": "x", "answer_a": "a", "answer_b": 5}, '"answer_b" must be a non-empty text'),
        ([1], "must be a JSON object"),
    ],
)
def test_a_row_that_is_no_comparison(judge: Judge, tmp_path: Path, row: Any, told: str) -> None:
    source = write(tmp_path / "in.jsonl", [comparisons(1)[0], row])
    with pytest.raises(ValueError, match=f"in.jsonl, line 2: .*{told}"):
        judge_file(judge, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


class Prefers:
    """A judge's model that likes the longer answer, and ties none."""

    def answer(self, chats: Any, sampling: Any, *, progress: Any = None) -> Any:
        from rmr1.answers import Reply

        replies = []
        for chat in chats:
            _, _, rest = chat[-1]["content"].partition("[Answer A]\n")
            a, _, b = rest.partition("\n[Answer B]\n")
            better = "A" if len(a) > len(b.removesuffix("\n[End]")) else "B"
            replies.append([Reply(f"<answer>[[{better}]]</answer>", 9, 3, "stop")] * sampling.n)
        return replies


@pytest.mark.parametrize("method", ["round_robin", "knockout"])
def test_answers_are_ranked(judge: Judge, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "model", Prefers())
    answers = ["ab", "abcde", "a", "abcd", "abc"]
    found = rank(judge, "Which?", answers, method=method, swap=True)
    assert found.best == 1
    told = found.to_json(answers)
    assert told["ranking"][0] == {
        "place": 1, "wins": told["ranking"][0]["wins"], "index": 1, "answer": "abcde",
    }  # fmt: skip
    if method == "round_robin":
        assert found.order == (1, 3, 4, 0, 2)
        assert told["comparisons"] == 10
    else:
        assert told["comparisons"] == 4
    with pytest.raises(ValueError, match="at least two answers"):
        rank(judge, "Which?", ["one"])


MODEL = ["--model", "pocket", "--prompt_style", "compact", "--max_new_tokens", "160"]


def test_what_a_person_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (pair,) = draw_pairs(1, seed=0, split="train")
    asked = ["--prompt", pair.conversation[0]["content"]]
    both = ["--answer_a", pair.answer_a, "--answer_b", pair.answer_b]
    assert main(["judge", *MODEL, *asked, *both, "--votes", "2", "--swap", "--whole"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Verdict: ")
    assert "Votes of 4: " in out
    assert "judgment 4, answers exchanged" in out
    Path("answers.json").write_text(json.dumps([pair.answer_a, pair.answer_b, "I, say, 42"]))
    assert main(["judge", *MODEL, *asked, "--answers", "answers.json"]) == 0
    out = capsys.readouterr().out
    assert "Place  Wins  Answer" in out
    assert "2: I, say, 42" in out
    write(Path("in.jsonl"), comparisons(2))
    files = ["--input", "in.jsonl", "--output", "out/judged.jsonl"]
    assert main(["judge", *MODEL, *files]) == 0
    assert "2 judged, out/judged.jsonl" in capsys.readouterr().err
    assert len(read(Path("out/judged.jsonl"))) == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "judge needs --prompt, or --input and --output"),
        (["--prompt", "x", "--answer_a", "a"], "judge needs --answer_a and --answer_b, neither"),
        (["--answer_a", "a", "--answer_b", "b"], "needs --prompt"),
        (["--input", "x.jsonl"], "needs --output"),
        (["--input", "x.jsonl", "--output", "y", "--prompt", "p"], "no prompt or answers beside"),
        (["--prompt", "x", "--answers", "none.json"], "none.json: cannot be read"),
        (["--prompt", "x", "--answers", "bad.json"], "bad.json: wanted a JSON list of texts"),
        (["--prompt", "x", "--answers", "empty.json"], "empty.json: answer 1 (counted from 0) is"),
        (["--input", "none.jsonl", "--output", "y"], "none.jsonl: no such file"),
    ],
)
def test_wrong_use(
    args: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"a": 1}')
    Path("empty.json").write_text(
        '\ufeff["a", " "]', encoding="utf-8"
    )  # with a mark, as of Windows
    assert main(["judge", *MODEL, *args]) == 2
    assert told in capsys.readouterr().err


def test_an_answer_that_reads_unset_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--prompt", "What is an option's value by default?", "--answer_a", "unset"]
    assert main(["judge", *MODEL, *args, "--answer_b", "set", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] in ("A", "B", "tie", None)


def test_everything_a_program_needs(judge: Judge) -> None:
    pair = Pair("p", "s", ({"role": "user", "content": "2 + 2?"},), "4", "5", "A", "reasoning")
    found = judge.compare("2 + 2?", "4", "5", votes=2)
    told = to_json(found, pair)
    assert told["votes"] == found.votes
    assert told["usage"]["completion_tokens"] == found.new_tokens
    assert json.loads(json.dumps(told)) == told
