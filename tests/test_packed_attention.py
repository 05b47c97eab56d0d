"""Attention of training: the native kernel against two merged calls of the definition, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmr1.kernels import packed_attention
from rmr1.kernels.dispatch import use
from rmr1.kernels.packed_attention import Layout

Groups = list[tuple[int, tuple[int, ...]]]
LAYOUTS: list[Groups] = [
    [(1, ())],
    [(1, (1, 1))],
    [(17, ()), (1, (2,)), (33, (5, 1, 97))],
    [(48, (48, 48)), (49, (47, 96, 1, 1))],
    [(301, (37, 80, 1, 12, 33)), (4, (70, 70, 70)), (129, ())],
    [(400, (64,) * 4)],
]
HEADS = [(9, 3, 64), (4, 4, 8), (7, 1, 24), (2, 1, 256)]


def tensors(groups: Groups, heads: tuple[int, int, int]) -> list[Tensor]:
    """q, k, v and a gradient in fp64; large scores, so that softmax is not flat."""
    queries, keys, dim = heads
    tokens = sum(prompt + sum(responses) for prompt, responses in groups)
    generator = torch.Generator().manual_seed(tokens + dim)
    drawn = [
        torch.randn(tokens, n, dim, generator=generator, dtype=torch.float64)
        for n in (queries, keys, keys, queries)
    ]
    drawn[0] *= 3
    return drawn


def both_ways(given: list[Tensor], layout: Layout) -> list[Tensor]:
    """Result, log-sum-exp, and the gradients of q, k and v."""
    q, k, v, on_out = given
    out, lse = packed_attention.forward(q, k, v, layout)
    return [out, lse, *packed_attention.backward(on_out, q, k, v, out, lse, layout)]


def dense(given: list[Tensor], groups: Groups) -> list[Tensor]:
    """By autograd, a mask that says who sees whom, written down token by token."""
    q, k, v, on_out = (x.detach().requires_grad_() for x in given)
    tokens, token = len(q), 0
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for prompt, responses in groups:
        runs = [(token, prompt)]
        for count in responses:
            runs.append((runs[-1][0] + runs[-1][1], count))
        for start, count in runs:
            for i in range(start, start + count):
                seen[i, start : i + 1] = True
                seen[i, token : token + prompt] |= start > token
        token = runs[-1][0] + runs[-1][1]
    share = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    scores = torch.einsum("lnd,mnd->nlm", q, wide_k) / q.shape[2] ** 0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("nlm,mnd->lnd", scores.softmax(-1), wide_v)
    grads = torch.autograd.grad(out, (q, k, v), on_out)
    return [out, scores.logsumexp(-1).T, *grads]


@pytest.mark.parametrize("groups", LAYOUTS[:5], ids=str)
def test_the_definition_against_a_dense_mask(groups: Groups) -> None:
    given = tensors(groups, HEADS[0])
    with use("reference"):
        found = both_ways(given, Layout(groups))
    for mine, expected in zip(found, dense(given, groups), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_native_against_the_definition(
    groups: Groups, heads: tuple[int, int, int], isa: str
) -> None:
    """Error at most twice that of the definition in fp32."""
    given, layout = tensors(groups, heads), Layout(groups)
    narrow = [x.float() for x in given]
    with use("reference"):
        exact = both_ways([x.double() for x in narrow], layout)
        plain = both_ways(narrow, layout)
    with use("native"):
        found = both_ways(narrow, layout)
    for mine, theirs, true in zip(found, plain, exact, strict=True):
        assert mine.dtype == torch.float32
        size = max(1.0, float(true.abs().max()))
        error, other = (mine - true).abs().max(), (theirs - true).abs().max()
        # A row with one key has a gradient of 0: what is left is rounding of 2 x 256 products.
        assert error <= 2 * other + 64 * torch.finfo(torch.float32).eps * size


def test_threads_change_no_bit() -> None:
    groups: Groups = [(301, (37, 80, 1)), (700, (90, 90))]
    given, layout = [x.float() for x in tensors(groups, (9, 3, 64))], Layout(groups)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(both_ways(given, layout))
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_tokens_may_lie_apart() -> None:
    """q, k and v as parts of one projection."""
    groups: Groups = [(20, (7, 9))]
    q, k, v, on_out = (x.float() for x in tensors(groups, (6, 2, 16)))
    whole = torch.cat([q, k, v], dim=1)
    parts = [whole[:, :6], whole[:, 6:8], whole[:, 8:]]
    assert not parts[0].is_contiguous()
    layout = Layout(groups)
    for apart, together in zip(
        both_ways([*parts, on_out], layout), both_ways([q, k, v, on_out], layout), strict=True
    ):
        assert torch.equal(apart, together)


def test_nan_stays_in_its_sequence() -> None:
    groups: Groups = [(20, (7, 9)), (30, ())]
    q, k, v, _ = (x.float() for x in tensors(groups, (6, 2, 16)))
    k[22] = torch.nan  # in the first response
    out, _ = packed_attention.forward(q, k, v, Layout(groups))
    assert out[22:27].isnan().all()
    assert not out[:22].isnan().any()
    assert not out[27:].isnan().any()


def test_what_the_native_kernel_does_not_take_goes_elsewhere() -> None:
    groups: Groups = [(9, (4, 4))]
    for dtype, dim in ((torch.float64, 16), (torch.float32, 12), (torch.float32, 264)):
        given = [x.to(dtype) for x in tensors(groups, (4, 2, dim))]
        out, *_ = both_ways(given, Layout(groups))
        with use("reference"):
            expected, *_ = both_ways(given, Layout(groups))
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("groups", [[], [(0, ())], [(3, (2, 0))]])
def test_runs_without_tokens_are_refused(groups: Groups) -> None:
    with pytest.raises(ValueError, match="at least one sequence and one token"):
        Layout(groups)


def test_tokens_that_are_not_those_of_the_layout_are_refused() -> None:
    q, k, v, _ = tensors([(4, ())], (4, 2, 8))
    for layout in (Layout([(3, ())]), Layout([(4, (1,))])):
        with pytest.raises(ValueError, match="the sum of the lengths must be the number of tokens"):
            packed_attention.forward(q, k, v, layout)
