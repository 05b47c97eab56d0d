"""`token_loss`: the gradient made with the forward equals the one made after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmr1.kernels import token_logprob_cpu, token_loss, token_loss_cpu, token_loss_triton
from rmr1.kernels.dispatch import Backend, use
from rmr1.kernels.token_logprob import token_logprobs

ROWS, HIDDEN, WORDS = 23, 12, 61


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of several tiles, with remainders."""
    for kernels in (token_loss_cpu, token_loss_triton):
        monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * WORDS * 5)
    monkeypatch.setattr(token_logprob_cpu, "COLUMNS", 17)
    monkeypatch.setattr(token_loss_triton, "STRIP", 17)
    # Two blocks a row, and a remainder.
    monkeypatch.setattr(token_loss_triton, "BLOCK", 32)


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    x, w = torch.randn(ROWS, HIDDEN), torch.randn(WORDS, HIDDEN)
    old, advantage = torch.randn(ROWS) - 4, torch.randn(ROWS)
    targets = torch.randint(0, WORDS, (ROWS,))
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets, old, advantage


def clipped(logprobs: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / ROWS


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32)],
)
def test_equals_the_op_in_two_steps(
    backend: Backend, dtype: torch.dtype, temperature: float
) -> None:
    x, w, y, old, advantage = case(dtype)
    logprobs, entropy = token_logprobs(x, w, y, temperature=temperature, return_entropy=True)
    expected = clipped(logprobs, old, advantage)
    truth = torch.autograd.grad(expected, (x, w))
    seen: list[slice] = []

    def loss(part: Tensor, rows: slice) -> Tensor:
        seen.append(rows)
        return clipped(part, old[rows], advantage[rows])

    with use(backend):
        value, got, got_entropy = token_loss.token_loss(x, w, y, loss, temperature=temperature)
    mine = torch.autograd.grad(value, (x, w))
    assert [(rows.start, rows.stop) for rows in seen] == [
        (0, 5), (5, 10), (10, 15), (15, 20), (20, 23)
    ]  # fmt: skip
    assert torch.allclose(value, expected, atol=1e-6)
    assert torch.allclose(got, logprobs.detach(), atol=1e-5)
    assert torch.allclose(got_entropy, entropy.detach(), atol=1e-5)
    assert not got.requires_grad
    for a, b in zip(mine, truth, strict=True):
        assert a.dtype == dtype
        assert b.abs().max() > 1e-3
        assert torch.allclose(a, b, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_in_fp64_against_the_reference() -> None:
    x, w, y, old, advantage = case()
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    results = []
    backends: tuple[Backend, ...] = ("reference", "native", "triton")
    for inputs, backend in zip((wide, [x, w], [x, w]), backends, strict=True):
        with use(backend):
            value, _, _ = token_loss.token_loss(
                *inputs, y, lambda part, rows: clipped(part, old[rows], advantage[rows])
            )
            results.append([value, *torch.autograd.grad(value, inputs)])
    for exact, *ours in zip(*results, strict=True):
        for mine in ours:
            assert (exact - mine).abs().max() < 1e-6 + 2e-6 * exact.abs().max()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_rows_without_a_slope_are_left_out(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of zero advantage: their gradient is exactly zero and no GEMM sees them."""
    x, w, y, old, advantage = case()
    advantage[[0, 3, 5, 6, 7, 8, 9, 22]] = 0  # the second chunk has none at all

    def loss(part: Tensor, rows: slice) -> Tensor:
        return ((part - old[rows]).exp() * advantage[rows]).sum()

    expected = loss(token_logprobs(x, w, y), slice(0, ROWS))
    truth = torch.autograd.grad(expected, (x, w))
    rows_seen = []
    multiply = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor,
        "addmm_",
        lambda self, a, b: rows_seen.append(min(a.shape)) or multiply(self, a, b),
    )
    with use(backend):
        value, _, _ = token_loss.token_loss(x, w, y, loss)
    assert max(rows_seen) <= 5
    assert 3 in rows_seen
    for mine, exact in zip(torch.autograd.grad(value, (x, w)), truth, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-4, atol=1e-6)
    assert (truth[0][advantage == 0] == 0).all()


def test_under_autocast_as_a_linear_layer() -> None:
    x, w, y, old, advantage = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, logprobs, _ = token_loss.token_loss(
            x, w, y, lambda part, rows: clipped(part, old[rows], advantage[rows])
        )
        expected = token_logprobs(x, w, y)
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert [g.dtype for g in torch.autograd.grad(value, (x, w))] == [torch.float32] * 2


def test_a_scaled_loss_has_a_scaled_gradient() -> None:
    x, w, y, old, advantage = case()

    def loss(part: Tensor, rows: slice) -> Tensor:
        return clipped(part, old[rows], advantage[rows])

    value, _, _ = token_loss.token_loss(x, w, y, loss)
    one = torch.autograd.grad(value, (x, w))
    value, _, _ = token_loss.token_loss(x, w, y, loss)
    three = torch.autograd.grad(3 * value, (x, w))
    for a, b in zip(one, three, strict=True):
        assert torch.allclose(3 * a, b)


def test_only_the_asked_gradients_and_no_rows() -> None:
    x, w, y, _, _ = case()

    def nll(part: Tensor, rows: slice) -> Tensor:
        return -part.sum()

    value, _, _ = token_loss.token_loss(x.detach(), w, y, nll)
    value.backward()
    assert x.grad is None
    assert w.grad is not None
    value, logprobs, _ = token_loss.token_loss(x[:0], w, y[:0], nll)
    assert value == 0
    assert logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda part, rows: -part, "must return a scalar"),
        (lambda part, rows: part.detach().sum(), "requires_grad False"),
    ],
)
def test_a_loss_that_is_none(loss: token_loss.ChunkLoss, words: str) -> None:
    x, w, y, _, _ = case()
    with pytest.raises(ValueError, match=words):
        token_loss.token_loss(x, w, y, loss)


def test_a_nan_from_the_loss_reaches_value_and_gradient() -> None:
    x, w, y, _, _ = case()
    value, _, _ = token_loss.token_loss(x, w, y, lambda part, rows: part.sum() * torch.nan)
    assert value.isnan()
    assert torch.autograd.grad(value, w)[0].isnan().any()
