"""`token_logprobs` against log_softmax in fp64, with the faults other libraries shipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmr1.kernels import token_logprob_cpu
from rmr1.kernels.dispatch import Backend, use
from rmr1.kernels.token_logprob import reference, token_logprobs


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logs = (hidden @ weight.T / temperature).log_softmax(-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)


def case(
    rows: int, hidden: int, words: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * 7 + words)
    x = torch.randn(rows, hidden, dtype=torch.float64) * scale
    w = torch.randn(words, hidden, dtype=torch.float64)
    return (
        x.to(dtype).requires_grad_(),
        w.to(dtype).requires_grad_(),
        torch.randint(0, words, (rows,)),
    )


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force several tiles both ways, with remainders."""
    monkeypatch.setattr(token_logprob_cpu, "ROWS", 7)
    monkeypatch.setattr(token_logprob_cpu, "COLUMNS", 19)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_gradcheck_of_the_reference(temperature: float) -> None:
    x, w, y = case(7, 5, 37)

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(x, w, y, temperature=temperature, return_entropy=True)

    assert torch.autograd.gradcheck(both, (x, w))
    for mine, truth in zip(both(x, w), plain(x, w, y, temperature), strict=True):
        assert torch.allclose(mine, truth)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("rows", [1, 2, 7, 17])
def test_tiles_equal_the_whole(rows: int, temperature: float, isa: str) -> None:
    x, w, y = case(rows, 5, 37, torch.float32)
    g, ge = torch.randn(rows), torch.randn(rows)
    for entropy_too in (True, False):

        def run(native: bool, entropy_too: bool = entropy_too) -> tuple[Tensor, ...]:
            if native:
                logprobs = token_logprobs(x, w, y, temperature=temperature)
                entropy = token_logprobs(x, w, y, temperature=temperature, return_entropy=True)[1]
            else:
                logprobs, entropy = reference(x.double(), w.double(), y, temperature)
            loss = (logprobs * g).sum() + (entropy * ge).sum() * entropy_too
            return logprobs, entropy, *torch.autograd.grad(loss, (x, w))

        for mine, truth in zip(run(True), run(False), strict=True):
            assert (mine - truth).abs().max() < 3e-6 * truth.abs().max() + 1e-6


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_forced_backend_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(
        token_logprob_cpu, "forward", lambda *a: called.append("native") or real(*a)
    )
    x, w, y = case(3, 4, 5, torch.float32)
    with use(backend):  # type: ignore[arg-type]
        token_logprobs(x, w, y)
    assert called == (["native"] if backend == "native" else [])


real = token_logprob_cpu.forward


@pytest.mark.parametrize("words", [1, 2, 17, 151, 1025, 2000])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_fp32_forward_and_backward_are_as_exact_as_torch(rows: int, words: int, isa: str) -> None:
    assert_as_exact_as_torch(rows, words)


@pytest.mark.parametrize(("rows", "words"), [(1, 1), (1, 17), (17, 151), (33, 1025), (70, 129)])
def test_triton_is_as_exact_as_torch(rows: int, words: int) -> None:
    with use("triton"):
        assert_as_exact_as_torch(rows, words)


