"""A step in C++ against the model's own forward, on steps that the scheduler makes.

The truth is the own forward in fp64; the error may be twice that of the own forward in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmr1.engine.block_pool import BlockPool
from rmr1.engine.cache_plan import CachePlan
from rmr1.engine.kv_cache import PagedCache
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.native_step import NativeStep
from rmr1.engine.sampling import SamplingParams
from rmr1.engine.scheduler import Scheduler, Step
from rmr1.engine.sequences import Request, Rows, new_sequences
from rmr1.engine.torch_step import PagedAttend, Part, TorchStep
from rmr1.kernels.dispatch import use

VOCABULARY = 61
LLAMA = ("llama", "LlamaForCausalLM")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Family, query heads, key/value heads, head size, and what else.
MODELS: dict[str, tuple[tuple[str, str], int, int, int, dict[str, Any]]] = {
    "llama": (LLAMA, 6, 2, 8, {}),
    "llama, biases": (LLAMA, 3, 1, 64, {"attention_bias": True, "mlp_bias": True}),
    "llama, yarn": (LLAMA, 4, 4, 8, {"rope_scaling": YARN}),
    "qwen2": (("qwen2", "Qwen2ForCausalLM"), 2, 2, 64, {"tie_word_embeddings": True}),
    "qwen3": (("qwen3", "Qwen3ForCausalLM"), 4, 1, 80, {}),
    "qwen3, bias": (("qwen3", "Qwen3ForCausalLM"), 6, 2, 8, {"attention_bias": True}),
}


def make_model(name: str, layers: int = 2) -> CausalLM:
    """All of its parameters random, biases and norms too."""
    (family, architecture), heads, kv_heads, dim, more = MODELS[name]
    raw = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 50,
        "intermediate_size": 37,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **more,
    }
    torch.manual_seed(len(name))
    model = CausalLM(ModelConfig.from_dict(raw))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


class Steps:
    """Steps of random requests: decoding, pieces of prompts, shared blocks, copies, put back."""

    def __init__(self, seed: int, *, blocks: int, size: int, budget: int = 24) -> None:
        self.chance = Random(seed)
        self.plan = CachePlan(blocks, size, token_bytes=1, budget=1)
        self.rows = Rows(8, blocks)
        self.scheduler = Scheduler(BlockPool(blocks), self.rows, size, budget)
        self.numbers = count()
        self.beginning = self.tokens(30)

    def tokens(self, number: int) -> list[int]:
        return self.chance.choices(range(VOCABULARY), k=number)

    def add(self, prompt: list[int], n: int, new: int) -> None:
        flags = np.zeros(VOCABULARY, dtype=np.uint8)
        params = SamplingParams(n=n, max_new_tokens=new)
        request = Request(np.array(prompt), params, 0, flags)
        request.hash_blocks(self.plan.block_size)
        self.scheduler.add(new_sequences(request, self.numbers))

    def add_any(self) -> None:
        common = self.beginning[: self.chance.randrange(31)]
        prompt = common + self.tokens(self.chance.randint(1, 9))
        self.add(prompt, self.chance.choice([1, 2, 3]), self.chance.randint(1, 12))

    def next(self) -> Step:
        step = self.scheduler.plan()
        drawn = np.array(self.tokens(len(step.rows)), dtype=np.int64)
        self.rows.draw(step.rows, drawn, np.zeros((2, len(drawn)), dtype=np.float32))
        for row in step.rows[self.rows.count[step.rows] >= self.rows.limit[step.rows]].tolist():
            self.scheduler.finish(row)
        return step

    def __iter__(self) -> Iterator[Step]:
        while self.scheduler.unfinished:
            yield self.next()


def copy_of(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    other = CausalLM(model.config).to(dtype)
    other.load_state_dict(model.state_dict())
    return other


class Compared:
    """The three computations of the same steps, each with a cache of its own."""

    def __init__(self, model: CausalLM, plan: CachePlan) -> None:
        assert NativeStep.suits(model)
        self.cache = PagedCache(model.config, plan, model.lm_head_weight)
        self.native = NativeStep(model, self.cache)
        self.torchs = [
            TorchStep(one, PagedCache(model.config, plan, one.lm_head_weight), 8, plan.blocks)
            for one in (copy_of(model, torch.float64), copy_of(model, torch.float32))
        ]
        self.error, self.yardstick, self.size = 0.0, 0.0, 0.0

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        found = self.native(step)
        with use("reference"):
            exact, torchs = (one(step) for one in self.torchs)
        assert found.shape == exact.shape == (len(step.wanted), exact.shape[1])
        assert found.isfinite().all()
        if len(found):
            self.error = max(self.error, float((found - exact).abs().max()))
            self.yardstick = max(self.yardstick, float((torchs - exact).abs().max()))
            self.size = max(self.size, float(exact.abs().max()))
        return found

    def assert_as_exact_as_torch(self) -> None:
        assert self.size > 0.5
        assert self.error <= 2 * self.yardstick + torch.finfo(torch.float32).eps * self.size


@pytest.mark.parametrize("name", MODELS)
def test_random_steps(name: str, isa: str) -> None:
    steps = Steps(8, blocks=24, size=4)
    compared = Compared(make_model(name), steps.plan)
    mixed = copies = 0
    for number in range(30):
        if number < 20 and number % 3 == 0:
            steps.add_any()
        if not steps.scheduler.unfinished:
            break
        step = steps.next()
        compared.run(step)
        mixed += 0 < step.decoding < len(step.contexts)
        copies += len(step.copies)
    compared.assert_as_exact_as_torch()
    assert mixed > 3
    assert copies > 0
    assert steps.scheduler.preemptions > 0


@pytest.mark.parametrize(("name", "size"), [("llama", 16), ("qwen3", 7)])
def test_contexts_of_several_parts(name: str, size: int, isa: str) -> None:
    """More than 1,024 keys are attended in parts, more than 512 rows go through the MLP in two."""
    steps = Steps(0, blocks=-(-2400 // size), size=size, budget=1200)
    long = steps.tokens(1100)
    steps.add(long, n=3, new=3)
    compared = Compared(make_model(name, layers=1), steps.plan)
    compared.run(steps.next())
    steps.add(long[:1030] + steps.tokens(9), n=1, new=2)  # a piece after a long prefix
    steps.add(steps.tokens(6), n=1, new=2)
    kinds = [(step.decoding, len(step.contexts)) for step in steps if len(compared.run(step))]
    assert kinds == [(3, 5), (5, 5)]
    compared.assert_as_exact_as_torch()


def test_the_cache_holds_the_same(isa: str) -> None:
    steps = Steps(5, blocks=24, size=5)
    steps.add_any()
    compared = Compared(make_model("qwen3, bias"), steps.plan)
    written = set[int]()
    for step in steps:
        for source, target in step.copies:
            written.update(5 * target + at for at in range(5) if 5 * source + at in written)
        compared.run(step)
        written.update(step.slots.tolist())
    slots = torch.tensor(sorted(written))
    mine, theirs = compared.cache, compared.torchs[0]._cache
    for name in ("keys", "values"):
        found, wanted = (getattr(cache, name).flatten(1, 2) for cache in (mine, theirs))
        assert torch.allclose(found[:, slots].double(), wanted[:, slots], atol=1e-5)
        assert found[:, slots].abs().max() > 0.1
        rest = torch.ones(found.shape[1], dtype=torch.bool)
        rest[slots] = False
        assert not found[:, rest].any()


def test_threads_change_nothing() -> None:
    model = make_model("llama")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            steps = Steps(9, blocks=30, size=4)
            for _ in range(4):
                steps.add_any()
            step_of = NativeStep(model, PagedCache(model.config, steps.plan, model.lm_head_weight))
            found.append([step_of(step).clone() for step in steps])
    finally:
        torch.set_num_threads(before)
    assert len(found[0]) > 5
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_reads_the_parameters_where_they_lie() -> None:
    model = make_model("qwen2")
    steps = Steps(1, blocks=30, size=4)
    steps.add(steps.tokens(9), n=1, new=1)
    step = steps.next()
    native = NativeStep(model, PagedCache(model.config, steps.plan, model.lm_head_weight))
    before = native(step).clone()
    assert torch.equal(native(step), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    after = native(step)
    assert not torch.allclose(after, before, atol=0.1)
    fresh = NativeStep(model, PagedCache(model.config, steps.plan, model.lm_head_weight))
    assert torch.equal(fresh(step), after)
    assert all(seconds > 0 for seconds in native.seconds().values())
    assert len(native.seconds()) == 4


def test_the_hidden_states_have_one_memory() -> None:
    """It grows with the rows, by more than is asked for, and is then kept."""
    model, steps = make_model("llama"), Steps(9, blocks=120, size=4)
    native = NativeStep(model, PagedCache(model.config, steps.plan, model.lm_head_weight))
    other = NativeStep(model, PagedCache(model.config, steps.plan, model.lm_head_weight))
    places = []
    for number in range(30):
        if number < 8:
            steps.add(steps.tokens(6), n=1, new=40)
        step = steps.next()
        found = native(step)
        other._hidden = torch.empty(0, 50)
        assert torch.equal(found, other(step))
        if len(found):
            places.append((found.data_ptr(), len(found)))
    assert [count for _, count in places][-8:] == [8] * 8
    assert len({place for place, _ in places}) == 4  # 1, 2, 4 and 8 rows
    assert len({place for place, _ in places[-20:]}) == 1


# --- Attention of the torch step -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bits_is_the_native_one(dtype: torch.dtype) -> None:
    """Both compute in fp32 and round once."""
    model, steps = copy_of(make_model("llama"), dtype), Steps(2, blocks=40, size=4)
    for _ in range(3):
        steps.add_any()
    caches = [PagedCache(model.config, steps.plan, model.lm_head_weight) for _ in range(2)]
    for step in steps:
        count = len(step.tokens)
        q, k, v = (torch.randn(count, heads, 8).to(dtype) for heads in (6, 2, 2))
        starts = torch.from_numpy(step.starts)
        tables, contexts = torch.from_numpy(step.tables), torch.from_numpy(step.contexts)
        longest = int((starts[1:] - starts[:-1]).max())
        part = Part(0, count, tables, contexts, starts, longest)
        found = []
        for cache, backend in zip(caches, ("native", "reference"), strict=True):
            cache.copy(step.copies)
            with use(backend):
                attend = PagedAttend(cache, torch.from_numpy(step.slots), [part])
                found.append(attend(1, q, k, v))
        native, reference = found
        assert native.dtype == reference.dtype == dtype
        assert torch.allclose(native, reference, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert all(cache.keys.dtype == torch.float32 for cache in caches)
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert caches[0].keys[1].any()


# --- Which models it computes --------------------------------------------------------------------


class Own(CausalLM):
    """A subclass may compute anything."""


class Adapter(nn.Linear):
    """A projection with something beside it, as LoRA's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :1]


