"""The learning-rate schedule, AdamW against its formula, and its state there and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import OptimConfig, learning_rate
from rmr1.engine.optimizer import Optimizer
from rmr1.engine.packing import pack
from rmr1.engine.scorer import Scorer


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 3, [1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        # (1 + cos(pi s)) / 2 at s = 0, 1/4, 1/2, 3/4
        ("cosine", 4, [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447]),
        ("linear", 9, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9, 6 / 9, 7 / 9, 8 / 9]),
    ],
)
def test_schedule(schedule: Any, warmup: int, expected: list[float]) -> None:
    config = OptimConfig(learning_rate=0.02, schedule=schedule, warmup_steps=warmup)
    found = [learning_rate(config, update, 8) for update in range(8)]
    assert found == pytest.approx([0.02 * share for share in expected], rel=1e-5)


def test_schedules_end_at_zero_and_stay_there() -> None:
    for schedule in ("linear", "cosine"):
        config = OptimConfig(schedule=schedule, warmup_steps=2)
        assert learning_rate(config, 10, 10) == 0
        assert learning_rate(config, 12, 10) == 0


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def descend(net: nn.Module, optimizer: Optimizer, updates: range) -> dict[str, Tensor]:
    """Some updates; the gradients of the last one."""
    gradients = {}
    for update in updates:
        x = torch.randn(11, 5, generator=torch.Generator().manual_seed(update))
        optimizer.backward(net(x.to(next(net.parameters()).dtype)).square().mean())
        gradients = {
            name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None
        }
        assert optimizer.step(0.01) > 0
        assert all(parameter.grad is None for parameter in net.parameters())
    return gradients


def test_adamw_equals_its_formula_and_decays_matrices_only() -> None:
    config = OptimConfig(
        learning_rate=0.01,
        weight_decay=0.3,
        beta1=0.8,
        beta2=0.95,
        eps=1e-3,
        max_grad_norm=1e9,
    )
    net = tiny_net()
    optimizer = Optimizer(net, config)
    expected = {name: p.detach().double() for name, p in net.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for update in range(1, 4):
        gradients = descend(net, optimizer, range(update, update + 1))
        for name in expected:
            g = gradients[name].double()
            decay = 0.3 if name in ("0.weight", "2.weight") else 0.0
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            m, v = first[name] / (1 - 0.8**update), second[name] / (1 - 0.95**update)
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * m / (v.sqrt() + 1e-3)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameter, tiny_net().get_parameter(name))


def test_the_optimizer_is_fused() -> None:
    assert Optimizer(tiny_net(), OptimConfig()).adamw.param_groups[0]["fused"] is True


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in tensors.items()}


def test_state_survives_a_file_bit_for_bit(tmp_path: Path) -> None:
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1)
    net = tiny_net()
    optimizer = Optimizer(net, config)
    assert dict(optimizer.state()) == {}
    descend(net, optimizer, range(3))
    saved = dict(optimizer.state())
    assert saved.keys() == {
        f"{state}.{name}"
        for state in ("step", "exp_avg", "exp_avg_sq")
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")
    }
    file = tmp_path / "state.safetensors"
    save_file(saved, file)
    before = file.read_bytes()

    twin = tiny_net()
    twin.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    other = Optimizer(twin, config)
    other.restore(load_file(file).items())
    assert bits(dict(other.state())) == bits(saved)
    descend(net, optimizer, range(3, 6))
    descend(twin, other, range(3, 6))
    assert bits(dict(twin.named_parameters())) == bits(dict(net.named_parameters()))
    assert bits(dict(other.state())) == bits(dict(optimizer.state()))
    # Without the restored moments the twin would have gone elsewhere.
    lost = tiny_net()
    descend(lost, Optimizer(lost, config), range(3, 6))
    assert bits(dict(lost.named_parameters())) != bits(dict(net.named_parameters()))
    assert file.read_bytes() == before  # going on does not write into the file it came from


def test_weights_in_16_bits_are_trained_through_copies_in_32(tmp_path: Path) -> None:
    """Steps that are lost in bf16 one by one add up in the copies, which a file keeps."""
    config = OptimConfig(learning_rate=1e-5)
    net = tiny_net().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = Optimizer(net, config)
    for _ in range(3):
        optimizer.backward(net(torch.ones(2, 5, dtype=torch.bfloat16)).square().mean())
        optimizer.step(1e-5)
    saved = dict(optimizer.state())
    weight, master = net.get_parameter("0.weight"), saved["master.0.weight"]
    assert master.dtype == saved["exp_avg.0.weight"].dtype == torch.float32
    moved = (master - before["0.weight"].float()).abs()
    assert moved.max() == pytest.approx(3e-5, rel=0.1)
    assert torch.equal(weight, master.to(torch.bfloat16))

    file = tmp_path / "state.safetensors"
    save_file(saved, file)
    twin = tiny_net().to(torch.bfloat16)
    twin.load_state_dict(net.state_dict())
    other = Optimizer(twin, config)
    other.restore(load_file(file).items())
    assert bits(dict(other.state())) == bits(saved)


def test_gradients_in_16_bits_are_added_up_in_32() -> None:
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(net, OptimConfig(max_grad_norm=1e9))
    for value in (256.0, 1.0, 1.0):  # in bf16 256 + 1 is 256
        optimizer.backward(net.weight.sum() * value)
    assert optimizer.step(1e-3) == 258.0


@pytest.mark.parametrize("kind", ["elementwise", "layer"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_in_16_bits_are_let_go_of_one_by_one(kind: Any, tied: bool) -> None:
    """Each goes to its fp32 copy as soon as it is whole, and no bit is another."""
    config = ModelConfig(
        family="qwen3",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = CausalLM(config).to(torch.bfloat16)
    model.recompute(kind)
    parameters = dict(model.named_parameters())
    batches = [pack([[3, 7, 9]], [[4, 5, 6, 1], [20, 1]], samples=2), pack([[8, 9]], [[7, 1]])]
    sums: dict[str, Tensor] = {}
    for batch in batches:
        Scorer(model)(batch)[0].sum().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            more = parameter.grad.float()
            sums[name] = sums[name].add_(more) if name in sums else more
            parameter.grad = None

    optimizer = Optimizer(model, OptimConfig())
    alive: list[int] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters.values()))
        )
        for parameter in parameters.values()
    ]
    for batch in batches:
        optimizer.backward(Scorer(model)(batch)[0].sum())
    assert len(alive) == 2 * len(parameters)
    assert set(alive) == {1}
    assert bits({n: m.grad for n, m in optimizer._masters.items() if m.grad is not None}) == bits(
        sums
    )
    for hook in hooks:
        hook.remove()
    # Somebody else's backward pass finds its gradients where torch leaves them.
    Scorer(model)(batches[0])[0].sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())


def test_a_backward_pass_that_fails_leaves_no_hook() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(net, OptimConfig())
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.backward(Fails.apply(net.weight).sum())
    assert not net.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    net = tiny_net()
    optimizer = Optimizer(net, OptimConfig(learning_rate=0.1))
    descend(net, optimizer, range(1))
    weights, state = bits(dict(net.named_parameters())), bits(dict(optimizer.state()))
    net(torch.full((2, 5), value)).sum().backward()
    assert not math.isfinite(optimizer.step(0.1))
    assert bits(dict(net.named_parameters())) == weights
    assert bits(dict(optimizer.state())) == state
    descend(net, optimizer, range(1, 2))
    assert bits(dict(net.named_parameters())) != weights


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"exp_avg.9.weight": torch.zeros(1)}, "holds '9.weight', which the model does not have"),
        ({"exp_avg.0.weight": torch.zeros(7, 4)}, r"0.weight has shape \[7, 4\], .* \[7, 5\]"),
    ],
)
def test_state_of_another_model_is_refused(tensors: dict[str, Tensor], words: str) -> None:
    net = tiny_net()
    with pytest.raises(ValueError, match=words):
        Optimizer(net, OptimConfig()).restore(tensors.items())


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0}, {"beta2": 1}, {"warmup_steps": -1}, {"schedule": "step"}, {"lr": 1e-3}],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        OptimConfig(**wrong)
