"""Faults that fused kernels of other libraries were shipped with, each by its name.

Those that other files test exactly stand here only as names, which the last test checks:

no tensor of all logits: tests/test_token_logprob.py::test_no_tensor_of_all_logits_lives
far-off log-ratios: tests/test_policy_loss.py::test_far_off_tokens_stay_finite
group of equal rewards: tests/test_group_advantage.py::test_equal_rewards_and_groups_of_one_are_exactly_zero
normaliser of micro-batches: tests/test_policy_loss.py::test_parts_with_the_whole_count_add_up_to_the_whole
spills and slow loads: tests/test_compile_gate.py::test_every_kernel_passes_in_its_first_configuration
offsets and fp64 in the IR: tests/test_kernel_ir.py::test_int32_offsets
launches: tests/test_kernel_ir.py::test_grid_dimension_y
trial runs: tests/test_kernel_ir.py::test_autotuned_kernels_do_not_write_their_inputs
ZeRO-3 and a head outside its module: tests/test_scorer.py::test_zero3_gathers_the_head
"""  # noqa: E501  (a name is not broken over lines)

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels import token_logprob_cpu, token_loss_cpu
from rmr1.kernels.dispatch import use
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss
from rmr1.kernels.rmsnorm import rmsnorm
from rmr1.kernels.rope import rope
from rmr1.kernels.swiglu import swiglu
from rmr1.kernels.token_logprob import token_logprobs
from rmr1.kernels.token_loss import token_loss

