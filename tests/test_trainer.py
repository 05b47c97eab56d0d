"""Updates against transformers + autograd; what they must not depend on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rmr1.distill import nll
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import Batch, Counts, Responses, pack
from rmr1.engine.trainer import Loss, StepStats, Trainer, score
from rmr1.engine.updater import Local
from rmr1.engine.weights import load_model
from rmr1.kernels import token_loss_cpu
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss

PROMPTS = [[3, 7, 8, 9], [3, 10], [3, 4, 5, 6, 7, 8, 9, 10, 11], [12], [3, 7, 8, 9]]
RESPONSES = [[5, 6, 1], [20, 21, 22, 23, 24, 25, 26, 1], [5], [6, 5, 6, 5, 1], [13, 14]]
# No clipping: gradients are compared as they come.
CONFIG = OptimConfig(learning_rate=1e-2, max_grad_norm=1e9)


@pytest.fixture(params=["qwen3", "llama"])
def directory(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    if request.param == "qwen3":
        return tiny_model
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, vocab_size=31, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def gradients_of_update(
    trainer: Trainer, batch: Batch, loss: Loss, patch: pytest.MonkeyPatch, per_token: bool = False
) -> tuple[StepStats, dict[str, Tensor]]:
    """Make an update whose optimiser step is replaced by a look at the gradients."""
    seen: dict[str, Tensor] = {}

    def look() -> None:
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None, name
            seen[name] = parameter.grad.clone()

    assert isinstance(trainer.updater, Local)
    patch.setattr(trainer.updater.optimizer.adamw, "step", look)
    return trainer.update(batch, loss, per_token=per_token), seen


def their_logprobs(theirs: nn.Module, temperature: float) -> list[Tensor]:
    """Log-probabilities of each response's tokens by transformers, one sequence at a time."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        every = (logits / temperature).log_softmax(-1)
        rows.append(every[torch.arange(len(response)), torch.tensor(response)])
    return rows


def assert_same_gradients(found: dict[str, Tensor], theirs: nn.Module) -> None:
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("per_token", [True, False])
def test_sft_loss_and_gradients_equal_transformers(
    directory: Path, monkeypatch: pytest.MonkeyPatch, per_token: bool
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = their_logprobs(theirs, 1.0)
    expected = -torch.cat(rows).mean()
    expected.backward()

    trainer = Trainer(load_model(directory), CONFIG, total_updates=1, max_micro_tokens=16)
    batch = pack(PROMPTS, RESPONSES)
    stats, found = gradients_of_update(trainer, batch, nll, monkeypatch, per_token)
    assert stats.loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(found, theirs)
    norm = torch.cat([g.flatten() for g in found.values()]).norm().item()
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)


