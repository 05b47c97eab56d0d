"""The bookkeeping of captured decoding steps, on the CPU: buckets, buffers, padding.

**Capture and replay themselves have run on no GPU.** In place of a graph stands here the forward
that would be captured, run anew over the same buffers, which is what a replay does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmr1.engine.cache_plan import CachePlan
from rmr1.engine.cuda_graphs import DecodeGraphs, buckets, structure
from rmr1.engine.kv_cache import PagedCache
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.scheduler import Step
from rmr1.engine.torch_step import TorchStep, decode_attend
from rmr1.kernels.dispatch import use

BLOCKS, SIZE, WIDTH, ROWS = 60, 4, 6, 20
CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG)


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    return use("reference") if request.param == "reference" else nullcontext()


def make_cache(model: CausalLM) -> PagedCache:
    """Its contents are random: what is written besides a step's own slots is seen."""
    cache = PagedCache(CONFIG, CachePlan(BLOCKS, SIZE, 1, 1), model.lm_head_weight)
    torch.manual_seed(1)
    for one in (cache.keys, cache.values):
        one.copy_(torch.randn(one.shape))
    return cache


def decoding(contexts: list[int], seed: int = 0) -> Step:
    """A step in which sequences of these lengths decode, their blocks anywhere."""
    random, count = np.random.default_rng(seed), len(contexts)
    lengths = np.array(contexts, dtype=np.int32)
    used = -(-lengths // SIZE)
    tables = np.full((count, used.max()), -1, dtype=np.int32)
    free = random.permutation(BLOCKS).astype(np.int32)
    for row, blocks in enumerate(used):
        tables[row, :blocks], free = free[:blocks], free[blocks:]
    positions = lengths - 1
    last = tables[np.arange(count), positions // SIZE].astype(np.int64)
    return Step(
        tokens=random.integers(1, 50, count),
        positions=positions,
        slots=last * SIZE + positions % SIZE,
        tables=tables,
        contexts=lengths,
        starts=np.arange(count + 1, dtype=np.int32),
        decoding=count,
        copies=[],
        wanted=np.arange(count, dtype=np.int32),
        rows=np.arange(count),
        source=np.arange(count),
    )


def graphs_of(model: CausalLM, cache: PagedCache) -> DecodeGraphs:
    return DecodeGraphs(model, cache, ROWS, WIDTH, make_attend=decode_attend)


def expected(model: CausalLM, step: Step, cache: PagedCache) -> Tensor:
    return TorchStep(model, cache, ROWS, WIDTH)(step)


# --- Buckets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (8, [1, 2, 4, 8]),
        (10, [1, 2, 4, 8, 10]),
        (16, [1, 2, 4, 8, 16]),
        (100, [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100]),
        (128, [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128]),
        (256, [1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 192, 256]),
    ],
)
def test_buckets(rows: int, sizes: list[int]) -> None:
    assert buckets(rows) == sizes


