"""Attention over packed segments: fused kernels against the definition, and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels import varlen_attention, varlen_attention_cuda
from rmr1.kernels.dispatch import use
from rmr1.kernels.segments import ALONE_FROM, SLACK_TOKENS, Segments

HEADS, GROUPS, DIM = 6, 2, 16
CAUSAL = [[1], [17], [1, 1], [5, 5, 5], [40, 3, 41, 2, 90, 38], [ALONE_FROM + 1, 7]]
ACROSS = [([1], [1]), ([7], [300]), ([33, 1, 5], [2, 129, 64])]
CASES = [Segments(lengths) for lengths in CAUSAL] + [Segments(*pair) for pair in ACROSS]


def tensors(segments: Segments, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v and a gradient; keys that matter, so that softmax is not flat."""
    generator = torch.Generator().manual_seed(len(segments.queries) + sum(segments.keys))
    queries, keys = sum(segments.queries), sum(segments.keys)
    shapes = [(queries, HEADS), (keys, GROUPS), (keys, GROUPS), (queries, HEADS)]
    drawn = [torch.randn(*s, DIM, generator=generator, dtype=torch.float64) for s in shapes]
    drawn[0] *= 3
    return tuple(x.to(dtype) for x in drawn)


def by_autograd(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, segments: Segments) -> list[Tensor]:
    """Out, log-sum-exp and gradients of plain softmax attention, a segment at a time."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    outs, sums = [], []
    for rows, keys in segments.runs():
        wide_k, wide_v = (x[keys].repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
        scores = torch.einsum("lnd,mnd->nlm", q[rows], wide_k) / DIM**0.5
        if segments.causal:
            last = torch.arange(len(scores[0]))
            scores = scores.where(last[:, None] >= last, -torch.inf)
        outs.append(torch.einsum("nlm,mnd->lnd", scores.softmax(-1), wide_v))
        sums.append(scores.logsumexp(-1).T)
    out = torch.cat(outs)
    return [out, torch.cat(sums), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("segments", CASES, ids=lambda s: f"{s.queries}-{s.keys}")
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_against_autograd_in_fp64(segments: Segments, backend: Any) -> None:
    q, k, v, grad = tensors(segments)
    with use(backend):
        out, lse = varlen_attention.forward(q, k, v, segments)
        grads = varlen_attention.backward(grad, q, k, v, out, lse, segments)
    for found, expected in zip(
        (out, lse, *grads), by_autograd(q, k, v, grad, segments), strict=True
    ):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert grads[1].abs().max() > 1e-3 or sum(segments.keys) == len(segments.keys)


@pytest.mark.parametrize("segments", CASES, ids=lambda s: f"{s.queries}-{s.keys}")
@pytest.mark.parametrize("rows", [1, 3])
def test_the_reference_in_small_tiles(
    monkeypatch: pytest.MonkeyPatch, segments: Segments, rows: int
) -> None:
    """fp32 on a GPU runs it, on segments of many thousand tokens: a few queries at a time."""
    monkeypatch.setattr(varlen_attention, "ROWS", rows)
    q, k, v, grad = tensors(segments)
    out, lse = varlen_attention.reference(q, k, v, segments)
    grads = varlen_attention.reference_backward(grad, q, k, v, out, lse, segments)
    for found, expected in zip(
        (out, lse, *grads), by_autograd(q, k, v, grad, segments), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("segments", CASES[:5] + CASES[6:], ids=lambda s: f"{s.queries}-{s.keys}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernels_are_as_exact_as_their_dtype(
    segments: Segments, dtype: torch.dtype
) -> None:
    """Error against fp64 at most twice that of plain torch in the same dtype."""
    given = tensors(segments, dtype)
    q, k, v, grad = given
    exact = by_autograd(*(x.double() for x in given), segments)
    plain = by_autograd(*given, segments)
    out, lse = varlen_attention.forward(q, k, v, segments)
    found = [out, lse, *varlen_attention.backward(grad, q, k, v, out, lse, segments)]
    assert out.dtype == found[2].dtype == dtype
    assert lse.dtype == torch.float32
    floor = torch.finfo(dtype).eps
    for mine, theirs, true in zip(found, plain, exact, strict=True):
        error, other = (mine - true).abs().max(), (theirs - true).abs().max()
        # One key has a weight of 1, and a gradient of 0: what is left is rounding of the terms.
        assert error <= 2 * other + 16 * floor * max(1.0, float(true.detach().abs().max()))


def test_keys_in_two_parts_are_one_softmax() -> None:
    """With the log-sum-exp of the whole, each part gives its own share of the gradient."""
    q, k, v, grad = tensors(Segments([9], [50]))
    whole, first, second = Segments([9], [50]), Segments([9], [20]), Segments([9], [30])
    out, lse = varlen_attention.forward(q, k, v, whole)
    expected = varlen_attention.backward(grad, q, k, v, out, lse, whole)
    parts = [
        varlen_attention.backward(grad, q, k[a], v[a], out, lse, segments)
        for a, segments in ((slice(0, 20), first), (slice(20, 50), second))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], expected[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), expected[i])
        assert expected[i].abs().max() > 0.1


def test_buckets_waste_little() -> None:
    lengths = [100 + i % 30 for i in range(64)] + [3, 4, 5, 3000, 2000]
    buckets = Segments(lengths).buckets
    assert sum(lengths) <= buckets.cells <= 1.15 * sum(lengths) + SLACK_TOKENS * 3
    x = torch.randn(sum(lengths), 3)
    assert torch.equal(buckets.take(buckets.lay(x)), x)
    assert buckets.lay(x).shape[0] == buckets.cells
    equal = Segments([50] * 20).buckets
    assert equal.lay(x[:1000]) is not None
    assert equal.lay(x[:1000]).data_ptr() == x.data_ptr()  # nothing to move


def test_what_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's shape functions: no GPU has run it."""
    segments = Segments([3, 4], [5, 60])
    q, k, v, grad = (x.to("meta", torch.bfloat16) for x in tensors(segments))
    monkeypatch.setattr(segments, "starts", lambda _: (torch.empty(3, device="meta"),) * 2)
    out, lse = varlen_attention_cuda.forward(q, k, v, segments)
    assert out.shape == q.shape
    assert lse.shape == (7, HEADS)
    assert lse.dtype == torch.float32
    grads = varlen_attention_cuda.backward(grad, q, k, v, out, lse, segments)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_starts_are_cumulative() -> None:
    queries, keys = Segments([3, 4], [5, 60]).starts(torch.device("cpu"))
    assert queries.tolist() == [0, 3, 7]
    assert keys.tolist() == [0, 5, 65]
    assert queries.dtype == keys.dtype == torch.int32


@pytest.mark.parametrize(
    ("queries", "keys"), [([], None), ([3, 0], None), ([2], [0]), ([1, 2], [3])]
)
def test_segments_without_tokens_are_refused(queries: list[int], keys: list[int] | None) -> None:
    with pytest.raises(ValueError, match="at least one sequence and one token"):
        Segments(queries, keys)


def test_tokens_that_are_not_those_of_the_segments_are_refused() -> None:
    q, k, v, _ = tensors(Segments([4], [5]))
    for segments in (Segments([3], [5]), Segments([4], [6]), Segments([4])):
        with pytest.raises(ValueError, match="the sum of the lengths must be the number of tokens"):
            varlen_attention.forward(q, k, v, segments)
