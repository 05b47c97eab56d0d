"""Ranks judge shares, talk through a folder, and never wait for ever."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_judges import (
    Judge,
    making,
    rewardbench_row,
    rm_bench_folder,
    rows_of,
    run,
    write_json,
)

from rmr1.cli import main
from rmr1.engine.launch import Launch
from rmr1.evals import benchmark_files
from rmr1.evals.benchmark_files import JudgmentFiles
from rmr1.evals.benchmark_items import Dataset
from rmr1.evals.benchmark_run import run_benchmark
from rmr1.evals.rm_bench_items import load_rm_bench


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_files, "BEAT", 0.02)
    monkeypatch.setattr(benchmark_files, "POLL", 0.01)
    monkeypatch.setattr(benchmark_files, "SILENCE", 0.5)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_rm_bench(rm_bench_folder(tmp_path / "data", chat=5, safety_refuse=2))


def rank(number: int, size: int) -> Launch:
    return Launch(number, size, number, "127.0.0.1", 1)


def together(dataset: Dataset, output: Path, judges: list[Judge], **options: Any) -> list[Any]:
    """All ranks in threads; what each returned or raised."""
    found: list[Any] = [None] * len(judges)

    def one(number: int) -> None:
        place = rank(number, len(judges))
        try:
            found[number] = run_benchmark(
                judges[number], dataset, making(), output=output, place=place, **options
            )
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(judges))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_shares_of_ranks_make_the_same_file_as_one_process(
    tmp_path: Path, dataset: Dataset
) -> None:
    alone = run(dataset, tmp_path / "alone.jsonl", both_orders=True)
    judges = [Judge(), Judge(), Judge()]
    done, *others = together(dataset, tmp_path / "j.jsonl", judges, both_orders=True, batch_size=4)
    assert others == [None, None]
    assert [len(judge.prompts) for judge in judges] == [3 * 18, 2 * 18, 2 * 18]
    assert done.output.read_bytes() == alone.output.read_bytes()
    assert done.score == alone.score
    assert done.judgments == 126
    assert [path.name for path in tmp_path.glob("j.*")] == ["j.jsonl"]


def test_another_number_of_ranks_goes_on(tmp_path: Path, dataset: Dataset) -> None:
    alone = run(dataset, tmp_path / "alone.jsonl")
    output = tmp_path / "j.jsonl"
    stopped = [Judge(stop_after=4), Judge(stop_after=8, stop_with=ValueError("no memory")), Judge()]
    first, second, third = together(dataset, output, stopped, batch_size=4)
    assert isinstance(first, KeyboardInterrupt)
    assert str(second) == "no memory"
    assert third is None
    there = sum(len(rows_of(path)) for path in tmp_path.glob("j.rank*.jsonl"))
    assert there == 4 + 8 + 18
    # A line that was cut off, in a file that no rank of the next job writes to.
    with (tmp_path / "j.rank2.jsonl").open("ab") as stream:
        stream.write(b'{"benchmark": "rm-b')
    judges = [Judge(), Judge()]
    done, _ = together(dataset, output, judges, batch_size=4)
    assert sum(len(judge.prompts) for judge in judges) == 63 - there
    assert done.output.read_bytes() == alone.output.read_bytes()
    # One process takes over what ranks have left.
    output.rename(tmp_path / "j.rank5.jsonl")
    idle = Judge()
    assert run(dataset, output, idle).score == alone.score
    assert idle.prompts == []
    assert output.read_bytes() == alone.output.read_bytes()


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(
    tmp_path: Path, dataset: Dataset
) -> None:
    with pytest.raises(ValueError, match=r"rank 1 of 2 has shown no sign of life in .* for 0 s"):
        run_benchmark(Judge(), dataset, making(), output=tmp_path / "j.jsonl", place=rank(0, 2))
    assert len(rows_of(tmp_path / "j.rank0.jsonl")) == 4 * 9
    assert not (tmp_path / "j.jsonl").exists()


def test_a_rank_that_fails_says_why(tmp_path: Path, dataset: Dataset) -> None:
    started = threading.Event()

    class Waits(Judge):
        def answer(self, *args: Any, **options: Any) -> Any:
            started.wait(5)
            return super().answer(*args, **options)

    class Fails(Judge):
        def answer(self, *args: Any, **options: Any) -> Any:
            started.set()
            threading.Event().wait(0.2)
            raise ValueError("the GPU fell off\nthe bus")

    first, second = together(dataset, tmp_path / "j.jsonl", [Waits(), Fails()])
    assert str(second).startswith("the GPU")
    assert str(first) == "rank 1 failed: the GPU fell off the bus; run the same again to go on"


def test_a_rank_that_failed_before_anybody_waited_says_why(
    tmp_path: Path, dataset: Dataset
) -> None:
    """The first rank is still judging its own share when the second ends."""

    class Begins(Judge):
        def answer(self, *args: Any, **options: Any) -> Any:
            thread.start()
            thread.join()
            return super().answer(*args, **options)

    def second() -> None:
        with pytest.raises(ValueError, match="out of memory"):
            run_benchmark(
                Judge(stop_after=0, stop_with=ValueError("out of memory")),
                dataset, making(), output=tmp_path / "j.jsonl", place=rank(1, 2),
            )  # fmt: skip

    for _ in range(2):  # the same words again are another failure
        thread = threading.Thread(target=second)
        (tmp_path / "j.rank0.jsonl").unlink(missing_ok=True)
        with pytest.raises(ValueError, match="rank 1 failed: out of memory; run the same again"):
            run_benchmark(
                Begins(), dataset, making(), output=tmp_path / "j.jsonl", place=rank(0, 2)
            )


def test_nobody_takes_away_the_file_of_a_rank_at_work(tmp_path: Path, dataset: Dataset) -> None:
    class Starts(Judge):
        def answer(self, *args: Any, **options: Any) -> Any:
            with pytest.raises(ValueError, match=r"rank1\.jsonl: another process is writing to it"):
                run(dataset, tmp_path / "j.jsonl")
            return super().answer(*args, **options)

    judge = Starts()
    run_benchmark(judge, dataset, making(), output=tmp_path / "j.jsonl", place=rank(1, 2))
    assert len(rows_of(tmp_path / "j.rank1.jsonl")) == len(judge.prompts) == 27


def test_signs_of_life_of_earlier_runs_do_not_count(tmp_path: Path, dataset: Dataset) -> None:
    output = tmp_path / "j.jsonl"
    (tmp_path / "j.rank1.alive").write_text("failed: long ago")
    done, _ = together(dataset, output, [Judge(), Judge()])
    assert done.score["overall"] == 1.0
    (tmp_path / "j.rank1.alive").write_text("finished something else")
    with pytest.raises(ValueError, match="no sign of life"):
        run_benchmark(Judge(), dataset, making(), output=output, place=rank(0, 2))


def test_a_slow_rank_is_waited_for_as_long_as_it_lives(tmp_path: Path, dataset: Dataset) -> None:
    class Slow(Judge):
        def answer(self, *args: Any, **options: Any) -> Any:
            threading.Event().wait(1.2)  # more than SILENCE
            return super().answer(*args, **options)

    done, _ = together(dataset, tmp_path / "j.jsonl", [Judge(), Slow()])
    assert done.score["n"] == 63


def test_lost_shares_are_noticed(tmp_path: Path, dataset: Dataset) -> None:
    files = JudgmentFiles(tmp_path / "j.jsonl", rank(0, 2))
    (tmp_path / "j.rank1.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="1 of 2 judgments are in no rank's file"):
        files.merge(lambda row: (str(row["id"]),), [("1",), ("2",)])
    assert (tmp_path / "j.rank1.jsonl").exists()


def test_two_runs_do_not_write_to_one_file(tmp_path: Path, dataset: Dataset) -> None:
    class Starts(Judge):
        def answer(self, *args: Any, **options: Any) -> Any:
            with pytest.raises(ValueError, match=r"j\.jsonl: another process is writing to it"):
                run(dataset, tmp_path / "j.jsonl")
            return super().answer(*args, **options)

    assert run(dataset, tmp_path / "j.jsonl", Starts()).score["duplicates"] == 0


def test_names_that_look_alike_are_other_runs(tmp_path: Path, dataset: Dataset) -> None:
    (tmp_path / "j.rank1.jsonl.bak").write_text("x")
    (tmp_path / "jj.rank1.jsonl").write_text("x\n")
    (tmp_path / "j.rankx.jsonl").write_text("x\n")
    assert run(dataset, tmp_path / "j.jsonl").score["n"] == 63


RANK = """
import sys
from pathlib import Path
from benchmark_judges import Judge, making
from rmr1.evals.benchmark_run import run_benchmark
from rmr1.cli import main
from rmr1.engine.launch import launched
from rmr1.evals.rm_bench_items import load_rm_bench
done = run_benchmark(
    Judge(), load_rm_bench(sys.argv[1]), making(), output=sys.argv[2], place=launched()
)
print(done and done.score["n"])
"""


def test_two_processes_as_a_launcher_starts_them(
    tmp_path: Path, dataset: Dataset, run_ranks: Callable[..., list[tuple[int, str, str]]]
) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path / "data"), "out.jsonl"]
    (code, out, err), (other, nothing, _) = run_ranks(
        command, 2, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path])
    )
    assert (code, other, out.strip(), nothing.strip()) == (0, 0, "63", "None"), err
    assert (tmp_path / "out.jsonl").read_bytes() == run(
        dataset, tmp_path / "alone.jsonl"
    ).output.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


def test_ranks_on_the_command_line(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [rewardbench_row(n, prompt="1 + 2 =", chosen="3", rejected="4") for n in range(5)]
    data = write_json(tmp_path / "r.json", rows)
    args = ["eval", "rewardbench", "--data", str(data), "--model", str(tiny_model), "--json"]
    args += ["--prompt_style", "compact", "--output", str(tmp_path / "out.jsonl")]
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(args) == 0
    assert capsys.readouterr().out == ""
    assert len(rows_of(tmp_path / "out.rank1.jsonl")) == 2
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 5
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == list(range(5))