def assert_as_exact_as_torch(rows: int, words: int) -> None:
    x, w, y = case(rows, 33, words, torch.float32)
    g, ge = torch.randn(rows), torch.randn(rows)

    def run(
        x: Tensor, w: Tensor, g: Tensor, ge: Tensor, ours: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        if ours:
            logprobs, entropy = token_logprobs(x, w, y, temperature=0.8, return_entropy=True)
        else:
            logprobs, entropy = plain(x, w, y, 0.8)
        dx, dw = torch.autograd.grad((logprobs * g + entropy * ge).sum(), (x, w))
        return logprobs.detach(), entropy.detach(), dx, dw

    exact = run(x.double(), w.double(), g.double(), ge.double(), False)
    ours, torchs = run(x, w, g, ge, True), run(x, w, g, ge, False)
    for name, truth, mine, theirs in zip(
        ["logp", "entropy", "dx", "dw"], exact, ours, torchs, strict=True
    ):
        error, yardstick = (mine - truth).abs().max(), (theirs - truth).abs().max()
        # 2e-7: the rounding of terms of size 1 that cancel where a distribution is all but certain.
        assert error <= 2 * yardstick + 2e-6 * truth.abs().max() + 2e-7, name
        assert words < 17 or truth.abs().max() > 1e-3, name  # not a parity of zeros


def test_the_two_signatures_agree_and_are_fp32() -> None:
    x, w, y = case(40, 16, 100, torch.float32)
    logprobs, entropy = token_logprobs(x, w, y, return_entropy=True)
    assert torch.allclose(logprobs, token_logprobs(x, w, y), atol=1e-6)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.shape == entropy.shape == (40,)


def test_large_common_offset_keeps_its_digits() -> None:
    """(z_t - m) - log s stays exact where z_t - logsumexp(z) rounds to 1e-2."""
    x = torch.full((4, 1), 2.0**17)  # the logits, 2^17 and an eighth less, are exact in fp32
    w = torch.ones(50, 1)
    w[3] = 1.0 - 2**-20
    logprobs = token_logprobs(x, w, torch.tensor([0, 1, 3, 3]))
    exact, _ = plain(x.double(), w.double(), torch.tensor([0, 1, 3, 3]), 1.0)
    assert (logprobs - exact).abs().max() < 1e-6


def test_all_logits_far_below_zero() -> None:
    x, w = torch.full((3, 2), -300.0, requires_grad=True), torch.ones(9, 2, requires_grad=True)
    logprobs = token_logprobs(x, w, torch.tensor([0, 4, 8]))
    assert torch.allclose(logprobs, torch.full((3,), -torch.tensor(9.0).log().item()))
    logprobs.sum().backward()
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


def test_never_above_zero_with_a_ragged_vocabulary() -> None:
    x, w, y = case(64, 8, 151, torch.float32, scale=20.0)
    assert (token_logprobs(x, w, y) <= 0).all()


@pytest.mark.usefixtures("small_tiles")
def test_rows_without_gradient_are_skipped_and_change_nothing() -> None:
    x, w, y = case(30, 5, 37, torch.float32)
    g = torch.randn(30)
    g[torch.arange(30) % 3 != 0] = 0.0
    mine = torch.autograd.grad((token_logprobs(x, w, y) * g).sum(), (x, w))
    truth = torch.autograd.grad((plain(x, w, y, 1.0)[0] * g).sum(), (x, w))
    for a, b in zip(mine, truth, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    zero = torch.autograd.grad((token_logprobs(x, w, y) * 0.0).sum(), (x, w))
    assert all((part == 0).all() for part in zero)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_masked_rows_never_reach_the_head(backend: Backend) -> None:
    x, w, y = case(30, 5, 37, torch.float32)
    mask = torch.arange(30) % 3 == 0
    logprobs, entropy = plain(x, w, y, 0.5)
    expected = torch.where(mask, logprobs + entropy, 0.0)
    truth = torch.autograd.grad(expected.sum(), (x, w))
    ignored = torch.where(mask, y, -100)  # what Hugging Face writes into labels
    bad = torch.where(mask[:, None], x, torch.nan)  # what padding may hold
    with use(backend):
        found = token_logprobs(bad, w, ignored, temperature=0.5, mask=mask, return_entropy=True)
        alone = token_logprobs(bad, w, ignored, temperature=0.5, mask=mask)
    assert torch.allclose(found[0] + found[1], expected, atol=1e-5)
    assert torch.equal(found[0], alone)
    assert (found[0][~mask] == 0).all()
    mine = torch.autograd.grad((found[0] + found[1]).sum(), (x, w))
    assert torch.allclose(mine[0], truth[0], atol=1e-5)
    assert torch.allclose(mine[1], truth[1], atol=1e-5)
    with use(backend):
        nothing = token_logprobs(x, w, y, mask=torch.zeros(30, dtype=torch.bool))
    assert torch.equal(nothing, torch.zeros(30))


def test_only_the_asked_gradients() -> None:
    x, w, y = case(9, 4, 11, torch.float32)
    (dx,) = torch.autograd.grad(token_logprobs(x, w.detach(), y).sum(), (x,))
    (dw,) = torch.autograd.grad(token_logprobs(x.detach(), w, y).sum(), (w,))
    truth = torch.autograd.grad(plain(x, w, y, 1.0)[0].sum(), (x, w))
    assert torch.allclose(dx, truth[0], atol=1e-5)
    assert torch.allclose(dw, truth[1], atol=1e-5)
    assert not token_logprobs(x.detach(), w.detach(), y).requires_grad


def test_gradient_of_the_entropy_alone() -> None:
    x, w, y = case(9, 4, 11, torch.float32)
    mine = torch.autograd.grad(token_logprobs(x, w, y, return_entropy=True)[1].sum(), (x, w))
    truth = torch.autograd.grad(plain(x, w, y, 1.0)[1].sum(), (x, w))
    assert torch.allclose(mine[0], truth[0], atol=1e-5)
    assert torch.allclose(mine[1], truth[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_get_fp32_logits(dtype: torch.dtype) -> None:
    """The log-probabilities equal those of the rounded inputs in fp64, not in 16-bit logits."""
    x, w, y = case(50, 24, 90, dtype)
    logprobs = token_logprobs(x, w, y)
    exact, _ = plain(x.double(), w.double(), y, 1.0)
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 1e-4


def test_weight_gradient_of_bf16_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed tile by tile in bf16, 4,000 equal rows would stop growing at 256 of them."""
    monkeypatch.setattr(token_logprob_cpu, "ROWS", 4)
    x = torch.ones(4000, 1, dtype=torch.bfloat16)
    w = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(x, w, torch.zeros(4000, dtype=torch.int64)).sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.bfloat16
    assert torch.allclose(
        w.grad.float().squeeze(), torch.tensor([3000.0, -1000, -1000, -1000]), rtol=4e-3
    )


def test_no_rows() -> None:
    x, w, y = case(0, 4, 11, torch.float32)
    logprobs, entropy = token_logprobs(x, w, y, return_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.shape == (0, 4)
    assert (w.grad == 0).all()


def test_strided_inputs_and_untouched_arguments() -> None:
    x, w, y = case(12, 6, 10, torch.float32)
    wide = torch.randn(12, 2, 6)
    wide[:, 0] = x.detach()
    head = w.detach().T.contiguous().T  # [V, H], column-major
    before = wide.clone(), head.clone()
    assert torch.allclose(
        token_logprobs(wide[:, 0], head, y, temperature=0.5), plain(x, w, y, 0.5)[0], atol=1e-5
    )
    assert torch.equal(wide, before[0])
    assert torch.equal(head, before[1])


def test_no_tensor_of_all_logits_lives() -> None:
    """Peak new memory of forward and backward stays near one chunk, not T x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.bytes = max(Largest.bytes, out.untyped_storage().nbytes())
            return out

    x, w, y = case(3000, 4, 10_000, torch.float32)
    g = torch.ones(3000)
    # Called directly: a mode does not see into a custom op.
    with torch.no_grad(), Largest():
        _, entropy, peak, log_sum = token_logprob_cpu.forward(x, w, y, 1.0, True)
        token_logprob_cpu.backward(
            x, w, y, (peak, log_sum, entropy), (g, g), torch.arange(3000),
            temperature=1.0, need_hidden=True, need_weight=True,
        )  # fmt: skip
    tile = 4 * token_logprob_cpu.ROWS * token_logprob_cpu.COLUMNS
    assert Largest.bytes == tile
    assert 50 * tile < 4 * 3000 * 10_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"one H, got \[3, 5\] and \[7, 4\]"),
        ({"hidden": torch.zeros(1, 3, 4)}, r"\[T, H\]"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"T = 3, got \[2\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, r"int64"),
        ({"targets": torch.tensor([0, 7, 1])}, r"\[0, 7\), got values from 0 to 7"),
        ({"targets": torch.tensor([0, -100, 1])}, r"from -100 to 1"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, r"one floating dtype"),
        ({"hidden": torch.full((3, 4), torch.nan)}, r"finite, got NaN or inf in 3 of its rows"),
        ({"hidden": torch.tensor([[1.0] * 4, [torch.inf] * 4, [2.0] * 4])}, r"in 1 of its rows"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must be \[T\] bool .* got \[2\]"),
        ({"mask": torch.ones(3)}, r"mask must be .* torch.float32 on cpu"),
        ({"temperature": -1.0}, r"temperature must be above 0, got -1.0"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0.0"),
        ({"temperature": float("inf")}, r"temperature"),
        ({"temperature": float("nan")}, r"temperature"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
        "temperature": 1.0,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        token_logprobs(**arguments)
