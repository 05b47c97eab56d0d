"""The best of RMB's lists by tournament: who is picked, resuming, ranks, figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_judges import (
    LISTS,
    Judge,
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
    assert told == [(2, 4), (4, 4)]
    again = pick_best(
        judge, dataset(tmp_path), making(), method=method, output=tmp_path / "j.jsonl"
    )
    assert again == found
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
    assert len(judges[0].prompts) + len(judges[1].prompts) == 15 == len(rows_of(output))


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
