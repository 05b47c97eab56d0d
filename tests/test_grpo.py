"""The objectives by name, and that none depends on how an update is cut or packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import Batch, pack
from rmr1.engine.trainer import StepStats, Trainer, score
from rmr1.engine.updater import Local
from rmr1.grpo import _loss, objective_of
from rmr1.grpo_config import ADVANTAGES, GrpoConfig
from rmr1.kernels.policy_loss_config import variant
from rmr1.rewards import overlong

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)
PROMPTS = [[3, 7, 8, 9, 4, 4, 5], [11, 12], [5, 6, 7]]
RESPONSES = [
    *([5, 6, 1], [20, 21, 22, 23, 24, 25, 26, 1], [5]),
    *([6, 5, 6, 5, 1], [13, 14], [2, 2, 2, 3]),
    *([9, 9], [30, 29, 28, 27, 26, 25], [8, 1]),
]
CAP = 16
# Of old log-probabilities that are the generator's, there is nothing to correct.
CORRECTED: Any = {"old_logprobs": "recompute"}
ALL = {
    **{name: GrpoConfig(variant=name) for name in ADVANTAGES},  # type: ignore[arg-type]
    "truncate": GrpoConfig(**CORRECTED, correction="truncate", correction_high=1.01),
    "mask": GrpoConfig(**CORRECTED, correction="mask", correction_low=0.9, correction_high=1.1),
    "mask_sequence": GrpoConfig(
        **CORRECTED, correction="mask_sequence", correction_low=0.9, correction_high=1
    ),
    "dual_clip": GrpoConfig(dual_clip=1.05, kl="k1"),
    "k2, sequences": GrpoConfig(kl="k2", normalize="sequence", beta=0.5),
}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    torch.manual_seed(0)
    return Trainer(CausalLM(CONFIG), OptimConfig(max_grad_norm=1e9), total_updates=10)


def batches(model: CausalLM) -> tuple[Batch, Batch]:
    """Prompts shared, and a prompt for each; log-probabilities some way off the model's."""
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.3, 0.7, -1.0, 0.0, 2.0, -2.0])
    noise = torch.Generator().manual_seed(1)
    made = []
    for prompts, samples in (
        (PROMPTS, 3),
        ([prompt for prompt in PROMPTS for _ in range(3)], 1),
    ):
        batch = pack(prompts, RESPONSES, samples=samples, advantages=advantages)
        if not made:
            exact = score(model, batch)
            old, ref, rollout = (
                exact + scale * torch.randn(len(exact), generator=noise)
                for scale in (0.2, 0.3, 0.0)
            )
            rollout = old + 0.05 * torch.randn(len(exact), generator=noise)
        batch = batch.with_logprobs(old=old, ref=ref)
        made.append(replace(batch, rollout_logprobs=rollout))
    return made[0], made[1]


def update(
    trainer: Trainer, batch: Batch, config: GrpoConfig, micro: int, patch: pytest.MonkeyPatch
) -> tuple[StepStats, Tensor]:
    """An update whose optimiser step is replaced by a look at the gradient, in one vector."""
    objective = objective_of(config, CAP)
    if not config.beta:
        batch = replace(batch, ref_logprobs=None)
    seen: list[Tensor] = []

    def look() -> None:
        found = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        seen.append(torch.cat([grad.flatten() for grad in found]))

    assert isinstance(trainer.updater, Local)
    patch.setattr(trainer.updater.optimizer.adamw, "step", look)
    patch.setattr(trainer, "max_micro_tokens", micro)
    stats = trainer.update(batch, _loss(objective), per_token=objective.per_token)
    return stats, seen[0]


@pytest.mark.parametrize("name", ALL)
def test_an_update_does_not_depend_on_how_it_is_cut_or_packed(
    trainer: Trainer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, alone = batches(trainer.model)
    whole, gradient = update(trainer, shared, ALL[name], 10_000, monkeypatch)
    assert gradient.norm() > 1e-3
    assert whole.extra["logprob_mismatch_max"] > 0.1
    for batch, micro in ((shared, 1), (shared, 14), (alone, 10_000), (alone, 1)):
        stats, other = update(trainer, batch, ALL[name], micro, monkeypatch)
        assert (other - gradient).norm() < 1e-5 * gradient.norm()
        assert stats.loss == pytest.approx(whole.loss, rel=1e-4, abs=1e-6)
        assert stats.entropy == pytest.approx(whole.entropy, rel=1e-5)
        for key, value in whole.extra.items():
            assert stats.extra[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_objectives_differ(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting reaches the gradient: no two are the same.

    But RLOO without its advantages, and CISPO where nothing is clipped: r A is both their slopes.
    """
    shared, _ = batches(trainer.model)
    found = {
        name: update(trainer, shared, config, 10_000, monkeypatch)[1]
        for name, config in ALL.items()
        if name != "rloo"
    }
    names = list(found)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            apart = (found[one] - found[other]).norm() / found[one].norm()
            assert apart > 1e-4, (one, other)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_variant_is_what_is_published(name: str) -> None:
    config = GrpoConfig(variant=name)  # type: ignore[arg-type]
    published = variant(name, max_length=CAP)
    if published.clip_high == float("inf"):
        published = replace(published, clip_high=1e9)
    assert objective_of(config, CAP) == published
    assert config.scale == ("none" if name in ("dr_grpo", "rloo") else "std")
    assert config.baseline == ("loo" if name == "rloo" else "mean")


def test_a_key_wins_over_the_variant() -> None:
    config = GrpoConfig(variant="dapo", clip_high=0.5, beta=0.1)
    assert (config.clip_low, config.clip_high, config.beta) == (0.2, 0.5, 0.1)
    # What a run writes down holds every key, and is read back the same.
    assert GrpoConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"variant": "ppo"}, "variant"),
        ({"ratio": "sequence", "objective": "cispo"}, "ratio must be token"),
        ({"correction_high": 0.5}, "correction_high must be above"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"correction": "mask"}, 'corrects nothing with grpo.old_logprobs = "rollout"'),
    ],
)
def test_objectives_that_cannot_be_meant(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GrpoConfig(**wrong)  # type: ignore[arg-type]


def test_overlong_answers_lose_up_to_one() -> None:
    assert overlong([1, 90, 95, 99, 100], 100, 10) == pytest.approx([0, 0, -0.5, -0.9, -1])
