"""Pairs in both placements with a log: what came is kept, what is kept is not asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_judges import Judge, rows_of

from rmr1.answers import CutShort, Reply
from rmr1.cli import main
from rmr1.data import Pair, write_pairs
from rmr1.engine.sampling import SamplingParams
from rmr1.judge import Judgment
from rmr1.pair_judging import PairLog, judge_both_orders
from rmr1.prompts import load_prompt

PROMPT = load_prompt("compact")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, seed=3)


def pairs(count: int, good: str = "right") -> list[Pair]:
    asked = ({"role": "user", "content": "?"},)
    return [
        Pair(f"p{number}", "x", asked, f"{good} {number}", f"wrong {number}", "A", "chat")  # type: ignore[arg-type]
        for number in range(count)
    ]


class Fails(Judge):
    """Leaves out the chats with these texts, for a reason that passes or not."""

    def __init__(self, *without: str, **reason: bool) -> None:
        super().__init__()
        self.without, self.reason = without, reason

    def answer(self, chats: Any, sampling: Any, *, progress: Any = None) -> list[list[Reply]]:
        replies = super().answer(chats, sampling, progress=progress)
        kept = [
            None if any(one in chat[-1]["content"] for one in self.without) else own
            for chat, own in zip(chats, replies, strict=True)
        ]
        if None in kept:
            raise CutShort("it failed", kept, **self.reason)
        return replies


def judged(
    judge: Judge, of: Sequence[Pair], log: PairLog | None = None, **more: Any
) -> list[Judgment]:
    return judge_both_orders(
        judge, of, prompt=PROMPT, sampling=GREEDY, log=log, batch_size=4, **more
    )


def test_what_came_is_kept_and_not_asked_again(tmp_path: Path) -> None:
    log = PairLog(tmp_path / "j.partial", {"model": "m", "seed": 3})
    told: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match=r"2 judgments are missing: it failed; run the same again"):
        judged(Fails("right 3", passing=True), pairs(6), log)
    assert len(rows_of(log.path)) == 10  # the batches behind it were asked as well
    with pytest.raises(KeyboardInterrupt):
        judged(Fails("right 3", interrupted=True), pairs(6), log)
    again = Judge()
    found = judged(again, pairs(6), log, progress=lambda done, all_: told.append((done, all_)))
    assert len(again.prompts) == 2
    assert (told[0], told[-1]) == ((10, 12), (12, 12))
    assert found == judged(Judge(), pairs(6))
    assert [(one.id, one.placement) for one in found[:3]] == [
        ("p0", "ab"),
        ("p0", "ba"),
        ("p1", "ab"),
    ]


def test_a_failure_that_does_not_pass_ends_it_and_keeps_what_came(tmp_path: Path) -> None:
    log = PairLog(tmp_path / "j.partial", {})
    judge = Fails("right 1")
    with pytest.raises(ValueError, match=r"^it failed$"):
        judged(judge, pairs(6), log)
    assert (len(judge.prompts), len(rows_of(log.path))) == (4, 2)
    with pytest.raises(ValueError, match="give --output FILE"):
        judged(Fails("right 1", passing=True), pairs(6))


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.partial"
    judged(Judge(), pairs(2), PairLog(path, {"model": "m"}))
    with pytest.raises(ValueError, match="line 1: model is 'm', but this run has 'n'"):
        judged(Judge(), pairs(2), PairLog(path, {"model": "n"}))
    with pytest.raises(ValueError, match="line 1: content is"):
        judged(Judge(), pairs(2, good="fine"), PairLog(path, {"model": "m"}))
    with pytest.raises(ValueError, match="line 3: no judgment of these pairs"):
        judged(Judge(), pairs(1), PairLog(path, {"model": "m"}))


def test_a_kept_judgment_counts_where_its_pair_stands_now(tmp_path: Path) -> None:
    """Families can be named anew without judging again."""
    log = PairLog(tmp_path / "j.partial", {})
    judged(Judge(), pairs(2), log)
    idle = Judge()
    found = judged(idle, [replace(pair, source="y", kind="reasoning") for pair in pairs(2)], log)
    assert idle.prompts == []
    assert {(one.source, one.kind) for one in found} == {("y", "reasoning")}


def test_batches_draw_differently(tmp_path: Path) -> None:
    judge = Judge()
    judged(judge, pairs(6), PairLog(tmp_path / "j.partial", {}))
    seeds = [one.seed for one in judge.samplings]
    assert (len(set(seeds)), seeds[0]) == (3, 3)


def test_the_command_goes_on_and_leaves_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    write_pairs(source, pairs(3))
    asked: list[int] = []
    judge = Fails("right 2", interrupted=True)

    def answer(_: Any, chats: Any, sampling: Any, *, progress: Any = None) -> Any:
        asked.append(len(chats))
        return judge.answer(chats, sampling, progress=progress)

    monkeypatch.setattr("rmr1.endpoints.remote_model.RemoteModel.answer", answer)
    args = ["eval", "pairs", "--data", str(source), "--endpoint.model", "m", "--prompt_style"]
    args += ["compact", "--output", str(output)]
    assert main(args) == 130
    assert "rmr1: stopped; the same command goes on" in capsys.readouterr().err
    assert not output.exists()
    judge.without = ()
    assert main(args) == 0
    assert asked == [6, 2]
    assert len(rows_of(output)) == 6
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out.jsonl", "pairs.jsonl"]
    assert main([*args[:-1], str(source)]) == 2  # the data are not written over
    assert len(rows_of(source)) == 3