@pytest.mark.parametrize("rows", [1, 3, 17, 129, 200, 1024])
def test_every_batch_has_a_bucket_not_much_larger(rows: int) -> None:
    sizes = buckets(rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == rows
    for count in range(1, rows + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count < max(count, 8 if count < 16 else 64 if count > 128 else 16)
    assert len(sizes) < 30


# --- Buffers -------------------------------------------------------------------------------------


def test_a_step_is_copied_and_padded(model: CausalLM) -> None:
    graphs = graphs_of(model, make_cache(model))
    step = decoding([5, 17, 1])
    graphs.fill(step, 8)
    for buffer, array in (
        (graphs._tokens, step.tokens),
        (graphs._positions, step.positions),
        (graphs._slots, step.slots),
        (graphs._contexts, step.contexts),
    ):
        assert buffer[:3].tolist() == array.tolist()
    assert graphs._tables[:3, :5].tolist() == step.tables.tolist()
    assert graphs._slots[3:8].tolist() == [-1] * 5
    for padded in (graphs._tokens, graphs._positions, graphs._contexts):
        assert padded[3:8].tolist() == [0] * 5
    assert graphs._starts.tolist() == list(range(ROWS + 1))
    kinds = [x.dtype for x in (graphs._tokens, graphs._positions, graphs._slots)]
    assert kinds == [torch.int64] * 3
    kinds = [x.dtype for x in (graphs._tables, graphs._contexts, graphs._starts)]
    assert kinds == [torch.int32] * 3


@pytest.mark.parametrize("size", [5, 8, ROWS])
def test_padding_changes_no_row_and_writes_nothing(
    model: CausalLM, backend: AbstractContextManager[None], size: int
) -> None:
    cache, other, untouched = (make_cache(model) for _ in range(3))
    graphs, step = graphs_of(model, cache), decoding([9, 1, 24, 4, 13])
    graphs.fill(step, size)
    with backend, torch.inference_mode():
        found, wanted = graphs.forward(size), expected(model, step, other)
    assert found.shape == (size, 24)
    assert torch.allclose(found[:5], wanted, atol=1e-5)
    assert wanted.abs().max() > 0.5
    assert found.isfinite().all()
    slots = torch.from_numpy(step.slots)
    rest = torch.ones(BLOCKS * SIZE, dtype=torch.bool)
    rest[slots] = False
    for name in ("keys", "values"):
        mine, theirs, before = (
            getattr(one, name).flatten(1, 2) for one in (cache, other, untouched)
        )
        assert torch.equal(mine[:, rest], before[:, rest])
        assert torch.allclose(mine[:, slots], theirs[:, slots], atol=1e-5)
        assert (mine[:, slots] != before[:, slots]).any(-1).all()


@pytest.mark.parametrize("size", [2, 4, 16])
def test_a_smaller_step_leaves_no_stale_rows(
    model: CausalLM, backend: AbstractContextManager[None], size: int
) -> None:
    cache, other = make_cache(model), make_cache(model)
    graphs = graphs_of(model, cache)
    large, small = decoding([23] * 3 + [9] * 13, seed=1), decoding([3, 6], seed=2)
    with backend, torch.inference_mode():
        graphs.fill(large, 16)
        found, wanted = graphs.forward(16), expected(model, large, other)
        assert torch.allclose(found, wanted, atol=1e-5)
        after_large = cache.keys.clone()
        graphs.fill(small, size)
        found, wanted = graphs.forward(size), expected(model, small, other)
        assert torch.allclose(found[:2], wanted, atol=1e-5)
    assert graphs._slots[2:size].tolist() == [-1] * (size - 2)
    assert graphs._contexts[2:size].tolist() == [0] * (size - 2)
    # The slots of rows that have gone are not written again.
    gone = torch.from_numpy(np.setdiff1d(large.slots, small.slots))
    assert len(gone) > 12
    assert torch.equal(cache.keys.flatten(1, 2)[:, gone], after_large.flatten(1, 2)[:, gone])
    assert torch.allclose(cache.keys, other.keys, atol=1e-5)
    assert torch.allclose(cache.values, other.values, atol=1e-5)


# --- Replay --------------------------------------------------------------------------------------


class Eager:
    """Stands for a graph: a replay computes over the same buffers, into the same output."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self.graphs, self.size = graphs, size
        self.hidden = graphs.forward(size).clone()

    def replay(self) -> None:
        self.hidden.copy_(self.graphs.forward(self.size))


class Replaying:
    """A model, its graphs in a `TorchStep`, and the sizes that have been captured."""

    def __init__(self, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = CausalLM(CONFIG)
        self.model.load_state_dict(model.state_dict())
        cache, self.other = make_cache(self.model), make_cache(self.model)
        self.graphs, self.captured = graphs_of(self.model, cache), list[int]()
        self.step = TorchStep(self.model, cache, ROWS, WIDTH)
        self.step._graphs = self.graphs
        monkeypatch.setattr(self.graphs, "_capture", self.capture)

    def capture(self, size: int) -> tuple[Eager, Tensor]:
        self.captured.append(size)
        graph = Eager(self.graphs, size)
        return graph, graph.hidden

    def check(self, contexts: list[int]) -> Tensor:
        step = decoding(contexts, seed=len(contexts))
        found, wanted = self.step(step), expected(self.model, step, self.other)
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5)
        return found.clone()


def test_a_graph_a_bucket_until_the_weights_move(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying = Replaying(model, monkeypatch)
    own, check, captured = replaying.model, replaying.check, replaying.captured
    with torch.inference_mode():
        for count in (3, 4, 1, 3, 17, 20, 9, 16):
            check([2 + count] * min(count, 6) + [3] * max(0, count - 6))
        assert captured == [4, 1, 20, 16]
        # Written in place: the same graphs read the new weights.
        own.model.norm.weight.data.mul_(-2.0)
        replaying.step.rebind()
        check([5, 6, 7])
        assert captured == [4, 1, 20, 16]
        # Other memory: a graph would go on reading the old.
        for parameter in own.parameters():
            parameter.data = parameter.data * 0.5
        replaying.step.rebind()
        check([5, 6, 7])
        check([5, 6, 7, 8])
        check([5])
        assert captured == [4, 1, 20, 16, 4, 1]


class Adapter(nn.Linear):
    """A projection with something beside it, as LoRA's, that can be switched off."""

    disabled = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.0 if self.disabled else x[..., :1])


class Wrapper(nn.Module):
    """An adapter around a projection, with no parameter of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def adapted(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.__class__ = Adapter


def wrapped(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.v_proj = Wrapper(attention.v_proj)


def own_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def other_buffer(model: Any) -> None:
    model.model.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("change", [adapted, wrapped, own_forward, other_buffer])
def test_other_modules_are_captured_anew(
    model: CausalLM, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying = Replaying(model, monkeypatch)
    with torch.inference_mode():
        before = replaying.check([15, 6, 7])
        change(replaying.model)
        replaying.step.rebind()
        after = replaying.check([15, 6, 7])
        assert replaying.captured == [4, 4]
        replaying.step.rebind()  # nothing has changed
        replaying.check([15, 6, 7])
        assert replaying.captured == [4, 4]
    assert torch.allclose(before, after, atol=0.01) == (change is other_buffer)


def test_a_switch_is_noticed(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    replaying = Replaying(model, monkeypatch)
    adapted(replaying.model)
    layer: Any = replaying.model.model.layers[1]
    found = []
    with torch.inference_mode():
        for disabled in (False, True, True, False):
            layer.self_attn.q_proj.disabled = disabled
            replaying.step.rebind()
            found.append(replaying.check([19, 13]))
    assert replaying.captured == [2, 2, 2]
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[0], found[1], atol=0.01)


@pytest.mark.parametrize("outside", [True, False])
def test_a_model_with_hooks_is_not_captured(
    model: CausalLM, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaying, seen = Replaying(model, monkeypatch), list[int]()
    own: Any = replaying.model

    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(len(output))
        return 2 * output

    with torch.inference_mode():
        before = replaying.check([5, 6, 7])
        hook = (own if outside else own.model.layers[0].mlp).register_forward_hook(double)
        replaying.step.rebind()
        hooked = replaying.check([5, 6, 7])
        replaying.check([5, 6, 7, 8, 9])
        assert replaying.captured == [4]
        assert seen == [3, 3, 5, 5]  # the yardstick has it too
        hook.remove()
        replaying.step.rebind()
        assert torch.allclose(replaying.check([5, 6, 7]), before, atol=1e-5)
    assert replaying.captured == [4, 4]
    assert not torch.allclose(hooked, before, atol=0.01)
    assert len(seen) == 4


def test_structure(model: CausalLM) -> None:
    own: Any = CausalLM(CONFIG)
    before = structure(own)
    own.load_state_dict(model.state_dict())
    own.requires_grad_(False)
    assert structure(own) == before
    assert structure(model) != before
    first = own.model.norm.register_forward_pre_hook(lambda module, args: None)
    hooked = structure(own)
    assert hooked != before
    first.remove()
    assert structure(own) == before
    second = own.model.norm.register_forward_pre_hook(lambda module, args: args)
    assert structure(own) != hooked  # another hook in its place
    second.remove()
    own.model.norm.eval()
    assert structure(own) != before
    own.train()
    assert structure(own) == before
    own.model.layers[0].mlp = type(own.model.layers[0].mlp)(CONFIG)  # alike, and another one
    assert structure(own) != before
