"""RMSNorm, alone and after a sum, forward and backward, in every implementation, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.rmsnorm import add_rmsnorm, reference, rmsnorm

EPS = 1e-5


def run(inputs: list[Tensor], grads: list[Tensor], backend: Any) -> list[Tensor]:
    """Outputs and gradients of both forms."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    x, added, weight = leaves
    with use(backend):
        alone = rmsnorm(x, weight, EPS)
        y, total = add_rmsnorm(x, added, weight, EPS)
    outs = [alone, y, total]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, grads)]


def assert_as_exact_as_torch(rows: int, width: int, backend: Any) -> None:
    torch.manual_seed(rows + width)
    inputs = [torch.randn(rows, width) for _ in range(2)] + [torch.randn(width)]
    grads = [torch.randn(rows, width) for _ in range(3)]
    exact = run([x.double() for x in inputs], [g.double() for g in grads], "reference")
    mine, torchs = run(inputs, grads, backend), run(inputs, grads, "reference")
    for truth, ours, theirs in zip(exact, mine, torchs, strict=True):
        error, yardstick = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 2 * yardstick + 2e-6 * truth.abs().max()
        assert truth.abs().max() > 1e-3  # not a parity of zeros


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 17), (3, 1025), (70, 576)])
def test_native_is_as_exact_as_torch(rows: int, width: int, isa: str) -> None:
    assert_as_exact_as_torch(rows, width, "native")


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 17), (3, 1025)])
def test_triton_is_as_exact_as_torch(rows: int, width: int) -> None:
    assert_as_exact_as_torch(rows, width, "triton")


def test_the_gradient_of_the_reference() -> None:
    x, added, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5), (3, 5), (5,))
    )
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, a, w: add_rmsnorm(x, a, w, EPS), (x, added, weight))


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_one_output_may_be_left_unused(backend: Any) -> None:
    inputs = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    weight = torch.randn(6, requires_grad=True)
    with use(backend):
        y, total = add_rmsnorm(*inputs, weight, EPS)
        (from_total,) = torch.autograd.grad(total.sum(), inputs[:1], retain_graph=True)
        (from_y,) = torch.autograd.grad(y.sum(), inputs[1:])
    assert torch.equal(from_total, torch.ones(4, 6))
    assert torch.allclose(y, reference(inputs[0] + inputs[1], weight, EPS), atol=1e-6)
    assert from_y.abs().max() > 0


def test_the_result_does_not_depend_on_threads() -> None:
    x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(rmsnorm(x, weight, EPS).square().sum(), (x, weight)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_shapes_zeros_nan_and_16_bit_inputs() -> None:
    x, weight = torch.randn(2, 3, 8, 16)[..., ::2], torch.randn(8)
    assert torch.allclose(rmsnorm(x, weight, EPS), reference(x, weight, EPS), atol=1e-6)
    assert torch.equal(rmsnorm(torch.zeros(2, 8), weight, EPS), torch.zeros(2, 8))
    assert rmsnorm(torch.zeros(0, 8), weight, EPS).shape == (0, 8)
    row = torch.ones(2, 8)
    row[1, 3] = torch.nan
    assert rmsnorm(row, weight, EPS).isnan().any(dim=1).tolist() == [False, True]
    y, total = add_rmsnorm(x.bfloat16(), x.bfloat16(), weight.bfloat16(), EPS)
    assert y.dtype == total.dtype == torch.bfloat16


def test_bad_input() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must be \[H\].* got \[3\]"):
        rmsnorm(x, torch.ones(3), EPS)
    with pytest.raises(ValueError, match=r"got .*float64"):
        rmsnorm(x, weight.double(), EPS)
    with pytest.raises(ValueError, match=r"added must be like x, \[2, 4\].* got \[4\]"):
        add_rmsnorm(x, weight, weight, EPS)
