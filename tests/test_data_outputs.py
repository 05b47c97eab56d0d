"""`rmr1 data build`: files that appear whole or not at all, and memory that does not grow."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_builds import config, many, quiet, run, skywork, write_jsonl
from rich.console import Console

from rmr1.data import read_pairs
from rmr1.datasets.build import build
from rmr1.datasets.build_report import print_build

FILES = {
    "distill": "distill.jsonl",
    "rl": "rl.jsonl",
    "dropped": "no.jsonl",
    "report": "r.json",
}


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def old_files() -> None:
    many(50)
    for path in FILES.values():
        Path(path).write_text("old")


def assert_nothing_has_changed() -> None:
    assert {Path(path).read_text() for path in FILES.values()} == {"old"}
    assert sorted(path.name for path in Path().iterdir()) == sorted([*FILES.values(), "rows.jsonl"])


def test_parquet_in_and_out_is_the_same() -> None:
    rows = [skywork(n) for n in range(300)]
    write_jsonl("rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    run()
    run(source={"path": "rows.parquet"}, output={"rl": "rl.parquet"})
    assert read_pairs("rl.parquet") == read_pairs("rl.jsonl")


@pytest.mark.parametrize("at", ["Read sky", "Write distill.jsonl", "Write rl.jsonl"])
def test_an_interrupted_build_leaves_the_old_files(at: str) -> None:
    old_files()

    def stop(title: str, total: int, unit: str) -> Any:
        if title == at:
            raise KeyboardInterrupt
        return quiet(title, total, unit)

    with pytest.raises(KeyboardInterrupt):
        build(config(split={"distill": 9}, output=FILES), show=stop)
    assert_nothing_has_changed()


def test_a_report_that_cannot_be_written_leaves_the_old_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old_files()

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rmr1.datasets.build.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        run(split={"distill": 9}, output=FILES)
    assert_nothing_has_changed()


@pytest.mark.parametrize("key", FILES)
def test_a_folder_in_the_place_of_an_output_is_refused_before_the_work(key: str) -> None:
    many(50)
    (Path(key + ".jsonl") / "inside").mkdir(parents=True)

    def never(title: str, total: int, unit: str) -> Any:
        raise AssertionError(title)

    with pytest.raises(ValueError, match=rf"^output.{key}: {key}.jsonl is a folder; name a file$"):
        build(config(output=FILES | {key: f"{key}.jsonl"}), show=never)
    assert {path.name for path in Path().iterdir()} == {"rows.jsonl", f"{key}.jsonl"}


def test_an_empty_set_leaves_no_old_file() -> None:
    """The pairs that were distilled are for RL now, so the old file would hold them twice."""
    many(50)
    report = run(split={"distill": 5}, output={"distill": "distill.jsonl"})
    assert report.files == {"distill": "distill.jsonl", "rl": "rl.jsonl"}
    assert len(read_pairs("distill.jsonl")) == 5
    report = run(output={"distill": "distill.jsonl"})
    assert report.files == {"rl": "rl.jsonl"}
    assert len(read_pairs("rl.jsonl")) == 50
    assert not Path("distill.jsonl").exists()
    told = io.StringIO()
    print_build(report, console=Console(file=told, width=100))
    assert "(empty, no file)" in told.getvalue()


def test_two_builds_at_once_do_not_write_into_each_other() -> None:
    many(50)
    started = []

    def another(title: str, total: int, unit: str) -> Any:
        if title == "Write rl.jsonl" and not started:
            started.append(run(output=FILES, seed=1))
        return quiet(title, total, unit)

    build(config(output=FILES, seed=2), show=another)
    assert started
    last = read_pairs("rl.jsonl")
    run(output={"rl": "alone.jsonl"}, seed=2)
    assert last == read_pairs("alone.jsonl")
    assert json.loads(Path("r.json").read_text())["config"]["seed"] == 2


def test_sigterm_leaves_nothing_behind() -> None:
    many(20_000)
    args = ["--sources.sky.path", "rows.jsonl", "--sources.sky.format", "skywork"]
    args += ["--sources.sky.kind", "chat", "--output.dropped", "no.jsonl"]
    command = [sys.executable, "-m", "rmr1.cli", "data", "build", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(Path().glob(".no.jsonl.*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "rmr1: stopped" in err
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


MEASURE = """
import re
from contextlib import nullcontext
from rmr1.datasets.build import build
from rmr1.datasets.build_config import BuildConfig
from rmr1.terminal import Phase
config = BuildConfig.model_validate({
    "sources": {"a": {"path": "rows.jsonl", "format": "trl", "kind": "chat"}},
    "filters": {"near_duplicates": 0.9, "similar_by": "conversation"},
    "split": {"distill": 10}, "output": {"rl": "rl.jsonl", "distill": "d.jsonl"},
})
report = build(config, show=lambda *a: nullcontext(Phase(*a)))
# Not ru_maxrss: that begins with what the parent held when it forked.
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
print(sum(report.sets["rl"].values()), int(peak) // 1024)
"""


def test_memory_does_not_grow_with_the_data() -> None:
    used = []
    for count in (100, 2000):
        rows = [
            {"prompt": f"{n} {n**3} {n**5}", "chosen": f"{n} " * 1500, "rejected": f"{n}\n" * 1500}
            for n in range(1000, 1000 + count)
        ]  # 15 kB each, 30 MB in the end
        write_jsonl("rows.jsonl", rows)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        )
        kept, megabytes = map(int, done.stdout.split())
        assert kept == count - 10
        used.append(megabytes)
    assert used[1] - used[0] < 12, used  # SQLite's cache is 8


def test_memory_does_not_grow_with_the_values_of_source() -> None:
    used = []
    for count in (500, 15_000):
        rows = [
            {"prompt": f"{n}?", "chosen": "yes", "rejected": "no", "source": f"https://a.b/{n}"}
            for n in range(count)
        ]
        write_jsonl("rows.jsonl", rows)
        script = MEASURE.replace('"near_duplicates": 0.9, ', "")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        kept, megabytes = map(int, done.stdout.split())
        assert kept == count - 10
        used.append(megabytes)
    assert used[1] - used[0] < 12, used  # SQLite's cache is 8


def test_sources_beyond_fifty_are_one_line() -> None:
    """Those with most rows are shown, and what the config names, whatever the order of the rows."""
    rows = [skywork(n, f"many-{n % 3}") for n in range(60)]
    rows += [skywork(n, f"rare-{n}") for n in range(60, 200)]
    rows += [skywork(200, "rare-x", rejected=[]), skywork(201, "left")]
    source = {"expect": {"rare-60": 2}, "drop": ["left"]}
    shown = []
    for order in (rows, rows[::-1]):
        write_jsonl("rows.jsonl", order)
        report = run(source=source, split={"distill": 20}, output={"distill": "d.jsonl"})
        shown.append(report)
        assert report.mismatches == ["source rare-60 has 1 rows, expected 2 (sources.sky)"]
        assert len(report.sources) == 51
        assert {"many-0", "many-1", "many-2", "rare-60", "left"} <= set(report.sources)
        other = report.sources["(others)"]
        assert report.others == other.read == 145 - 50
        assert (other.dropped, other.kept) == ({"no assistant turn last": 1}, other.read - 1)
        assert sum(counts.read for counts in report.sources.values()) == 202
        assert sum(report.sets["rl"].values()) == len(read_pairs("rl.jsonl")) == 180
    assert shown[0].sources == shown[1].sources
    assert shown[0].sets == shown[1].sets
    told = io.StringIO()
    print_build(shown[0], console=Console(file=told, width=100))
    assert "95 others" in told.getvalue()
    assert len(told.getvalue().splitlines()) < 80
