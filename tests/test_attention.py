"""Shared prompts in training: the same numbers as with a prompt for every response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmr1.engine.attention import PackedAttention
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.packing import Batch, Group, pack
from rmr1.engine.scorer import Scorer

CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
)


def groups_of(
    lengths: list[tuple[int, list[int]]], seed: int = 0
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and responses of given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(CONFIG.vocab_size, (count,), generator=generator).tolist()

    return [draw(p) for p, _ in lengths], [[draw(n) for n in responses] for _, responses in lengths]


def gradients(model: CausalLM, batch: Batch, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities and the gradient of a weighted sum of them."""
    model.zero_grad()
    logprobs, entropy = Scorer(model)(batch, 0.7)
    (logprobs * weights + 0.1 * entropy).sum().backward()
    return logprobs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


SHAPES = [
    [(9, [5, 5, 5])],
    [(1, [1, 1]), (2, [3, 1])],
    [(30, [4]), (17, [20, 3, 41, 2]), (5, [1])],
    [(300, [37, 80, 1, 12, 33]), (4, [70, 70, 70])],
]


@pytest.mark.parametrize("lengths", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_shared_prompts_change_nothing(
    lengths: list[tuple[int, list[int]]], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG).to(dtype)
    prompts, responses = groups_of(lengths)
    flat = [one for group in responses for one in group]
    alone = pack([p for p, g in zip(prompts, responses, strict=True) for _ in g], flat)
    parts = [pack([p], g, samples=len(g)) for p, g in zip(prompts, responses, strict=True)]
    shared = Batch(
        token_ids=torch.cat([part.token_ids for part in parts]),
        groups=tuple(part.groups[0] for part in parts),
        advantages=alone.advantages,
    )
    assert torch.equal(shared.targets, alone.targets)
    assert shared.tokens < alone.tokens or all(len(g) == 1 for g in responses)
    weights = torch.randn(alone.response_tokens, dtype=dtype)
    one, first = gradients(model, alone, weights)
    other, second = gradients(model, shared, weights)
    assert one.std() > 0.1 or len(one) < 5
    torch.testing.assert_close(other, one, rtol=0, atol=tolerance)
    for a, b in zip(first, second, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()
        assert a.norm() > 0


def test_a_sample_sees_its_prompt_and_itself_alone() -> None:
    """What is written into one sample, or another group, changes no other."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    prompts, responses = groups_of([(20, [6, 6, 6]), (11, [6, 6, 6])])
    batch = pack(prompts, [one for group in responses for one in group], samples=3)
    before = Scorer(model)(batch)[0].detach().view(6, 6)
    for sample in range(6):
        start = 20 + 6 * sample + (11 if sample > 2 else 0)
        tokens = batch.token_ids.clone()
        tokens[start + 2] = (tokens[start + 2] + 1) % CONFIG.vocab_size
        changed = Batch(tokens, batch.groups, batch.advantages)
        after = Scorer(model)(changed)[0].detach().view(6, 6)
        others = [other for other in range(6) if other != sample]
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-6)
        assert torch.equal(after[sample, :2], before[sample, :2]) or torch.allclose(
            after[sample, :2], before[sample, :2], atol=1e-6
        )
        assert (after[sample, 2:] - before[sample, 2:]).abs().max() > 1e-3
    tokens = batch.token_ids.clone()
    tokens[0] = (tokens[0] + 1) % CONFIG.vocab_size  # of the first prompt
    after = Scorer(model)(Batch(tokens, batch.groups, batch.advantages))[0].detach().view(6, 6)
    assert ((after[:3] - before[:3]).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(after[3:], before[3:], rtol=0, atol=1e-6)


def test_groups_that_do_not_fit_the_tokens_are_refused() -> None:
    attend = PackedAttention.of_groups([Group(3, (2, 2))])
    x = torch.zeros(8, 2, 4)
    with pytest.raises(ValueError, match="the sum of the lengths"):
        attend(0, x, x, x)
