"""SwiGLU, forward and backward, in every implementation, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.swiglu import reference, swiglu


def run(gate: Tensor, up: Tensor, on_out: Tensor, backend: Any) -> list[Tensor]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with use(backend):
        out = swiglu(gate, up)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), on_out)]


def assert_as_exact_as_torch(rows: int, width: int, backend: Any) -> None:
    torch.manual_seed(rows + width)
    inputs = [3 * torch.randn(rows, width) for _ in range(3)]
    exact = run(*(x.double() for x in inputs), "reference")
    mine, torchs = run(*inputs, backend), run(*inputs, "reference")
    for truth, ours, theirs in zip(exact, mine, torchs, strict=True):
        error, yardstick = (ours - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 2 * yardstick + 1e-6 * truth.abs().max()
        assert truth.abs().max() > 1e-3  # not a parity of zeros


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (1, 1025), (40, 1536)])
def test_native_is_as_exact_as_torch(rows: int, width: int, isa: str) -> None:
    assert_as_exact_as_torch(rows, width, "native")


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (2, 1025)])
def test_triton_is_as_exact_as_torch(rows: int, width: int) -> None:
    assert_as_exact_as_torch(rows, width, "triton")


def test_the_gradient_of_the_reference() -> None:
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, inputs)


def test_far_out_gates_nan_and_nothing(isa: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30, torch.inf, torch.nan])
    up = torch.full_like(gate, 2.0)
    found, wanted = swiglu(gate, up), reference(gate, up)
    assert torch.allclose(found[:7], wanted[:7], atol=1e-30)
    assert found[7].isnan()
    assert swiglu(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_shapes_strides_and_16_bit_inputs() -> None:
    wide = torch.randn(4, 3, 20)
    gate, up = wide[..., :10], wide[..., 10:]  # halves of one projection: not contiguous
    assert torch.allclose(swiglu(gate, up), reference(gate, up), atol=1e-6)
    out = swiglu(gate.bfloat16(), up.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), reference(gate, up), atol=0.05)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"must be alike, got \[2\] .* and \[3\]"):
        swiglu(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"float32 .*float64"):
        swiglu(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