def test_grpo_gradients_equal_transformers_and_a_plain_loop(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    temperature, beta, low, high = 0.7, 0.3, 0.1, 0.2
    advantages = [1.0, -0.5, 2.0, -1.5, 0.5]
    generator = torch.Generator().manual_seed(3)
    rows = their_logprobs(theirs, temperature)
    # Ratios of exp(0.4) and exp(-0.4) in turn: past both bounds, for either sign of the advantage.
    old = [row.detach() - 0.4 * (-1.0) ** torch.arange(len(row)) for row in rows]
    ref = [row.detach() + 0.3 * torch.randn(len(row), generator=generator) for row in rows]
    total = torch.zeros(())
    for row, olds, refs, advantage in zip(rows, old, ref, advantages, strict=True):
        for t in range(len(row)):
            ratio = (row[t] - olds[t]).exp()
            gap = refs[t] - row[t]
            gain = torch.minimum(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)
            total = total - gain + beta * (gap.exp() - 1 - gap)
    expected = total / sum(map(len, RESPONSES))
    expected.backward()

    config = PolicyLossConfig(clip_low=low, clip_high=high, beta=beta)

    def loss(
        logprobs: Tensor, tokens: Responses, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert tokens.old_logprobs is not None
        return policy_loss(
            logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            tokens.sequence_ids,
            ref_logprobs=tokens.ref_logprobs,
            config=config,
            token_count=counts.tokens,
        )

    batch = pack(PROMPTS, RESPONSES, advantages=torch.tensor(advantages))
    batch = batch.with_logprobs(old=torch.cat(old), ref=torch.cat(ref))
    results = []
    # All at once, a few sequences at a time, one at a time; and three tokens at a time in the head.
    monkeypatch.setattr(token_loss_cpu, "CHUNK_BYTES", 3 * 4 * 28)
    for limit, per_token in ((10**6, False), (16, False), (1, False), (10**6, True), (16, True)):
        trainer = Trainer(
            load_model(directory),
            CONFIG,
            total_updates=1,
            max_micro_tokens=limit,
            temperature=temperature,
        )
        stats, found = gradients_of_update(trainer, batch, loss, monkeypatch, per_token)
        assert stats.loss == pytest.approx(expected.item(), abs=1e-5), limit
        assert_same_gradients(found, theirs)
        results.append(stats)
    assert results[0].extra["clip_ratio/high_mean"] > 0
    assert results[0].extra["clip_ratio/low_mean"] > 0
    assert results[0].extra["ratio_max"] > 1.2
    for stats in results[1:]:
        assert stats.entropy == pytest.approx(results[0].entropy, rel=1e-5)
        assert stats.extra == pytest.approx(results[0].extra, rel=1e-4)


def test_score_and_entropy_equal_transformers(directory: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = load_model(directory)
    batch = pack(PROMPTS, RESPONSES)
    for temperature in (1.0, 0.5):
        expected = torch.cat(their_logprobs(theirs, temperature)).detach()
        for limit in (10**6, 1):
            found = score(model, batch, max_micro_tokens=limit, temperature=temperature)
            assert not found.requires_grad
            assert (found - expected).abs().max() < 3e-5
    entropies = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    trainer = Trainer(model, CONFIG, total_updates=1)
    entropy = trainer.update(batch, nll).entropy
    assert entropy == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


def test_a_mean_per_micro_batch_would_be_noticed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code's loss, on this data, does depend on the micro-batch size."""

    def published(
        logprobs: Tensor, tokens: Responses, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -logprobs.mean(), {}

    found = []
    for limit in (10**6, 1):
        trainer = Trainer(load_model(tiny_model), CONFIG, total_updates=1, max_micro_tokens=limit)
        _, gradients = gradients_of_update(
            trainer, pack(PROMPTS, RESPONSES), published, monkeypatch
        )
        found.append(gradients["model.embed_tokens.weight"])
    assert not torch.allclose(found[0], found[1] / len(PROMPTS), rtol=1e-2, atol=1e-5)


def test_gradients_are_scaled_down_to_the_norm(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OptimConfig(max_grad_norm=0.01)
    trainer = Trainer(load_model(tiny_model), config, total_updates=1)
    stats, found = gradients_of_update(trainer, pack(PROMPTS, RESPONSES), nll, monkeypatch)
    assert stats.grad_norm > 0.1  # reported as it was before
    norm = torch.cat([g.flatten() for g in found.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_updates_follow_the_schedule_and_lower_the_loss(tiny_model: Path) -> None:
    config = OptimConfig(learning_rate=1e-2, schedule="linear", warmup_steps=2)
    trainer = Trainer(load_model(tiny_model), config, total_updates=8)
    batch = pack(PROMPTS, RESPONSES)
    stats = [trainer.update(batch, nll) for _ in range(8)]
    shares = [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [one.learning_rate for one in stats] == pytest.approx([1e-2 * s for s in shares])
    assert trainer.updates == 8
    assert stats[0].loss == pytest.approx(math.log(28), abs=1)
    assert stats[-1].loss < stats[0].loss - 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_alone(
    tiny_model: Path, value: float
) -> None:
    def broken(
        logprobs: Tensor, tokens: Responses, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return logprobs.sum() * value, {}

    trainer = Trainer(load_model(tiny_model), CONFIG, total_updates=4)
    batch = pack(PROMPTS, RESPONSES)
    trainer.update(batch, nll)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    state = {name: value.clone() for name, value in trainer.updater.state()}
    stats = trainer.update(batch, broken)
    assert not math.isfinite(stats.grad_norm)
    assert trainer.updates == 2
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None  # nothing of it is left for the next update
    after = dict(trainer.updater.state())
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert math.isfinite(trainer.update(batch, nll).grad_norm)
    assert not torch.equal(trainer.model.lm_head_weight, before["model.embed_tokens.weight"])
