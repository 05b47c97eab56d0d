"""The benchmarks' harness (check, share, rows), and `rmr1 bench` around them."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1 import bench
from rmr1.cli import main

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    # Its own time is not what is tested here.
    monkeypatch.setattr(harness, "limits", lambda device, dtype: harness.Limits(1e11, 2e10))
    return harness


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import check

    return check


def row(provider: str, x_yardstick: float, **more: Any) -> dict[str, Any]:
    known = {"benchmark": "op", "workload": "T=1", "device": "here", "threads": 2, "unit": "s"}
    times = {"median": x_yardstick, "p20": 0.9 * x_yardstick, "p80": 1.2 * x_yardstick}
    found = {"provider": provider, "yardstick": "copy", "x_yardstick": x_yardstick, "bound": 1.0}
    return {**known, **times, **found, **more}


# --- The check -----------------------------------------------------------------------------------


def square(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (x.square() * w,)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.square() * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2.00001 * x * w * grad, x.square() * grad


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x, w: (x.square() * w * (1 + 2e-6),), r"the error of output 0 is .* 2 times"),
        (lambda x, w: (WrongGradient.apply(x, w),), "the error of the gradient of input 0 is"),
        (lambda x, w: (x.square() * w + math.nan,), "nan times torch's own in float32"),
        (lambda x, w: (x.square()[:1] * w[:1],), r"output 0 has shape \[1\], and the .* \[50\]"),
    ],
)
def test_the_check_finds_a_wrong_op(check: ModuleType, wrong: Any, told: str) -> None:
    inputs = [torch.randn(50), torch.randn(50)]
    assert check.check("op", square, square, inputs, 2) <= 1
    with pytest.raises(check.WrongResult, match=f"^op: .*{told}.*nothing was timed"):
        check.check("op", wrong, square, inputs, 2)


def test_the_check_measures_in_torchs_own_error(check: ModuleType) -> None:
    inputs = [torch.randn(50).bfloat16(), torch.randn(50).bfloat16()]

    def exact(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.to(x.dtype) for one in square(x.float(), w.float()))

    assert 0.1 < check.check("op", exact, exact, inputs, 2, torchs=square) <= 1
    with pytest.raises(check.WrongResult, match=r"times torch's own in bfloat16"):
        check.check("op", lambda x, w: (x.square() * w * 1.1,), exact, inputs, 2, torchs=square)


def test_zeros_prove_nothing(check: ModuleType) -> None:
    with pytest.raises(check.WrongResult, match="a largest value of 0"):
        check.check("op", square, square, [torch.zeros(3), torch.zeros(3)], 2)


# --- Rows ----------------------------------------------------------------------------------------


def test_the_share_of_the_roofline(harness: ModuleType) -> None:
    limits = harness.Limits(flops=1e12, bandwidth=1e11)
    by_flops = harness.Work("w", flops=1e12, bytes=1e10)
    by_bytes = harness.Work("w", flops=1e10, bytes=1e11)
    assert by_flops.bound(limits) == by_bytes.bound(limits) == 1.0
    found = harness.row(by_flops, "rmr1 op", [5.0, 3.0, 4.0], "cpu", limits)
    assert (found["median"], found["bound"], found["share"]) == (4.0, 1.0, 0.25)
    assert 3.0 <= found["p20"] <= 4.0 <= found["p80"] <= 5.0
    assert (found["flops"], found["bytes"]) == (1e12, 1e10)


def test_the_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    monkeypatch.setattr(harness, "_seconds", lambda call, calls, device: 0.25)
    found = harness.limits("cpu", torch.float32)
    assert found.flops == 2 * 512**3 / 0.25  # a GEMM this slow is not made larger
    assert found.bandwidth == 2 * 4 * 2**25 / 16 / 0.25


def test_a_quick_run_writes_whole_rows(
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import bench_swiglu
    import model_op

    output = tmp_path / "deep" / "bench_swiglu.json"
    monkeypatch.setattr(sys, "argv", ["bench_swiglu.py", "--quick", "--output", str(output)])
    assert model_op.run(bench_swiglu.OP, bench_swiglu.__doc__) == 0
    assert "rmr1 swiglu" in capsys.readouterr().out
    rows = json.loads(output.read_text())
    wanted = """workload provider version torch unit median p20 p80 device threads flops bytes bound
        share yardstick x_yardstick error_ratio peak_memory_mb limit_flops limit_bandwidth"""
    assert [set(one) for one in rows] == [set(wanted.split())] * 6
    for one in rows:
        assert one["share"] == pytest.approx(one["bound"] / one["median"])
        assert one["median"] > 0
        ours = one["provider"].startswith("rmr1")
        assert ours == (one["error_ratio"] is not None) == (one["version"] != torch.__version__)
    forward, both = rows[0], rows[3]
    assert forward["bytes"] == 3 * 17 * 1536 * 4
    assert both["bytes"] == 8 * 17 * 1536 * 4


def test_a_wrong_op_is_not_timed(
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import dataclasses

    import bench_swiglu
    import model_op

    wrong = dataclasses.replace(bench_swiglu.OP, op=lambda gate, up: (gate.sigmoid() * up,))
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench_swiglu.py", "--quick", "--output", str(output)])
    assert model_op.run(wrong, "") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"bench_swiglu.py: swiglu: the error of output 0 is .* was timed.\n", err)
    assert not output.exists()


# --- rmr1 bench ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(
    harness: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    told = "no CUDA device is here; use --device cpu\n"
    assert capsys.readouterr().err == f"rmr1: bench --device cuda: {told}"
    monkeypatch.setattr(sys, "argv", ["bench_op.py", "--device", "cuda"])
    parser = harness.arguments("", "op", samples=1)
    parser.prog = "bench_op.py"
    assert harness.run(parser, "", lambda options, limits: []) == 2
    assert capsys.readouterr().err == f"bench_op.py: {told}"


def test_which_options_a_benchmark_gets() -> None:
    options = {"device": "cpu", "dtype": "", "quick": True}
    for name in ("rope", "token_logprob", "policy_loss", "group_advantage", "rmsnorm", "swiglu"):
        call = bench.command(BENCHMARKS / f"bench_{name}.py", options, Path("o"))
        assert call is not None
        assert call[2:] == ["--output", "o", "--device", "cpu", "--quick"]
    verdict = BENCHMARKS / "bench_verdict.py"
    assert bench.command(verdict, options, Path("o"))[2:] == ["--output", "o", "--quick"]  # type: ignore[index]
    assert bench.command(verdict, {**options, "device": "cuda"}, Path("o")) is None


def fake(folder: Path, name: str, body: str) -> Path:
    path = folder / f"bench_{name}.py"
    path.write_text(f"import json, sys\n{body}")
    return path


def test_a_run_keeps_the_last_one_and_a_failure_keeps_both(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    write = "open(sys.argv[2], 'w').write(json.dumps([{{'workload': 'w', 'median': {}}}]))"
    for number in (1, 2, 3):
        script = fake(tmp_path, "op", write.format(number))
        rows, before, failed = bench.run_all([script], {}, out)
        assert [one["median"] for one in rows] == [number]
        assert [one["median"] for one in before] == ([number - 1] if number > 1 else [])
        assert not failed
    broken = fake(tmp_path, "op", write.format(9) + "\nsys.exit(1)")
    assert bench.run_all([broken], {}, out) == ([], [], ["bench_op.py"])
    assert bench.read(out / "bench_op.json")[0]["median"] == 3
    assert bench.read(out / "previous" / "bench_op.json")[0]["median"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["bench_op.json", "previous"]
    assert "bench_op.py" in capfd.readouterr().err
    (out / "bench_op.json").write_text("{}{")
    with pytest.raises(ValueError, match=r"bench_op.json holds no rows of a benchmark"):
        bench.read(out / "bench_op.json")


def test_a_slowdown_is_marked() -> None:
    before = [row("copy", 1.0), row("rmr1 op", 2.0), row("torch", 4.0), row("gone", 1.0)]
    now = [row("copy", 1.0), row("rmr1 op", 2.3), row("torch", 4.3), row("new", 1.0)]
    found = bench.changes(now, before)
    assert [(one.provider, one.slower) for one in found] == [("rmr1 op", True), ("torch", False)]
    assert found[0].ratio == pytest.approx(1.15)
    # Another machine, or another number of threads, is another measurement.
    assert bench.changes([row("rmr1 op", 9.0, device="there")], before) == []
    assert bench.changes([row("rmr1 op", 9.0, threads=1)], before) == []
    assert bench.changes([{**row("rmr1 op", 9.0), "x_yardstick": None}], before) == []


def test_the_verb_compares_draws_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr("rmr1.verbs.tools.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for times in (2.0, 3.0):
        rows = json.dumps([row("copy", 1.0), row("rmr1 op", times)])
        fake(tmp_path / "benchmarks", "op", f"open(sys.argv[2], 'w').write({rows!r})")
        assert main(["bench"]) == 0
        out, err = capfd.readouterr()
        assert ("slower" in out) == (times == 3.0)
        assert err.endswith("plots: results/bench.html\n")
    assert Path("results/bench.html").read_text().startswith("<!doctype html>")
    assert main(["bench", "--json", "--quick"]) == 0
    assert [one["benchmark"] for one in json.loads(capfd.readouterr().out)] == ["op", "op"]
    assert Path("results/quick/bench_op.json").exists()
    fake(tmp_path / "benchmarks", "bad", "sys.exit(1)")
    assert main(["bench", "--json"]) == 1
    out, err = capfd.readouterr()
    assert len(json.loads(out)) == 2
    assert err.endswith("rmr1 bench: failed: bench_bad.py\n")


def test_the_page_loads_nothing_and_escapes() -> None:
    rate = {"unit": "GB/s", "bound": None, "benchmark": "parser", "workload": "<b>&"}
    rows = [row("copy", 1.0), row("rmr1 op", 3.5, limit_flops=1e11, limit_bandwidth=2e10)]
    rows += [row("C++", 2.0, **rate), row("Python", 0.02, **rate)]
    page = bench.page(rows)
    assert not re.search(
        r"(src|href|url|@import|<script|<link|<img)\b\s*[=(]?", page.split("<body>")[1]
    )
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert "&lt;b&gt;&amp; (1 = the fastest)" in page
    assert "T=1 (1 = the bound)" in page
    assert "3.50×" in page
    assert "100 GFLOP/s" not in page  # the first row says it, and this one has none
    assert "nan" not in page
    assert "inf" not in page


def test_the_package_needs_no_peer() -> None:
    peers = re.compile(r"^\s*(import|from) (liger_kernel|trl)\b", re.MULTILINE)
    files = list((BENCHMARKS.parent / "rmr1").rglob("*.py"))
    assert len(files) > 50
    assert not [path for path in files if peers.search(path.read_text())]


def test_what_one_stands_for() -> None:
    assert bench.relative([row("a", 2.0, bound=0.5)]) == ("the bound", [(4.0, 3.6, 4.8)])
    unit, points = bench.relative(
        [row("a", 2.0, unit="GB/s", bound=None), row("b", 0.5, unit="GB/s", bound=None)]
    )
    assert unit == "the fastest"
    assert [point[0] for point in points] == [1.0, 4.0]
    assert all(low < t < high for t, low, high in points)
