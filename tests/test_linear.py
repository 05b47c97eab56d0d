"""y = x W^T + b in every instruction set, against fp64, and to the last bit against itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from rmr1.kernels.dispatch import use
from rmr1.kernels.linear import linear, reference

ROWS = (1, 7, 8, 9, 16, 17, 31, 33, 300)
OUTPUTS = (1, 5, 12, 48, 49, 130)
DEPTHS = (1, 5, 64, 577, 1200)


def operands(inputs: int, rows: int = ROWS[-1], outputs: int = OUTPUTS[-1]) -> list[Tensor]:
    torch.manual_seed(inputs)
    return [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inputs", DEPTHS)
def test_native_is_as_exact_as_torch(inputs: int, with_bias: bool, isa: str) -> None:
    x, weight, given = operands(inputs)
    bias = given if with_bias else None
    exact = torch_linear(*(None if a is None else a.double() for a in (x, weight, bias)))  # type: ignore[arg-type]
    yardstick = (torch_linear(x, weight, bias) - exact).abs().max()
    allowed = 2 * yardstick + torch.finfo(torch.float32).eps * exact.abs().max()
    assert exact.abs().max() > 1
    for rows in ROWS:
        for outputs in OUTPUTS:
            few = None if bias is None else bias[:outputs]
            found = linear(x[:rows], weight[:outputs], few)
            assert found.shape == (rows, outputs)
            assert found.dtype == torch.float32
            assert found.is_contiguous()
            assert (found - exact[:rows, :outputs]).abs().max() <= allowed, (rows, outputs)


@pytest.mark.parametrize("inputs", DEPTHS)
def test_a_row_is_the_same_whatever_stands_beside_it(
    inputs: int, isa: str, two_threads: None
) -> None:
    x, weight, bias = operands(inputs)
    together = linear(x, weight, bias)
    for rows in ROWS:
        assert torch.equal(linear(x[:rows], weight, bias), together[:rows])
        assert torch.equal(linear(x[-rows:], weight, bias), together[-rows:])
    torch.set_num_threads(1)
    assert torch.equal(linear(x, weight, bias), together)
    alone = torch.cat([linear(x[i : i + 1], weight, bias) for i in range(40)])
    assert torch.equal(alone, together[:40])


def test_an_output_is_the_same_whatever_stands_beside_it(isa: str) -> None:
    x, weight, bias = operands(577, rows=33)
    together = linear(x, weight, bias)
    for outputs in OUTPUTS:
        assert torch.equal(linear(x, weight[:outputs], bias[:outputs]), together[:, :outputs])


def test_rows_at_any_stride(isa: str) -> None:
    x, weight, bias = operands(65, rows=34)
    wanted = linear(x, weight, bias)
    wide = torch.full((34, 100), torch.nan)
    wide[:, 7:72] = x
    assert torch.equal(linear(wide[:, 7:72], weight, bias), wanted)
    assert torch.equal(linear(x[::2], weight, bias), wanted[::2])
    assert torch.equal(linear(x[3:4].expand(34, 65), weight, bias), wanted[3:4].expand(34, -1))
    assert torch.equal(linear(x.t().contiguous().t(), weight, bias), wanted)
    other = torch.randn(65, 10)
    for column in (0, 9):  # one input, at a stride of its own
        one = linear(other[:, column : column + 1], weight[:, :1].contiguous())
        assert torch.equal(
            one, linear(other[:, column : column + 1].clone(), weight[:, :1].clone())
        )
    apart = torch.stack([bias, bias.neg()], 1)[:, 0]
    assert not apart.is_contiguous()
    assert torch.equal(linear(x, weight, apart), wanted)


def test_what_is_not_finite_stays_in_its_row_and_column(isa: str) -> None:
    x, weight, _ = operands(64, rows=33)
    wanted = linear(x, weight)
    x[4, 3], weight[50, 7] = torch.nan, torch.inf
    found = linear(x, weight)
    assert found[4].isnan().all()
    assert not found[:, 50].isfinite().any()
    rest = torch.ones_like(found, dtype=torch.bool)
    rest[4], rest[:, 50] = False, False
    assert torch.equal(found[rest], wanted[rest])


def test_nothing_to_multiply(isa: str) -> None:
    x, weight, bias = operands(5)
    assert linear(x[:0], weight, bias).shape == (0, 130)
    assert linear(x, weight[:0], bias[:0]).shape == (300, 0)


def test_no_inputs(isa: str) -> None:
    linear(torch.full((40, 5), torch.nan), torch.zeros(130, 5))  # what a stack may hold
    x, weight, bias = torch.empty(40, 0), torch.empty(130, 0), torch.randn(130)
    assert torch.equal(linear(x, weight), torch.zeros(40, 130))
    assert torch.equal(linear(x, weight, bias), bias.expand(40, -1))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_into_given_memory(backend: Any, isa: str) -> None:
    x, weight, bias = operands(64, rows=33)
    memory = torch.full((40, 130), torch.nan)
    out = memory[:33]
    with use(backend):
        for given in (None, bias):
            assert linear(x, weight, given, out=out) is out
            assert torch.equal(out, linear(x, weight, given))
        assert memory[33:].isnan().all()
        assert not out.requires_grad
        assert linear(x[:0], weight, out=memory[:0]).shape == (0, 130)


def test_no_inputs_into_given_memory() -> None:
    out = torch.full((33, 130), torch.nan)
    linear(torch.empty(33, 0), torch.empty(130, 0), out=out)
    assert torch.equal(out, torch.zeros(33, 130))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_into_given_memory(dtype: torch.dtype) -> None:
    x, weight, bias = (one.to(dtype) for one in operands(64, rows=9))
    wanted = torch_linear(x, weight, bias)
    for wide in (dtype, torch.float32):
        out = torch.empty(9, 130, dtype=wide)
        assert linear(x, weight, bias, out=out) is out
        assert torch.equal(out, wanted.to(wide))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_memory(backend: Any) -> None:
    x, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    cases: list[tuple[Tensor, str]] = [
        (torch.zeros(3, 4), r"\[3, 5\] in .*float32.* got \[3, 4\]"),
        (torch.zeros(15), r"got \[15\]"),
        (torch.zeros(3, 5, dtype=torch.float64), "in torch.float64"),
        (torch.zeros(3, 5, dtype=torch.bfloat16), "in torch.bfloat16"),
        (torch.zeros(3, 5, device="meta"), "on meta"),
        (torch.zeros(5, 3).t(), r"strides \[1, 3\]"),
        (torch.zeros(3, 5, requires_grad=True), "without a gradient"),
    ]
    for out, words in cases:
        with use(backend), pytest.raises(ValueError, match=f"^linear: out must be .*{words}"):
            linear(x, weight, out=out)


def test_there_is_no_gradient() -> None:
    x, weight, bias = (one.requires_grad_() for one in operands(5))
    for found in (linear(x, weight, bias), linear(x.double(), weight.double())):
        assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_go_to_the_reference(dtype: torch.dtype) -> None:
    x, weight, bias = (one.to(dtype) for one in operands(64, rows=9))
    found = linear(x, weight, bias)
    assert found.dtype == dtype
    assert torch.equal(found, torch_linear(x, weight, bias))


def test_other_layouts_go_to_the_reference() -> None:
    x, weight, bias = operands(577, rows=9)
    across = weight.t().contiguous().t()
    assert torch.equal(linear(x, across, bias), torch_linear(x, across, bias))
    with use("reference"):
        assert torch.equal(linear(x, weight, bias), torch_linear(x, weight, bias))
    assert reference is torch_linear
    assert not torch.equal(linear(x, weight, bias), torch_linear(x, weight, bias))  # another order


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_bad_input(backend: Any) -> None:
    x, weight, bias = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x[0], weight), r"x must be \[M, K\] and weight \[N, K\], got \[4\] and \[5, 4\]"),
        ((x[None], weight), r"got \[1, 3, 4\]"),
        ((x, weight[0]), r"and \[4\]"),
        ((x, weight.t()), r"got \[3, 4\] and \[4, 5\]"),
        ((x, weight, bias[1:]), r"bias must be \[5\], got \[4\]"),
        ((x, weight, bias[:, None]), r"bias must be \[5\], got \[5, 1\]"),
        ((x, weight.double()), "one floating dtype .*float32 on cpu and .*float64 on cpu"),
        ((x, weight, bias.half()), r"one floating dtype .*float16"),
        ((x, weight.to("meta")), "a device, got .* on cpu and .* on meta"),
        ((x.long(), weight.long()), "one floating dtype .*int64"),
    ]
    for given, words in cases:
        with use(backend), pytest.raises(ValueError, match=f"^linear: .*{words}"):
            linear(*given)


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import bench_linear
    import harness

    output = tmp_path / "out.json"
    monkeypatch.setattr(harness, "limits", lambda device, dtype: harness.Limits(1e11, 2e10))
    call = f"bench_linear.py --quick --rows 1 9 --output {output}"
    monkeypatch.setattr(sys, "argv", call.split())
    assert bench_linear.main() == 0
    rows = json.loads(output.read_text())
    assert [row["provider"] for row in rows] == ["torch linear", "rmr1 linear"] * 2
    assert rows[0]["workload"] == "layer M=1 K=576 N=160 float32"
    assert rows[3]["flops"] == 2 * 9 * 576 * 160
    assert rows[3]["bytes"] == 4 * (9 * 576 + 160 * 576 + 9 * 160)
    assert rows[0]["error_ratio"] is None
    assert 0 < rows[1]["error_ratio"] <= 2
