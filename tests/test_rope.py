"""The rotary turn, forward and back, in every implementation. Frequencies: tests/test_model.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rmr1.kernels.dispatch import use
from rmr1.kernels.rope import RopeScaling, inverse_frequencies, reference, rope, rope_tables

SIZES = [(1, 1, 2), (7, 3, 10), (5, 9, 64), (2, 4, 128)]


def assert_right(tokens: int, heads: int, width: int, backend: Any) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, heads, width, requires_grad=True)
    positions = torch.randint(0, 5000, (tokens,))
    frequencies = inverse_frequencies(width, 10000.0, RopeScaling())
    cos, sin = rope_tables(positions, frequencies, 1.0, torch.float32)
    with use(backend):
        y = rope(x, cos, sin)
    assert torch.allclose(y, reference(x, cos, sin), atol=1e-6)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)  # a turn keeps lengths
    g = torch.randn_like(x)
    (back,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(back, reference(g, cos, -sin), atol=1e-6)


@pytest.mark.parametrize(("tokens", "heads", "width"), SIZES)
def test_native(tokens: int, heads: int, width: int, isa: str) -> None:
    assert_right(tokens, heads, width, "native")


@pytest.mark.parametrize(("tokens", "heads", "width"), SIZES)
def test_triton(tokens: int, heads: int, width: int) -> None:
    assert_right(tokens, heads, width, "triton")


def test_the_turn_is_that_of_complex_numbers() -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 1, 3, dtype=torch.float64)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat([turned.real, turned.imag], dim=-1)
    assert torch.allclose(rope(x, angles.cos(), angles.sin()), wanted)
    assert torch.autograd.gradcheck(lambda x: rope(x, angles.cos(), angles.sin()), (x,))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_strided_tokens_and_heads(backend: Any) -> None:
    """q as a part of one projection of q, k and v, and as a transposed view."""
    wide = torch.randn(4, 3 * 2 * 8)
    cos, sin = torch.randn(4, 1, 4), torch.randn(4, 1, 4)
    for x in (wide[:, 16:32].view(4, 2, 8), torch.randn(2, 4, 8).transpose(0, 1)):
        with use(backend):
            assert torch.allclose(rope(x, cos, sin), reference(x, cos, sin), atol=1e-6)
    with use(backend):
        assert rope(torch.zeros(0, 2, 8), cos[:0], sin[:0]).shape == (0, 2, 8)


def test_bad_input() -> None:
    x, table = torch.zeros(3, 2, 4), torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match=r"tables \[T, 1, D / 2\], got .* \[3, 1, 3\]"):
        rope(x, table, torch.zeros(3, 1, 3))
    with pytest.raises(ValueError, match="even D"):
        rope(torch.zeros(3, 2, 5), table, table)
    with pytest.raises(ValueError, match="share dtype and device"):
        rope(x.double(), table, table)
