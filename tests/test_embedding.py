"""The ops inside other trainers: torch.compile, autocast, torch.library's own checks, and a
plain transformers loop (recipes/embed_in_transformers.py).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmr1
from rmr1.kernels import (
    group_advantage,
    policy_loss_input,
    rmsnorm,
    rope,
    swiglu,
    token_logprob,
    token_logprob_cpu,
)
from rmr1.kernels import policy_loss as policy
from rmr1.kernels.dispatch import use
from rmr1.kernels.policy_loss import PolicyLossConfig
from rmr1.models import POCKET
from rmr1.tasks.catalog import draw_pairs

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
LOSS = PolicyLossConfig(beta=0.1, dual_clip=3.0, correction="truncate", normalize="sequence")
GSPO = PolicyLossConfig(ratio="sequence", beta=0, correction="mask_sequence")
Function = Callable[..., tuple[Tensor, ...]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, HEAD, WORDS = randn(9, 8), randn(17, 8, seed=1), torch.arange(9)
OLD = randn(9, seed=2) - 3
COUNTS = torch.tensor([1, 2, 3, 0, 1, 2, 1, 1, 1])


def head_of(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return rmr1.token_logprobs(x, w, WORDS, temperature=0.7, return_entropy=True)


def loss_of(config: PolicyLossConfig) -> Function:
    def run(new: Tensor) -> tuple[Tensor, ...]:
        loss, stats = rmr1.policy_loss(
            new, OLD, torch.tensor([1.0, -1.0, 0.5]), IDS,
            ref_logprobs=OLD + 0.1, rollout_logprobs=OLD - 0.2, config=config,
        )  # fmt: skip
        return loss, *stats.values()

    return run


def advantages_of(rewards: Tensor) -> tuple[Tensor, ...]:
    return (rmr1.group_advantages(rewards, IDS), rmr1.group_advantages(rewards, IDS, scale="none"))


def tokens_of(rewards: Tensor) -> tuple[Tensor, ...]:
    return (rmr1.group_advantages(rewards, IDS, token_counts=COUNTS),)


CASES: dict[str, tuple[Function, list[Tensor]]] = {
    "token_logprobs": (head_of, [X, HEAD]),
    "token_logprobs, masked": (
        lambda x, w: (rmr1.token_logprobs(x, w, WORDS, mask=COUNTS > 1),), [X, HEAD]
    ),
    "policy_loss": (loss_of(LOSS), [OLD + 0.3 * randn(9)]),
    "policy_loss, gspo": (loss_of(GSPO), [OLD + 0.1 * randn(9)]),
    "group_advantages": (advantages_of, []),
    "group_advantages, tokens": (tokens_of, []),
    "rmsnorm": (lambda x, w: (rmsnorm.rmsnorm(x, w, 1e-5),), [X, HEAD[0]]),
    "add_rmsnorm": (lambda x, a, w: rmsnorm.add_rmsnorm(x, a, w, 1e-5), [X, X + 1, HEAD[0]]),
    "rope": (lambda x: (rope.rope(x, X[:, None, :2], X[:, None, 2:4]),), [randn(9, 2, 4)]),
    "swiglu": (lambda g, u: (swiglu.swiglu(g, u),), [X, X + 1]),
}  # fmt: skip


def outcome(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of the first two."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*(leaves or [randn(9)]))
    found = [x.detach() for x in out]
    if leaves:
        total = sum((x * (i + 1)).sum() for i, x in enumerate(out[:2]) if x.requires_grad)
        found += torch.autograd.grad(total, leaves)
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_graph_break_equals_eager(name: str, backend: Any) -> None:
    function, inputs = CASES[name]
    with use(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, wanted = outcome(compiled, inputs), outcome(function, inputs)
    for one, truth in zip(found, wanted, strict=True):
        assert one.dtype == truth.dtype
        assert one.stride() == truth.stride()
        torch.testing.assert_close(one, truth)
    assert all(truth.abs().max() > 1e-3 for truth in wanted if truth.ndim)


@pytest.mark.usefixtures("fresh")
def test_one_graph_for_all_lengths_that_follows_use(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = token_logprob_cpu.forward
    monkeypatch.setattr(token_logprob_cpu, "forward", lambda *a: calls.append(1) or real(*a))

    def both(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        logprobs = rmr1.token_logprobs(x, w, ids)
        ones = torch.ones(3)
        return rmr1.policy_loss(logprobs, logprobs.detach() + 0.1, ones, ids, config=GRPO)[0]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (9, 6, 4):
            given = (randn(rows, 8).requires_grad_(), HEAD, IDS[:rows].clone())
            torch.testing.assert_close(compiled(*given), both(*given))
    assert len(calls) == 6
    with use("reference"):
        compiled(X, HEAD, IDS)
    assert len(calls) == 6


GRPO = PolicyLossConfig(beta=0, normalize="sequence")


@pytest.mark.usefixtures("fresh")
def test_a_compiled_op_refuses_bad_values() -> None:
    def compiled(function: Function) -> Function:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    with pytest.raises(ValueError, match="hidden must be finite"):
        compiled(head_of)(X * torch.nan, HEAD)
    with pytest.raises(ValueError, match="rewards must be finite"):
        compiled(advantages_of)(X[:, 0] * torch.inf)
    falling = compiled(lambda ids: rmr1.policy_loss(OLD, OLD, torch.ones(3), ids, config=GRPO)[:1])
    with pytest.raises(ValueError, match="sequence_ids must not decrease"):
        falling(IDS.flip(0))


def graded(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def ops(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every custom op with arguments of its own."""
    x, w, ones, table = graded(X), graded(HEAD), torch.ones(9), X[:, None, :2]
    _, entropy, peak, log_sum = token_logprob._forward(x, w, WORDS, 0.7, True, backend)
    saved = [one.detach() for one in (peak, log_sum, entropy)]
    flat = (X, HEAD, WORDS, *saved, ones, ones, 0.7, True, True, backend)
    advantages, weights = torch.tensor([1.0, -1.0, 0.5]), torch.full((3,), 0.1)
    starts, settings = torch.tensor([0, 3, 6, 9]), policy._settings(LOSS)
    return {
        "token_logprob": (token_logprob._forward, (x, w, WORDS, 0.7, True, backend)),
        "token_logprob_backward": (token_logprob._backward, flat),
        "policy_loss": (
            policy._op,
            (graded(OLD + 0.1), OLD, advantages, IDS, starts, weights, OLD, OLD, settings, backend),
        ),
        "sequence_starts": (policy_loss_input._op, (IDS, 3)),
        "group_advantages": (
            group_advantage._op, (OLD, IDS, True, False, COUNTS, 12, backend)
        ),
        "rmsnorm": (rmsnorm._op, (x, graded(X), graded(HEAD[0]), 1e-5, backend)),
        "rmsnorm_backward": (rmsnorm._backward_op, (X, X, X, HEAD[0], ones, backend)),
        "rope": (rope._op, (graded(randn(9, 2, 4)), table, table, backend, False)),
        "swiglu": (swiglu._op, (x, graded(X), backend)),
        "swiglu_backward": (swiglu._backward_op, (X, X, X, backend)),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", ops("native"))
def test_torch_finds_no_fault_in_a_custom_op(name: str, backend: str) -> None:
    op, arguments = ops(backend)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_under_autocast(backend: Any) -> None:
    """Factors are rounded as those of a linear layer are; everything after that is fp32, backward
    included, where autocast may be on as well.
    """
    leaves = [graded(X), graded(HEAD)]
    rounded = [graded(x.detach().bfloat16().float()) for x in leaves]
    exact = rmr1.token_logprobs(*rounded, WORDS)
    with use(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = rmr1.token_logprobs(*leaves, WORDS, return_entropy=True)
        loss, stats = rmr1.policy_loss(
            logprobs, exact.detach() + 0.1, torch.ones(3), IDS, config=GRPO
        )
        (slope,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
        advantages = rmr1.group_advantages(OLD, IDS)
        grads = torch.autograd.grad(loss, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = rmr1.token_logprobs(X.double(), HEAD.double(), WORDS)
    found = [logprobs, entropy, loss, slope, advantages, *grads]
    assert [one.dtype for one in found] == [torch.float32] * 7
    assert stats["ratio_mean"].isfinite()
    assert wide.dtype == torch.float64
    torch.testing.assert_close(logprobs, exact, atol=2e-6, rtol=0)
    wanted = torch.autograd.grad(exact, rounded, slope)
    for one, truth in zip(grads, wanted, strict=True):  # rounded to bf16 on their way back
        assert truth.abs().max() > 1e-3
        torch.testing.assert_close(one, truth, atol=2e-3, rtol=1e-2)


def test_backward_under_autocast_of_a_forward_outside() -> None:
    for backend in ("native", "triton"):
        leaves = [graded(X), graded(HEAD)]
        with use(backend):  # type: ignore[arg-type]
            loss = rmr1.token_logprobs(*leaves, WORDS).sum()
        wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_16_bit_log_probabilities_are_computed_in_fp32() -> None:
    new = (OLD + 0.1).bfloat16().requires_grad_()
    loss, _ = rmr1.policy_loss(
        new, OLD.bfloat16(), torch.ones(3), IDS, config=PolicyLossConfig(beta=0)
    )
    exact, _ = rmr1.policy_loss(
        new.double(), OLD.bfloat16().double(), torch.ones(3), IDS, config=PolicyLossConfig(beta=0)
    )
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 1e-6
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.dtype == torch.bfloat16
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n, (_, inputs) in CASES.items() if inputs])
def test_a_second_derivative_is_refused(name: str) -> None:
    function, inputs = CASES[name]
    leaves = [graded(x) for x in inputs]
    scale = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(
        (function(*leaves)[0] * scale).sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(grad.sum(), leaves[:1], retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_functorch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: rmr1.token_logprobs(x, HEAD, WORDS).sum())(X)


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location(
        "embed_in_transformers", ROOT / "recipes" / "embed_in_transformers.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_transformers_loop_learns(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(recipe, "SAMPLES", 6)
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = draw_pairs(2, seed=1, split="train")
    # Their log-probabilities and ours, of what the loop samples.
    prompt, ids = recipe.sample(model, tokenizer, pairs[0])
    live = recipe.spoken(ids[:, prompt:], tokenizer.eos_token_id)
    with torch.no_grad():
        logits = model(ids).logits[:, prompt - 1 : -1]
        theirs = logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0][live]
        hidden = model.model(ids).last_hidden_state[:, prompt - 1 : -1]
        ours = rmr1.token_logprobs(hidden[live], model.lm_head.weight, ids[:, prompt:][live])
    assert live[:, 0].all()
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    # SGD: unlike AdamW's, its step shows which gradients there were.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewards = []
    for _ in range(2):
        loss, reward = recipe.train_step(model, tokenizer, optimizer, pairs)
        assert abs(loss) < 10
        rewards.append(reward)
    assert all(-1 <= reward <= 1 for reward in rewards)
    assert max(rewards) > -1  # some verdict was right, so there was something to learn from
    changed = [name for name, value in model.state_dict().items() if (value != before[name]).any()]
    assert len(changed) == len(before)


def test_the_recipe_runs(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "SAMPLES", 2)
    monkeypatch.setattr(recipe, "NEW_TOKENS", 12)
    monkeypatch.setattr(sys, "argv", ["embed_in_transformers.py", "--steps", "1", "--pairs", "1"])
    recipe.main()
    assert capsys.readouterr().out.startswith("step 1  loss ")
