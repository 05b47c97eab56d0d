"""A whole policy update with every op in Triton, against the native kernels: loss, statistics and
the gradient of every weight. On a machine without a GPU the interpreter runs it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.engine.attention import PackedAttention
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.kernels import dispatch
from rmr1.kernels.dispatch import interpreted, use
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss, variant
from rmr1.kernels.token_logprob import token_logprobs

WORDS = 83
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": ModelConfig(family="llama", **SIZES),
    "qwen3": ModelConfig(family="qwen3", tie_word_embeddings=True, **SIZES),
}
OPS = {"token_logprobs", "policy_loss", "group_advantages", "rmsnorm", "add_rmsnorm", "rope"}
OPS |= {"swiglu"}
LOSSES = {
    "rm_r1": PolicyLossConfig(beta=0.1),
    "gspo": variant("gspo"),
    "dapo": PolicyLossConfig(clip_high=0.28, beta=0, dual_clip=3.0, correction="mask"),
}


# Two prompts with three responses each, in tokens.
PROMPTS, RESPONSES = (2, 2, 2, 3, 3, 3), (3, 1, 4, 2, 2, 3)


def update(model: CausalLM) -> dict[str, Tensor]:
    """Everything an update computes, by name, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    device = model.lm_head_weight.device
    lengths = [a + b for a, b in zip(PROMPTS, RESPONSES, strict=True)]
    token_ids = torch.randint(0, WORDS, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequences = torch.arange(6).repeat_interleave(torch.tensor(lengths))
    responding = (positions >= torch.tensor(PROMPTS)[sequences]).nonzero().squeeze(1)  # [R]
    token_ids, positions, sequences, responding = (
        x.to(device) for x in (token_ids, positions, sequences, responding)
    )

    def near(values: Tensor, scale: float) -> Tensor:
        drawn = torch.randn(values.shape, generator=generator)
        return values.detach() + scale * drawn.to(device)

    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0], device=device)
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1], device=device))
    hidden = model(token_ids, positions, PackedAttention(lengths))
    logprobs, entropy = token_logprobs(
        hidden[responding - 1], model.lm_head_weight, token_ids[responding],
        temperature=0.8, return_entropy=True,
    )  # fmt: skip
    found = {"advantages": advantages, "logprobs": logprobs, "entropy": entropy}
    near_old, near_ref, near_rollout = near(logprobs, 0.1), near(logprobs, 0.3), near(logprobs, 0.2)
    for name, config in LOSSES.items():
        loss, stats = policy_loss(
            logprobs, near_old, advantages, sequences[responding],
            ref_logprobs=near_ref, rollout_logprobs=near_rollout, config=config,
        )  # fmt: skip
        found |= {f"loss {name}": loss} | {f"{key} {name}": value for key, value in stats.items()}
    total = sum(found[f"loss {name}"] for name in LOSSES) + 0.01 * entropy.mean()
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(total, list(parameters.values()))
    found |= {f"gradient of {n}": g for n, g in zip(parameters, grads, strict=True)}
    return {key: value.detach().cpu() for key, value in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_an_update_equals_the_native_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = CausalLM(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases too
    with use("native"):
        wanted = update(model)
    ran: list[str] = []
    real = dispatch._refuse_without_triton
    monkeypatch.setattr(
        dispatch, "_refuse_without_triton", lambda op, *a: ran.append(op) or real(op, *a)
    )
    with use("triton"):
        found = update(model.to("cpu" if interpreted() else "cuda"))
    # Each was asked for in Triton, none was left out. Attention has none: it is torch's own there.
    assert set(ran) - {"packed_attention", "varlen_attention"} == OPS
    assert found.keys() == wanted.keys()
    for key, truth in wanted.items():
        assert (found[key] - truth).abs().max() <= 1e-4, key
        if key.startswith(("gradient", "loss", "logprobs", "entropy", "advantages")):
            assert truth.abs().max() > 1e-4, f"a parity of zeros: {key}"
    assert sum(key.startswith("gradient") for key in wanted) == len(list(model.parameters()))
