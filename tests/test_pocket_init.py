"""The wired starting weights of the pocket model."""

from __future__ import annotations

import pytest
import torch

from rmr1.engine.attention import PackedAttention
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.pocket import MODEL
from rmr1.pocket_init import wire_copying


def fresh(**changed: object) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig.from_dict({**MODEL, **changed}))


@torch.no_grad()
def continued(model: CausalLM, *, texts: int = 8, length: int = 60) -> float:
    """Share of tokens of a random text that the model predicts as it reads the text again."""
    drawn = torch.Generator().manual_seed(1)
    right = 0
    for _ in range(texts):
        once = torch.randint(300, MODEL["vocab_size"], (length,), generator=drawn)
        text = torch.cat([once, once])
        positions = torch.arange(2 * length)
        hidden = model(text, positions, PackedAttention((2 * length,)))
        said = (hidden[length:-1] @ model.lm_head_weight.T).argmax(-1)
        right += int((said == once[1:]).sum())
    return right / (texts * (length - 1))


def test_a_repeated_text_is_continued_before_any_training() -> None:
    model = fresh()
    assert continued(model) < 0.02
    wire_copying(model)
    assert continued(model) > 0.4


def test_every_weight_can_still_learn() -> None:
    """Nothing is frozen and nothing wired so hard that its gradient is gone."""
    model = fresh()
    wire_copying(model)
    text = torch.randint(
        300, MODEL["vocab_size"], (40,), generator=torch.Generator().manual_seed(2)
    )
    hidden = model(text, torch.arange(40), PackedAttention((40,)))
    torch.nn.functional.cross_entropy((hidden @ model.lm_head_weight.T)[:-1], text[1:]).backward()
    for name, weight in model.named_parameters():
        # A shift of all keys leaves a softmax as it is, so a bias on k may have none.
        if not name.endswith("k_proj.bias"):
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "changed",
    [
        {"attention_bias": False},
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"num_key_value_heads": 2},
    ],
    ids=["no biases", "odd heads", "grouped heads"],
)
def test_a_model_that_cannot_be_wired_is_refused(changed: dict[str, object]) -> None:
    model = fresh(**changed)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(ValueError, match="wire_copying needs biases on q and k"):
        wire_copying(model)
    for weight, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
