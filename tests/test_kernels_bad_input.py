"""What cannot be meant is a ValueError that names the argument, in every op and implementation,
before a kernel runs; nothing at all (T = 0) is a defined result; C++ takes arrays as they lie or
not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels import (
    group_advantage_triton,
    policy_loss_triton,
    rmsnorm_triton,
    rope_triton,
    swiglu_triton,
    token_logprob_cpu,
    token_logprob_triton,
    token_loss_cpu,
    token_loss_triton,
)
from rmr1.kernels.dispatch import use
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.kv_store import new_cache
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss
from rmr1.kernels.rmsnorm import add_rmsnorm, rmsnorm
from rmr1.kernels.rope import rope
from rmr1.kernels.swiglu import swiglu
from rmr1.kernels.token_logprob import token_logprobs
from rmr1.kernels.token_loss import token_loss

NAN, INF = float("nan"), float("inf")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
KERNELS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (_C, ("logit_stats", "logit_gradient", "policy_loss", "group_advantages", "rmsnorm", "rope")),
    (_C, ("rmsnorm_backward", "swiglu", "swiglu_backward")),
    (token_logprob_cpu, ("forward", "backward")),
    (token_logprob_triton, ("forward", "backward")),
    (token_loss_cpu, ("Chunk",)),
    (token_loss_triton, ("Chunk",)),
    (policy_loss_triton, ("policy_loss",)),
    (group_advantage_triton, ("group_advantages",)),
    (rmsnorm_triton, ("forward", "backward")),
    (rope_triton, ("turn",)),
    (swiglu_triton, ("forward", "backward")),
)


@pytest.fixture
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was run on bad input")

    for module, names in KERNELS:
        for name in names:
            monkeypatch.setattr(module, name, refuse)


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


def whole(*values: int, **options: Any) -> Tensor:
    return torch.tensor(values, **options)


META: dict[str, Any] = {"device": "meta"}
HEAD: dict[str, Any] = {
    "hidden": ones(3, 4), "weight": ones(7, 4), "targets": whole(0, 6, 2), "temperature": 1.0
}  # fmt: skip
LOSS: dict[str, Any] = {
    "logprobs": -ones(3),
    "old_logprobs": -ones(3),
    "advantages": ones(2),
    "sequence_ids": whole(0, 0, 1),
    "ref_logprobs": -ones(3),
    "rollout_logprobs": -ones(3),
    "config": PolicyLossConfig(normalize="sequence"),
}
GROUP: dict[str, Any] = {
    "rewards": ones(3), "group_ids": whole(0, 0, 1), "token_counts": whole(1, 2, 3)
}  # fmt: skip
NORM: dict[str, Any] = {"x": ones(2, 4), "weight": ones(4), "eps": 1e-5}
ADD: dict[str, Any] = {**NORM, "added": ones(2, 4)}
TURN: dict[str, Any] = {"x": ones(3, 2, 4), "cos": ones(3, 1, 2), "sin": ones(3, 1, 2)}
GATE: dict[str, Any] = {"gate": ones(2, 4), "up": ones(2, 4)}


def token_loss_of(**arguments: Any) -> Tensor:
    return token_loss(loss=lambda logprobs, _: -logprobs.sum(), **arguments)[0]


HEAD_CASES: list[tuple[dict[str, Any], str]] = [
    ({"hidden": ones(4)}, r"hidden must be \[T, H\] .*got \[4\]"),
    ({"hidden": ones(3, 0), "weight": ones(7, 0)}, r"H above 0, .*got \[3, 0\] and \[7, 0\]"),
    ({"weight": ones(7, 5)}, r"weight \[V, H\], .*and \[7, 5\]"),
    ({"targets": ones(3)}, "targets must be .*int64.*float32"),
    ({"targets": whole(0, 1)}, r"targets must be .*got \[2\]"),
    ({"targets": whole(0, 7, 2)}, r"targets must be in \[0, 7\), got values from 0 to 7"),
    ({"targets": whole(0, -100, 2)}, "targets .*from -100 to 2"),
    ({"weight": ones(0, 4)}, r"targets must be in \[0, 0\)"),
    ({"hidden": ones(3, 4).half()}, "hidden and weight must share .*float16 and torch.float32"),
    (
        {"hidden": ones(3, 4).long(), "weight": ones(7, 4).long()},
        "hidden and weight must share one floating dtype, got torch.int64",
    ),
    ({"hidden": ones(3, 4, **META)}, "hidden, weight and targets must be on one device, got meta"),
    ({"weight": ones(7, 4, **META)}, "one device, got cpu, meta and cpu"),
    ({"targets": whole(0, 1, 2, **META)}, "one device, got cpu, cpu and meta"),
    ({"hidden": ones(3, 4) * NAN}, "hidden must be finite, got NaN or inf in 3 of its rows"),
    ({"hidden": torch.eye(3, 4) * -INF}, "hidden must be finite"),
    *[({"temperature": t}, f"temperature must be above 0, got {t}") for t in (-1.0, 0.0, NAN, INF)],
]
MASK_CASES: list[tuple[dict[str, Any], str]] = [
    ({"mask": ones(3)}, r"mask must be \[T\] bool .*float32"),
    ({"mask": ones(2).bool()}, r"mask must be .* T = 3, got \[2\]"),
    ({"mask": ones(3, **META).bool()}, "mask must be .*on meta"),
    ({"mask": ones(3).bool(), "targets": whole(0, 7, 2)}, "targets .*from 0 to 7"),
]
LOSS_CASES: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": ones(3).long()}, "logprobs must be a floating vector .*int64"),
    ({"logprobs": ones(())}, r"logprobs must be a floating vector .*shape \(\)"),
    *[
        case
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")
        for case in (
            ({name: ones(2)}, rf"{name} must have the shape .*got \(2,\)"),
            ({name: ones(3).long()}, f"{name} must be floating, got torch.int64"),
            ({name: ones(3, **META)}, f"{name} must be on cpu, got meta"),
        )
    ],
    ({"advantages": ones(2, 1)}, r"advantages must be a vector \[S\] .*\(2, 1\)"),
    ({"advantages": whole(1, 1)}, "advantages must be floating, got torch.int64"),
    ({"advantages": ones(2, **META)}, "advantages must be a vector .*on meta"),
    ({"sequence_ids": whole(0, 0, 1).int()}, "sequence_ids must be int64, got torch.int32"),
    ({"sequence_ids": whole(0, 0, 1, **META)}, "sequence_ids must be on cpu, got meta"),
    ({"sequence_ids": whole(0, 1, 0)}, "sequence_ids must not decrease"),
    ({"sequence_ids": whole(0, 1, 2)}, r"sequence_ids must lie in 0\.\.1 .*got 0\.\.2"),
    ({"sequence_ids": whole(-1, 0, 1)}, r"sequence_ids must lie in .*got -1\.\.1"),
    ({"token_count": 0}, "token_count must be above 0, got 0"),
    ({"token_count": -3}, "token_count must be above 0, got -3"),
    ({"sequence_count": 0}, "sequence_count must be above 0, got 0"),
    ({"sequence_lengths": whole(3)}, r"sequence_lengths must be int64 .*got .*\(1,\)"),
    ({"sequence_lengths": ones(2)}, "sequence_lengths must be int64 .*float32"),
    ({"sequence_lengths": whole(2, 1, **META)}, "sequence_lengths must be .*on meta"),
]
GROUP_CASES: list[tuple[dict[str, Any], str]] = [
    ({"rewards": ones(3, 1)}, r"rewards and group_ids must be two vectors .*\(3, 1\)"),
    ({"group_ids": whole(0, 1)}, r"group_ids must be .*\(2,\)"),
    ({"group_ids": ones(3)}, "group_ids must be 3 integers .*float32"),
    ({"group_ids": ones(3).bool()}, "group_ids must be 3 integers .*bool"),
    ({"group_ids": whole(1, 0, 1)}, "group_ids must not decrease"),
    ({"group_ids": whole(0, 0, 1, **META)}, "group_ids must be on cpu, got meta"),
    ({"token_counts": whole(1, 1)}, r"token_counts must be 3 .*\(2,\)"),
    ({"token_counts": whole(1, -1, 1)}, "token_counts must not be negative, got -1"),
    ({"token_counts": whole(1, 1, 1, **META)}, "token_counts must be on cpu, got meta"),
    *[({"rewards": torch.tensor([1.0, r, 0.0])}, "rewards must be finite") for r in (NAN, -INF)],
    ({"rewards": torch.tensor([1e300, 0, 0], dtype=torch.float64)}, "rewards must be finite"),
]
NORM_CASES: list[tuple[dict[str, Any], str]] = [
    ({"x": ones(()), "weight": ones(())}, r"x must be floating \[..., H\].*shape \[\]"),
    ({"x": ones(2, 0), "weight": ones(0)}, r"H above 0, .*\[2, 0\]"),
    ({"x": ones(2, 4).long(), "weight": ones(4).long()}, "x must be floating .*int64"),
    ({"weight": ones(3)}, r"weight must be \[H\] .*got \[3\]"),
    ({"weight": ones(4).half()}, "weight must be .*float16"),
    ({"weight": ones(4, **META)}, "weight must be .*on meta"),
    ({"eps": -1e-5}, "eps must be at least 0, got -1e-05"),
    ({"eps": NAN}, "eps must be at least 0, got nan"),
]
ADD_CASES: list[tuple[dict[str, Any], str]] = [
    ({"added": ones(1, 4)}, r"added must be like x, .*got \[1, 4\]"),
    ({"added": ones(2, 4).half()}, "added must be like x, .*float16"),
    ({"added": ones(2, 4, **META)}, "added must be like x, .*on meta"),
]
TURN_CASES: list[tuple[dict[str, Any], str]] = [
    ({"x": ones(3, 8)}, r"x must be \[T, N, D\] .*got \[3, 8\]"),
    ({"x": ones(3, 2, 5)}, "an even D .*"),
    ({"cos": ones(1, 1, 2)}, r"tables \[T, 1, D / 2\].*\[1, 1, 2\]"),
    ({"sin": ones(3, 1, 4)}, r"tables .*\[3, 1, 4\]"),
    ({"sin": ones(3, 1, 2).half()}, "share dtype and device, .*float16"),
    ({"cos": ones(3, 1, 2, **META)}, "share dtype and device, .*on meta"),
    ({name: TURN[name].long() for name in TURN}, "x must be floating, got torch.int64"),
]
GATE_CASES: list[tuple[dict[str, Any], str]] = [
    ({"up": ones(2, 3)}, r"gate and up must be alike, .*\[2, 3\]"),
    ({"up": ones(2, 4).half()}, "alike, .*float16"),
    ({"gate": ones(2, 4, **META)}, "alike, .*on meta"),
    ({"gate": ones(()), "up": ones(())}, r"gate and up must be floating \[..., I\].*shape \[\]"),
    ({"gate": whole(1), "up": whole(1)}, "gate and up must be floating .*int64"),
]
Op = Callable[..., Any]
TABLE: list[tuple[Op, dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    (token_logprobs, HEAD, HEAD_CASES + MASK_CASES),
    (token_loss_of, HEAD, HEAD_CASES),
    (policy_loss, LOSS, LOSS_CASES),
    (group_advantages, GROUP, GROUP_CASES),
    (rmsnorm, NORM, NORM_CASES),
    (add_rmsnorm, ADD, NORM_CASES + ADD_CASES),
    (rope, TURN, TURN_CASES),
    (swiglu, GATE, GATE_CASES),
]


@BACKENDS
@pytest.mark.parametrize(
    ("op", "good", "change", "words"),
    [
        pytest.param(op, good, change, words, id=f"{op.__name__}-{number}")
        for op, good, cases in TABLE
        for number, (change, words) in enumerate(cases)
    ],
)
@pytest.mark.usefixtures("no_kernel_runs")
def test_a_sentence_and_no_kernel(
    op: Op, good: dict[str, Any], change: dict[str, Any], words: str, backend: Any
) -> None:
    with use(backend), pytest.raises(ValueError, match=words):
        op(**{**good, **change})


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(("op", "good", "_"), TABLE, ids=lambda x: getattr(x, "__name__", ""))
def test_the_good_arguments_are_good(op: Op, good: dict[str, Any], _: Any, backend: Any) -> None:
    with use(backend):
        op(**good)


@pytest.mark.parametrize(("op", "good", "_"), TABLE, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.usefixtures("no_kernel_runs")
def test_the_watch_sees_a_kernel(op: Op, good: dict[str, Any], _: Any) -> None:
    with use("native"), pytest.raises(AssertionError, match="a kernel was run"):
        op(**good)


EMPTY: dict[str, tuple[Op, list[Tensor]]] = {
    "token_logprobs": (
        lambda x, w: sum(token_logprobs(x, w, whole().long(), return_entropy=True)),
        [ones(0, 4), ones(7, 4)],
    ),
    "token_loss": (
        lambda x, w: token_loss_of(hidden=x, weight=w, targets=whole().long()),
        [ones(0, 4), ones(7, 4)],
    ),
    "policy_loss": (
        lambda x: policy_loss(
            x, ones(0), ones(0), whole().long(),
            config=PolicyLossConfig(beta=0, normalize="fixed", max_length=5),
        )[0],
        [ones(0)],
    ),
    "rmsnorm": (lambda x, w: rmsnorm(x, w, 1e-5), [ones(0, 4), ones(4)]),
    "add_rmsnorm": (
        lambda x, a, w: sum(add_rmsnorm(x, a, w, 1e-5)), [ones(0, 4), ones(0, 4), ones(4)]
    ),
    "rope": (lambda x: rope(x, ones(0, 1, 2), ones(0, 1, 2)), [ones(0, 2, 4)]),
    "swiglu": (swiglu, [ones(0, 4), ones(0, 4)]),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_has_a_result_and_gradients_of_zero(name: str, backend: Any) -> None:
    op, inputs = EMPTY[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with use(backend):
        out = op(*leaves)
    assert out.numel() == 0 or out == 0
    grads = torch.autograd.grad(out.sum(), leaves)
    for x, grad in zip(inputs, grads, strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@BACKENDS
def test_no_samples_and_samples_without_tokens(backend: Any) -> None:
    none = whole().long()
    with use(backend):
        assert group_advantages(ones(0), none).shape == (0,)
        assert group_advantages(ones(0), none, token_counts=none).shape == (0,)
        found = group_advantages(ones(2), whole(0, 0), token_counts=whole(0, 0))
    assert found.shape == (0,)


@BACKENDS
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs"])
@pytest.mark.parametrize("correction", ["truncate", "mask", "mask_sequence"])
def test_nan_in_a_log_probability_is_told(where: str, correction: Any, backend: Any) -> None:
    given = {key: value.clone() for key, value in LOSS.items() if key != "config"}
    given[where][1] = NAN
    with use(backend):
        loss, stats = policy_loss(**given, config=PolicyLossConfig(correction=correction))
    assert loss.isnan()
    assert stats["nonfinite"] >= 1


@BACKENDS
def test_nan_in_an_advantage_or_a_weight_is_told(backend: Any) -> None:
    with use(backend):
        loss, stats = policy_loss(**{**LOSS, "advantages": torch.tensor([NAN, 1.0])})
        weight = ones(7, 4)
        weight[3, 2] = NAN
        logprobs = token_logprobs(**{**HEAD, "weight": weight})
    assert loss.isnan()
    assert stats["nonfinite"] == 2
    assert logprobs.isnan().all()


# --- Arrays at the border of C++ -----------------------------------------------------------------

SIZES = [5, 8, 4, 1, 2, 1, 4]  # of a decoder: words, H, I, layers, heads of q and of k, D
TO_8, TO_4 = [ones(8, 8), ones(8)], [ones(4, 8), ones(4)]  # weight and bias
WEIGHTS: list[Tensor | None] = [
    *(ones(5, 8), ones(8), ones(8)),
    *(*TO_8, *TO_4, *TO_4, ones(4), ones(4), *TO_8),
    *(ones(8), *TO_4, *TO_4, ones(8, 4), ones(8)),
]


def run_decoder(**arrays: Any) -> None:
    _C.Decoder(SIZES, 1e-5, WEIGHTS).run(**arrays)


KEYS, VALUES = new_cache(2, 3, 15, 2, 4, dtype=torch.float32, device="cpu")
DECODER_KEYS, DECODER_VALUES = new_cache(1, 3, 15, 1, 4, dtype=torch.float32, device="cpu")
ROWS = {name: ones(2, 4) for name in ("on_y", "on_sum", "x", "on_x", "on_weight")}
TILE: dict[str, Any] = {"z": ones(2, 3), "first": 0, "targets": whole(0, 1), "peak": ones(2)}
PLACES: dict[str, Tensor] = {
    "block_tables": whole(0, 1, 1, 2).view(2, 2).int(),
    "context_lengths": whole(17, 3).int(),
    "query_starts": whole(0, 1, 2).int(),
}
BORDER: dict[Any, dict[str, Any]] = {
    _C.logit_stats: {**TILE, "sum": ones(2), "dot": ones(2), "target": ones(2), "threads": 1},
    _C.logit_gradient: {
        **TILE,
        **{name: ones(2) for name in ("log_sum", "entropy", "on_logprob", "on_entropy")},
        "threads": 1,
    },
    _C.policy_loss: {
        **{name: ones(3) for name in ("logprobs", "old", "ref", "rollout")},
        "offsets": whole(0, 2, 3),
        "advantages": ones(2),
        "weights": ones(2),
        "settings": [0.0] * 10,
        "slope": ones(3),
    },
    _C.group_advantages: {
        "rewards": ones(3),
        "offsets": whole(0, 2, 3),
        "divide_by_std": True,
        "leave_one_out": False,
        "token_offsets": whole(0, 1, 2, 3),
        "out": ones(3),
        "eps": 1e-4,
    },
    _C.swiglu: {"gate": ones(2, 4), "up": ones(2, 4), "out": ones(2, 4), "threads": 1},
    _C.swiglu_backward: {
        **{name: ones(2, 4) for name in ("on_out", "gate", "up", "on_gate", "on_up")},
        "threads": 1,
    },
    _C.rmsnorm: {
        **{name: ones(2, 4) for name in ("x", "added", "sum", "y")},
        "weight": ones(4),
        "scale": ones(2),
        "eps": 1e-5,
        "threads": 1,
    },
    _C.rmsnorm_backward: {**ROWS, "weight": ones(4), "scale": ones(2), "threads": 1},
    _C.rope: {
        **{"x": ones(3, 2, 4), "y": ones(3, 2, 4), "cos": ones(3, 2), "sin": ones(3, 2)},
        "back": False,
        "threads": 1,
    },
    _C.sample: {
        "logits": ones(2, 4),
        "keys": whole(0, 1),
        "top_k": whole(0, 1).int(),
        "tokens": whole(0, 1),
        **{name: ones(2) for name in ("temperature", "top_p", "min_p")},
        **{name: ones(2) for name in ("logprobs", "sampled_logprobs")},
        "threads": 1,
    },
    _C.linear: {
        "x": ones(2, 4), "weight": ones(3, 4), "bias": ones(3), "out": ones(2, 3), "threads": 1
    },
    _C.kv_store: {
        "key": ones(2, 2, 4),
        "value": ones(2, 2, 4),
        "key_cache": KEYS[1],
        "value_cache": VALUES[1],
        "slots": whole(0, 40),
        "threads": 1,
    },
    _C.paged_attention: {
        "q": ones(2, 4, 4),
        "key_cache": KEYS[0],
        "value_cache": VALUES[0],
        **PLACES,
        "out": ones(2, 4, 4),
        "scale": 0.5,
        "threads": 1,
    },
    _C.checksum: {"bytes": ones(9).to(torch.uint8), "threads": 1},
    run_decoder: {
        "tokens": whole(1, 2),
        "positions": whole(16, 2).int(),
        "slots": whole(16, 32),
        **PLACES,
        "cos": ones(20, 2),
        "sin": ones(20, 2),
        "keys": DECODER_KEYS,
        "values": DECODER_VALUES,
        "wanted": whole(0, 1).int(),
        "hidden": ones(2, 8),
        "threads": 1,
    },
}  # fmt: skip
OTHER = {
    torch.float32: torch.float64,
    torch.int64: torch.int32,
    torch.int32: torch.int64,
    torch.uint8: torch.int8,
}


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def in_another_dtype(x: Tensor) -> Tensor:
    return x.to(OTHER[x.dtype])


@pytest.mark.parametrize("spoil", [in_another_dtype, with_gaps])
@pytest.mark.parametrize("function", BORDER, ids=lambda x: x.__name__)
def test_no_array_is_converted_on_its_way_into_cpp(function: Op, spoil: Any) -> None:
    """What is written to a copy would be lost."""
    good = BORDER[function]
    function(**good)  # and these are taken
    arrays = {name: x for name, x in good.items() if isinstance(x, Tensor)}
    assert arrays
    for name in arrays.keys() - {"on_logprob", "on_entropy"}:
        spoilt = spoil(arrays[name])
        before = {key: x.clone() for key, x in {**arrays, name: spoilt}.items()}
        with pytest.raises(TypeError):
            function(**{**good, name: spoilt})
        assert torch.equal(spoilt, before[name]), name
        assert all(torch.equal(x, before[key]) for key, x in arrays.items() if key != name)


def test_a_gradient_of_one_number_may_be_stretched() -> None:
    """As autograd hands over that of a sum; it is only read."""
    good = BORDER[_C.logit_gradient]
    found = []
    for slope in (torch.full((2,), 3.0), torch.tensor(3.0).expand(2)):
        z = torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 1.0]])
        _C.logit_gradient(**{**good, "z": z, "on_logprob": slope, "on_entropy": slope})
        found.append(z)
    assert torch.equal(found[0], found[1])
    assert found[0].abs().min() > 0