ALL = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
FAST = pytest.mark.parametrize("backend", ["native", "triton"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles on the CPU too, each way."""
    monkeypatch.setattr(token_logprob_cpu, "ROWS", 16)
    monkeypatch.setattr(token_logprob_cpu, "COLUMNS", 64)


def assert_parity(mine: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Equal, and not because both are zero."""
    for ours, exact in zip(mine, truth, strict=True):
        size = exact.abs().max()
        assert ours.abs().max() > 1e-3
        assert size > 1e-3, "a parity of zeros proves nothing"
        assert (ours - exact).abs().max() <= tolerance * max(1.0, float(size))


def run(x: Tensor, w: Tensor, y: Tensor, on: Tensor, backend: Any) -> list[Tensor]:
    """Log-probabilities, and the gradients for an upstream gradient of `on`."""
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    with use(backend):
        logprobs = token_logprobs(x, w, y)
    return [logprobs.detach(), *torch.autograd.grad((logprobs * on).sum(), (x, w))]


def plain(x: Tensor, w: Tensor, y: Tensor, on: Tensor) -> list[Tensor]:
    """The same by log_softmax in fp64."""
    x, w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    logprobs = (x @ w.T).log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return [logprobs.detach(), *torch.autograd.grad((logprobs * on).sum(), (x, w))]


@ALL
@pytest.mark.parametrize("words", [65, 96, 127])  # 96: half a tile, as 151,936 of tiles of 256
def test_vocabulary_no_multiple_of_the_tile(words: int, backend: Any) -> None:
    """Columns of zeros past the end would add exp(0) each. All true logits are far below 0, where
    that is everything: log-probabilities above 0, and no gradient.
    """
    torch.manual_seed(words)
    x = torch.rand(5, 8) + 1
    w = -torch.rand(words, 8) - 1  # logits about -18
    y, on = torch.randint(0, words, (5,)), torch.randn(5)
    y[0] = words - 1
    found = run(x, w, y, on, backend)
    assert (found[0] < 0).all()
    assert_parity(found, plain(x, w, y, on), 2e-5)


@ALL
@pytest.mark.parametrize("level", [-300.0, -1e6])
def test_running_max_seeded_with_zero(level: float, backend: Any) -> None:
    """exp(z - 0) of all-negative logits is 0, and its logarithm -inf; a tile later NaN."""
    x = torch.tensor([[level, 1.0], [level, -2.0], [level, 0.5]])
    w = torch.stack([torch.ones(130), torch.linspace(-1, 1, 130)], dim=1)
    y, on = torch.tensor([0, 64, 129]), torch.tensor([1.0, -2.0, 0.5])
    found = run(x, w, y, on, backend)
    assert all(one.isfinite().all() for one in found)
    # At -1e6 an fp32 logit has a spacing of 1/16; dw of the first column is 1e6 times p - 1.
    tolerance = 2e-4 if level == -300.0 else 0.05
    assert_parity(found, plain(x, w, y, on), tolerance)


@ALL
@pytest.mark.filterwarnings("ignore:.*encountered in")  # numpy's, of rows past the last one
def test_large_common_offset(backend: Any) -> None:
    """z_t - logsumexp(z) at an offset of 2^17 is rounded to 1/128; (z_t - m) - log s is not."""
    x = torch.full((4, 1), 2.0**17)
    w = torch.ones(150, 1)
    w[3], w[140] = 1 - 2**-20, 1 + 2**-20  # logits an eighth below and above, exact in fp32
    y, on = torch.tensor([0, 3, 140, 149]), torch.tensor([1.0, -1.0, 2.0, 3.0])
    found, truth = run(x, w, y, on, backend), plain(x, w, y, on)
    assert (found[0] - truth[0]).abs().max() < 2e-6
    naive = (x @ w.T)[0, 0] - (x @ w.T).logsumexp(1)[0]
    assert (naive - truth[0][0]).abs() > 1e-3  # the test can tell the two apart


def test_bf16_accumulation_of_dw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in bf16 stops growing at 256 equal terms; here 4,000 rows come in blocks of 16."""
    monkeypatch.setattr(token_loss_cpu, "CHUNK_BYTES", 4 * 4 * 16)
    x, y = torch.ones(4000, 1, dtype=torch.bfloat16), torch.zeros(4000, dtype=torch.int64)
    wanted = torch.tensor([3000.0, -1000.0, -1000.0, -1000.0])
    for fused in (False, True):
        w = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
        if fused:
            token_loss(x, w, y, lambda logprobs, rows: logprobs.sum())[0].backward()
        else:
            token_logprobs(x, w, y).sum().backward()
        assert w.grad is not None
        assert w.grad.dtype == torch.bfloat16
        torch.testing.assert_close(w.grad.float().squeeze(1), wanted, rtol=4e-3, atol=0)


def test_bf16_accumulation_of_dx() -> None:
    """The same of the hidden states' gradient, over tiles of the vocabulary: 3 - the mean of w = 2,
    in steps of 1/256, where bf16 has a spacing of 1/64.
    """
    w = torch.ones(64 * 256, 1, dtype=torch.bfloat16)
    w[0] = 3
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(x, w, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert x.grad is not None
    assert abs(x.grad.item() - 2.0) < 0.02


@FAST
def test_reduction_none_has_right_dw(backend: Any) -> None:
    """Each row with its own upstream gradient, one of them 0 and one far larger than the rest."""
    torch.manual_seed(0)
    x, w, y = torch.randn(40, 6), torch.randn(70, 6), torch.randint(0, 70, (40,))
    on = torch.randn(40)
    on[3], on[17] = 0.0, 50.0
    found = run(x, w, y, on, backend)
    assert_parity(found, plain(x, w, y, on), 1e-5)
    assert (found[1][3] == 0).all()
    # What a gradient made for the mean would give, and what it would give if rows changed places.
    for wrong in (torch.full((40,), float(on.mean())), on.flip(0)):
        assert (plain(x, w, y, wrong)[2] - found[2]).abs().max() > 0.1


@ALL
def test_inputs_are_not_uniform_random(backend: Any) -> None:
    """Uniform inputs give logits about 0, where a padded column looks like a word. These have a few
    large states, a word that has all the probability, targets that have none, and equal words.
    """
    torch.manual_seed(1)
    x, w, on = torch.randn(33, 7) ** 3, torch.randn(97, 7) ** 3, torch.randn(33)
    x[0], w[50] = 3.0, 9.0
    w[60] = w[61]
    y = torch.arange(33) * 2 % 97
    y[0], y[1] = 50, 96
    found, truth = run(x, w, y, on, backend), plain(x, w, y, on)
    assert truth[0][0] > -1e-6
    assert truth[0].min() < -20
    assert_parity(found, truth, 1e-5)


def test_a_parity_of_zeros_is_refused() -> None:
    with pytest.raises(AssertionError):
        assert_parity([torch.zeros(3)], [torch.zeros(3)], 1.0)


@ALL
def test_python_floats_do_not_become_fp64(backend: Any) -> None:
    """Results in fp32 with every option that is a Python float; tests/test_kernel_ir.py looks for
    fp64 inside the kernels.
    """
    x, w, y = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2])
    ids = torch.zeros(3, dtype=torch.int64)
    options = PolicyLossConfig(beta=0.1, dual_clip=3.0, correction="truncate", clip_high=0.28)
    with use(backend):
        logprobs, entropy = token_logprobs(x, w, y, temperature=0.7, return_entropy=True)
        loss, stats = policy_loss(
            logprobs, logprobs - 0.1, torch.ones(1, dtype=torch.float64), ids,
            ref_logprobs=logprobs - 0.3, rollout_logprobs=logprobs, config=options,
        )  # fmt: skip
        found = [logprobs, entropy, loss, group_advantages(torch.tensor([1.0, 0.5, 0.0]), ids)]
        table = torch.randn(3, 1, 2)
        found += [rmsnorm(x, torch.ones(4), 1e-5), swiglu(x, x), rope(x[:, None], table, table)]
    assert [one.dtype for one in found] == [torch.float32] * 7
    assert all(stats[name].isfinite() for name in stats)


FAR = (-1e4, 1e4, -torch.inf, torch.inf)


@ALL
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask", "mask_sequence"])
def test_masked_log_ratios_are_zeroed_before_exp(correction: Any, ratio: Any, backend: Any) -> None:
    """exp of a masked token's log-ratio is inf, and inf * 0 is NaN. The far-off tokens are in
    sequences that a mask leaves out or that have no advantage; the rest must not feel them.
    """
    config = PolicyLossConfig(
        beta=0.1, ratio=ratio, correction=correction, correction_low=0.5, correction_high=2.0
    )
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    for far in FAR:
        new = torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0, -2.0, -1.0, -3.0], requires_grad=True)
        old, ref, rollout = (new.detach() + 0.1 for _ in range(3))
        old[3] = far  # sequence 1 has no advantage
        rollout[7] = far  # sequence 2 is far from the generator
        ref[4] = far
        with use(backend):
            loss, stats = policy_loss(
                new, old, torch.tensor([1.0, 0.0, -1.0]), ids,
                ref_logprobs=ref, rollout_logprobs=rollout, config=config,
            )  # fmt: skip
        (slope,) = torch.autograd.grad(loss, new)
        assert loss.isfinite()
        assert slope.isfinite().all()
        assert slope[:3].abs().min() > 1e-3
        assert stats["nonfinite"] == 0
        assert stats["ratio_max"].isfinite()


def test_the_table_names_tests_that_exist() -> None:
    root = Path(__file__).resolve().parent.parent
    rows = re.findall(r"^[\w ,-]+: (tests/\w+\.py)::(\w+)$", __doc__ or "", re.MULTILINE)
    assert len(rows) == 9
    for path, name in rows:
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
