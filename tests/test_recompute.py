"""What a backward pass keeps, in bytes, and that computing the rest anew changes no bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rmr1.engine import recompute
from rmr1.engine.memory_plan import activation_bytes
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import Recompute
from rmr1.engine.packing import Batch, pack
from rmr1.engine.scorer import Scorer
from rmr1.kernels.dispatch import interpreted, use

LLAMA = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, family="qwen2"),
    "qwen3": replace(LLAMA, family="qwen3", tie_word_embeddings=True),
}
KINDS: tuple[Recompute, ...] = get_args(Recompute)
NORMED, PRODUCT = 2 * 48 * 4, 80 * 4  # bytes of a token and layer that "elementwise" saves


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> CausalLM:
    config = CONFIGS[request.param]
    assert config.qkv_bias == (config.family == "qwen2")
    assert config.qk_norm == (config.family == "qwen3")
    return random_model(config)


def random_model(config: ModelConfig = LLAMA) -> CausalLM:
    """With norms and biases that are no ones and zeros."""
    torch.manual_seed(0)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What only the garbage collector could free is a leak."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def batch_of(tokens: int) -> Batch:
    quarter = tokens // 4
    batch = pack([[1, 2] * quarter], [[3] * quarter, [4] * quarter], samples=2)
    assert batch.tokens == tokens
    return batch


class Live(TorchDispatchMode):
    """Memory that was touched inside the block, by tensors, and is still there."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                self.seen[storage.cdata] = storage, x.untyped_storage().nbytes()
        return out

    def bytes(self) -> int:
        return sum(
            size
            for where, (storage, size) in self.seen.items()
            if where not in self.own and not storage.expired()
        )


def kept(model: CausalLM, tokens: int = 400) -> float:
    """Bytes a token, between forward and backward."""
    scorer, batch = Scorer(model), batch_of(tokens)
    with torch.no_grad():
        scorer(batch)  # what is made on first use
    with Live(model) as live:
        logprobs, _ = scorer(batch)
    held = live.bytes()
    del logprobs, _
    assert live.bytes() < 10_000 < held  # no cycle holds it
    return held / tokens


def result(model: CausalLM, backend: Any = None) -> list[Tensor]:
    """Log-probabilities and the gradient of every weight."""
    model.zero_grad()
    with use(backend) if backend else nullcontext():
        logprobs, _ = Scorer(model)(batch_of(24))
    logprobs.square().sum().backward()
    found = [logprobs.detach()]
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    assert all(x.abs().max() > 0 for x in wanted)
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_bit_changes(model: CausalLM, kind: Recompute, layers: int | None) -> None:
    model.recompute("none")
    wanted = result(model)
    model.recompute(kind, layers)
    of_layers = [layer.recompute for layer in model.model.layers]
    assert of_layers == [kind, kind, kind if layers is None else "none"]
    assert same(result(model), wanted)


def test_elementwise_keeps_less_by_what_it_computes_anew(
    model: CausalLM, no_collector: None
) -> None:
    unconfigured = kept(model)
    model.recompute("none")
    assert kept(model) - unconfigured == 3 * (NORMED + PRODUCT)


def test_what_is_kept_is_what_the_plan_says(model: CausalLM, no_collector: None) -> None:
    held, planned = {}, {}
    for kind in KINDS:
        model.recompute(kind)
        held[kind] = kept(model)
        planned[kind] = activation_bytes(model.config, torch.float32, kind, None)
    for larger, smaller in pairwise(KINDS):
        saved = planned[larger] - planned[smaller]
        assert held[larger] - held[smaller] == pytest.approx(saved, rel=0.05)


def test_without_gradients_nothing_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = random_model(), batch_of(24)
    wanted, _ = Scorer(model)(batch)
    monkeypatch.setattr(recompute, "saved_tensors_hooks", None)
    with torch.no_grad():
        assert torch.equal(Scorer(model)(batch)[0], wanted)
    with pytest.raises(TypeError, match="not callable"):
        Scorer(model)(batch)


def test_a_checkpoint_around_the_model_loses_nothing(no_collector: None) -> None:
    """torch asks the innermost hooks alone: ours would take tensors away from the checkpoint's."""
    model = random_model()
    wanted = result(model)
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    by_others = kept(model)
    assert same(result(model), wanted)
    model = random_model()
    model.recompute("layer")
    assert by_others == pytest.approx(kept(model), rel=0.01)


def test_where_the_op_keeps_no_inputs_its_result_is_kept(no_collector: None) -> None:
    """Holding them would cost more: the reference in bf16, and below all trained weights."""
    frozen = random_model().requires_grad_(False)
    frozen.model.layers[0].mlp.down_proj.requires_grad_(True)
    for model in (random_model().to(torch.bfloat16), frozen):
        by_default = kept(model)
        model.recompute("none")
        assert kept(model) == by_default


def test_sharded_weights_of_norms_are_left_alone(no_collector: None) -> None:
    """ZeRO-3 has released them when the next module's backward runs. That training is right there
    is tested in test_scorer.py.
    """
    model = random_model()
    wanted = result(model)
    for name, parameter in model.named_parameters():
        parameter.ds_id = name  # type: ignore[attr-defined]
    by_default = kept(model)
    assert same(result(model), wanted)
    model.recompute("none")
    assert kept(model) - by_default == 3 * PRODUCT


def test_changed_layers_are_followed() -> None:
    """A norm that somebody has patched, or whose result a hook changes, is not computed as ours."""

    def patched(model: CausalLM) -> list[Tensor]:
        norm = model.model.layers[1].input_layernorm
        original = norm.forward
        norm.forward = lambda x: original(x + 1)
        model.model.layers[2].input_layernorm.register_forward_hook(lambda m, x, y: y * 2)
        return result(model)

    plain = random_model()
    plain.recompute("none")
    wanted = patched(plain)
    assert same(patched(random_model()), wanted)


@pytest.mark.skipif(not interpreted(), reason="two kinds of kernels for one device")
def test_the_kernels_of_the_forward_compute_anew() -> None:
    """`use` has ended when the backward pass runs."""
    model = random_model()
    found = result(model, "triton")
    model.recompute("none")
    assert same(found, result(model, "triton"))
    assert not same(found, result(model, "native"))


@pytest.mark.parametrize("kind", ["none", "elementwise"])
def test_a_change_in_place_is_an_error(kind: Recompute) -> None:
    model = random_model()
    model.recompute(kind)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = q.square()
        q.detach().add_(1)
        return mixed

    hidden = model(torch.arange(9), torch.arange(9), attend)
    with pytest.raises(RuntimeError, match=r"modified (by an )?in ?place"):
        hidden.sum().backward()


def test_a_second_backward_gives_the_same() -> None:
    model = random_model()
    value = Scorer(model)(batch_of(24))[0].sum()
    once = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(value, list(model.parameters()))
    assert same(list(again), list(once))