@pytest.mark.parametrize("name", MODELS)
def test_it_suits_plain_models(name: str) -> None:
    model = make_model(name, layers=1)
    assert NativeStep.suits(model)
    with use("native"):
        assert NativeStep.suits(model)


def test_it_does_not_suit_what_it_would_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", layers=1)
    assert not NativeStep.suits(copy_of(model, torch.bfloat16))
    assert not NativeStep.suits(copy_of(model, torch.float64))
    assert not NativeStep.suits(model.to("meta"))
    assert not NativeStep.suits(Own(model.config))
    for backend in ("reference", "triton"):
        with use(backend):
            assert not NativeStep.suits(make_model("llama", layers=1))
    monkeypatch.setenv("RMR1_KERNELS", "reference")
    assert not NativeStep.suits(make_model("llama", layers=1))


def own_forward(model: CausalLM) -> None:
    model.forward = model.forward  # type: ignore[method-assign]


def one_in_16_bits(model: CausalLM) -> None:
    model.model.norm.bfloat16()


def transposed(model: CausalLM) -> None:
    layer: Any = model.model.layers[0]
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.t().contiguous().t()


def adapted(model: CausalLM) -> None:
    layer: Any = model.model.layers[0]
    layer.self_attn.q_proj.__class__ = Adapter


def hooked(model: CausalLM) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)


def hooked_outside(model: CausalLM) -> None:
    model.register_forward_hook(lambda module, args, output: 2 * output)


def own_forward_inside(model: CausalLM) -> None:
    layer: Any = model.model.layers[0]
    layer.mlp.forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [own_forward, one_in_16_bits, transposed, adapted, hooked, hooked_outside, own_forward_inside],
)
def test_it_does_not_suit_a_model_that_was_changed(change: Any) -> None:
    model = make_model("llama", layers=1)
    assert NativeStep.suits(model)
    change(model)
    assert not NativeStep.suits(model)
