"""The best of RMB's lists by tournament: who is picked, resuming, ranks, figures."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from benchmark_judges import (
    LISTS,
    Judge,
    knows,
    making,
    rmb_list,
    rmb_pair,
    rows_of,
    says_a,
    write_json,
)

from rmr1.answers import CutShort
from rmr1.cli import main
from rmr1.engine.launch import Launch
from rmr1.evals.best_of_n_run import pick_best
from rmr1.evals.rmb_items import load_rmb


def dataset(tmp_path: Path, count: int = 4, losers: int = 3) -> Any:
    rows = [rmb_list(number, losers) for number in range(count)]
    return load_rmb(write_json(tmp_path / "BoN_set/x/y.json", rows))


@pytest.mark.parametrize(("method", "each"), [("round_robin", 6), ("knockout", 3)])
def test_who_knows_picks_right(tmp_path: Path, method: Any, each: int) -> None:
    told: list[tuple[int, int]] = []
    judge = Judge()
    found = pick_best(
        judge, dataset(tmp_path), making(), method=method, output=tmp_path / "j.jsonl",
        batch_size=2, progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert found is not None
    assert (found["lists"], found["picked_right"], found["by_chance"]) == (4, 1.0, 0.25)
    assert found["comparisons"] == 4 * each == len(judge.prompts)
    assert found["categories"] == {LISTS: 1.0}
    low, high = found["interval"]
    assert low < high == 1.0
    assert told[0] == (0, 4)
    assert told[-1] == (4, 4)
    assert sorted(told) == told
    assert len(told) > 4 * each // 2  # told after every batch of two comparisons
    assert (found["resumed"], found["parse_failures"]) == (0, {})
    again = pick_best(
        judge, dataset(tmp_path), making(), method=method, output=tmp_path / "j.jsonl"
    )
    assert again == found | {"resumed": 4 * each}
    assert len(judge.prompts) == 4 * each  # nothing was asked again


def test_who_goes_by_position_picks_by_chance(tmp_path: Path) -> None:
    """In a round robin everybody is first as often, so all share the first place."""
    found = pick_best(
        Judge(says_a), dataset(tmp_path, 30, 4), making(), method="round_robin",
        output=tmp_path / "j.jsonl",
    )  # fmt: skip
    assert found is not None
    assert found["picked_right"] == pytest.approx(found["by_chance"]) == pytest.approx(0.2)
    unread = pick_best(
        Judge(lambda *_: "?"), dataset(tmp_path), making(), method="round_robin",
        output=tmp_path / "k.jsonl",
    )  # fmt: skip
    assert unread is not None
    assert (unread["picked_right"], unread["undecided"]) == (0.25, 24)
    assert unread["parse_failures"] == {"NO_TYPE": 24}


def test_a_judge_that_gives_up_loses_nothing(tmp_path: Path) -> None:
    class GivesUp(Judge):
        """After five answers."""

        def answer(self, chats: Any, sampling: Any, *, progress: Any = None) -> Any:
            replies = super().answer(chats, sampling, progress=progress)
            raise CutShort("it is down", [*replies[:5], *[None] * (len(replies) - 5)])

    data, output = dataset(tmp_path), tmp_path / "j.jsonl"
    with pytest.raises(ValueError, match="it is down"):
        pick_best(GivesUp(), data, making(), method="round_robin", output=output)
    assert len(rows_of(output)) == 5
    judge = Judge()
    found = pick_best(judge, data, making(), method="round_robin", output=output)
    assert found is not None
    assert len(judge.prompts) == 24 - 5
    with pytest.raises(ValueError, match='field "seed" is 0, but this run has 1'):
        pick_best(judge, data, making(seed=1), method="round_robin", output=output)
    other = load_rmb(
        write_json(tmp_path / "other/y.json", [rmb_list(0, bon_best={"answer": "another"})])
    )
    with pytest.raises(ValueError, match='field "content" is'):
        pick_best(judge, other, making(), method="round_robin", output=output)


def test_ranks_share_the_lists(tmp_path: Path) -> None:
    data, output = dataset(tmp_path, 5), tmp_path / "j.jsonl"
    judges = Judge(), Judge()
    second, first = (
        pick_best(
            judges[rank],
            data,
            making(),
            method="knockout",
            output=output,
            place=Launch(rank, 2, rank, "localhost", 1),
        )
        for rank in (1, 0)
    )
    assert second is None
    assert first is not None
    assert (first["lists"], first["picked_right"]) == (5, 1.0)
    assert [len(judge.prompts) for judge in judges] == [9, 6]  # of three lists, and of two
    assert len(rows_of(output)) == 15


def test_a_job_that_was_cut_off_is_no_share_of_one_with_other_ranks(tmp_path: Path) -> None:
    """Of three ranks two had finished; the first of two must not take that for its second."""
    data, output = dataset(tmp_path, 6), tmp_path / "j.jsonl"

    def rank(number: int, size: int) -> Any:
        place = Launch(number, size, number, "localhost", 1)
        return pick_best(Judge(), data, making(), method="knockout", output=output, place=place)

    assert [rank(1, 3), rank(2, 3)] == [None, None]
    waits = threading.Thread(target=rank, args=(0, 2), daemon=True)
    waits.start()
    waits.join(3)
    assert waits.is_alive()  # for a second rank of two
    assert output.with_name("j.rank2.jsonl").exists()
    rank(1, 2)
    waits.join(30)
    assert not waits.is_alive()
    assert len(rows_of(output)) == 18
    assert not list(tmp_path.glob("j.rank*"))


def test_lists_of_one_question_vary_together(tmp_path: Path) -> None:
    """A judge that is right about some questions: 8 lists of 2 questions tell less than of 8."""

    def knows_some(first: str, second: str, sample: int) -> str:
        even = int(first.split()[1]) % 2 == 0
        return knows(first, second) if even else knows(second, first)

    rows = [rmb_list(number, 3) for number in range(8)]
    asked = [row["conversation_input"] for row in rows]
    two = [row | {"conversation_input": asked[k % 2]} for k, row in enumerate(rows)]
    widths = []
    for name, own in (("eight", rows), ("two", two)):
        data = load_rmb(write_json(tmp_path / name / "BoN_set/x/y.json", own))
        output = tmp_path / f"{name}.jsonl"
        found = pick_best(Judge(knows_some), data, making(), method="knockout", output=output)
        assert found is not None
        assert found["picked_right"] == 0.5
        widths.append(found["interval"][1] - found["interval"][0])
    assert widths[1] > 1.2 * widths[0]
    # Every list has its own lots.
    drawn = {(row["id"], row["first"], row["second"]) for row in rows_of(tmp_path / "eight.jsonl")}
    starts = {
        tuple(sorted(one[1:] for one in drawn if one[0] == name)) for name, *_ in sorted(drawn)
    }
    assert len(starts) > 2


def test_an_empty_answer_and_a_conversation_that_ends_with_the_assistant_are_judged(
    tmp_path: Path,
) -> None:
    """As in `eval rmb` itself."""
    row = rmb_list(0, 2, bon_best={"answer": ""})
    data = load_rmb(write_json(tmp_path / "BoN_set/x/y.json", [row]))
    found = pick_best(
        Judge(says_a), data, making(), method="round_robin", output=tmp_path / "j.jsonl"
    )
    assert found is not None
    assert found["comparisons"] == 3


def test_ctrl_c_keeps_what_came(tmp_path: Path) -> None:
    class Interrupted(Judge):
        """After two answers."""

        def answer(self, chats: Any, sampling: Any, *, progress: Any = None) -> Any:
            replies = super().answer(chats, sampling, progress=progress)
            kept = [*replies[:2], *[None] * (len(replies) - 2)]
            raise CutShort("interrupted", kept, interrupted=True)

    output = tmp_path / "j.jsonl"
    with pytest.raises(KeyboardInterrupt):
        pick_best(Interrupted(), dataset(tmp_path), making(), method="knockout", output=output)
    assert len(rows_of(output)) == 2


def test_what_is_no_list_or_no_comparison(tmp_path: Path) -> None:
    pairs = load_rmb(write_json(tmp_path / "pairs.json", [rmb_pair(0)]))
    with pytest.raises(ValueError, match="hold no best-of-n lists"):
        pick_best(Judge(), pairs, making(), method="knockout", output=tmp_path / "j.jsonl")
    output = tmp_path / "k.jsonl"
    output.write_text('{"benchmark": "rmb", "id": "x"}\n')
    with pytest.raises(ValueError, match=r"k\.jsonl, line 1: no comparison of a best-of-n run"):
        pick_best(Judge(), dataset(tmp_path), making(), method="knockout", output=output)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "BoN_set/x/y.json", [rmb_list(number, 2) for number in range(2)])
    args = ["eval", "rmb", "--data", str(tmp_path / "BoN_set"), "--model", "pocket"]
    args += ["--prompt_style", "compact", "--max_new_tokens", "48", "--best_of_n", "knockout"]
    args += ["--output", str(tmp_path / "j.jsonl")]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lists"], found["comparisons"]) == (2, 4)
    assert main(args) == 0
    assert "the best of a list by knockout" in capsys.readouterr().out
    assert main([*args, "--both_orders"]) == 2
    assert "--best_of_n goes with eval rmb" in capsys.readouterr().err
