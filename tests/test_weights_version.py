"""Keys and values of other weights are never used, however the weights were written.

The yardstick is always a new generator on a new model with the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from rmr1.engine import weights_version
from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.weights_version import (
    _PIECE,
    WeightsVersion,
    _torch_checksum,
    checksum,
    copy_weights,
)

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far-apart logits
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, fp32
# Two of them begin alike; all are longer than two blocks, but for the last.
PROMPTS = [list(range(40)), [*range(33), 7, 7, 7], [9] * 35, [1, 2, 3]]
PARAMS = SamplingParams(temperature=0, max_new_tokens=6)


class Numbers:
    """A tokenizer whose text is the numbers of the tokens."""

    eos_token_id = None

    def decode(self, token_ids: list[int], **_: object) -> str:
        return " ".join(map(str, token_ids))


def make_model(seed: int, kind: str = "native", **options: Any) -> CausalLM:
    """Computed in C++, or through the model's own forward."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig.from_dict({**LlamaConfig(**SIZES).to_dict(), **options}))
    if kind == "torch":
        model.forward = model.forward  # type: ignore[method-assign]
    return model


def fresh(model: CausalLM) -> list[list[Rollout]]:
    """What the yardstick draws."""
    other = CausalLM(model.config).to(model.lm_head_weight.dtype)
    other.load_state_dict({name: x.detach().clone() for name, x in model.state_dict().items()})
    if "forward" in vars(model):
        other.forward = other.forward  # type: ignore[method-assign]
    return Generator(other, Numbers()).generate(PROMPTS, PARAMS)


def same(outputs: list[list[Rollout]], others: list[list[Rollout]]) -> bool:
    """But for the rounding of torch's products, which depend on the batch."""
    pairs = [
        pair for groups in zip(outputs, others, strict=True) for pair in zip(*groups, strict=True)
    ]
    return all(
        a.token_ids == b.token_ids and np.allclose(a.logprobs, b.logprobs, atol=1e-4)
        for a, b in pairs
    )


def versions(outputs: list[list[Rollout]]) -> set[int]:
    return {rollout.weights_version for group in outputs for rollout in group}


# --- Ways to write weights -----------------------------------------------------------------------


def by_an_optimizer(model: CausalLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def in_place(model: CausalLM) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()


def through_data(model: CausalLM) -> None:
    model.model.embed_tokens.weight.data.mul_(-1.5)


def in_one_place(model: CausalLM) -> None:
    layer: Any = model.model.layers[1]
    layer.self_attn.v_proj.weight.data[3, 4] += 5.0


def by_rows_swapped(model: CausalLM) -> None:
    layer: Any = model.model.layers[0]
    weight = layer.self_attn.v_proj.weight.data
    weight.copy_(weight.flip(0))


def by_other_memory(model: CausalLM) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25 + 0.01


def by_loading(model: CausalLM) -> None:
    model.load_state_dict(make_model(1).state_dict())


def by_assigning(model: CausalLM) -> None:
    model.load_state_dict(make_model(1).state_dict(), assign=True)


WAYS: list[Any] = [
    (by_an_optimizer, "native"),
    (in_place, "native"),
    (through_data, "native"),
    (through_data, "torch"),
    (in_one_place, "native"),
    (by_rows_swapped, "native"),
    (by_other_memory, "native"),
    (by_loading, "native"),
    (by_assigning, "native"),
    (by_assigning, "torch"),
]


@pytest.mark.parametrize(("write", "kind"), WAYS)
def test_a_call_uses_the_weights_of_now(write: Callable[[CausalLM], None], kind: str) -> None:
    model = make_model(0, kind)
    generator = Generator(model, Numbers())
    before = generator.generate(PROMPTS, PARAMS)
    assert same(before, fresh(model))
    assert same(before, generator.generate(PROMPTS, PARAMS))
    assert generator.weights_version == 0
    write(model)
    after = generator.generate(PROMPTS, PARAMS)
    assert same(after, fresh(model))
    assert not same(after, before)
    assert versions(after) == {generator.weights_version}
    write(model)
    assert same(generator.generate(PROMPTS, PARAMS), fresh(model))
    assert generator.weights_version >= 2


def test_every_weight_counts() -> None:
    """The least change of any tensor, past torch's counters."""
    model = make_model(0)
    version = WeightsVersion(model)
    assert not version.changed()
    for number, (name, parameter) in enumerate(model.named_parameters(), start=1):
        flat = parameter.data.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        assert version.changed(), name
        assert version.number == number
        assert not version.changed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_checksum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(30, 7).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.t().contiguous().t())
    for place in ((0, 0), (29, 6), (11, 3)):
        other = tensor.clone()
        other[place] = -other[place]
        assert checksum(other) != checksum(tensor)
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.full((3,), torch.nan)) == checksum(torch.full((3,), torch.nan))


def test_checksum_of_another_order() -> None:
    tensor = torch.arange(6.0)
    assert checksum(tensor.flip(0)) != checksum(tensor)


# Around whole words and whole pieces; the last has two pieces and a part.
BYTES = [0, 1, 3, 4, 7, 4096, *(4 * _PIECE + more for more in (-1, 0, 6)), 8 * _PIECE + 4003]


@pytest.mark.parametrize("count", BYTES)
def test_the_checksum_of_gpus_is_that_of_cpus(count: int) -> None:
    torch.manual_seed(count)
    flat = torch.randint(0, 256, (count + 5,), dtype=torch.uint8)
    for first in (0, 1, 2, 4):  # as a view into a flat buffer may begin
        raw = flat[first : first + count]
        assert _torch_checksum(raw) == checksum(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_for_special_values(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(1001).to(dtype)
    tensor[::7], tensor[1::7], tensor[2::7] = torch.nan, -torch.inf, -0.0
    assert _torch_checksum(tensor.view(torch.uint8)) == checksum(tensor)


def test_pieces_that_change_places_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_version, "_PIECE", 64)
    raw = torch.randint(0, 256, (4 * 64 * 5,), dtype=torch.uint8)
    swapped = torch.cat([raw[256:512], raw[:256], raw[512:]])
    assert _torch_checksum(raw) == checksum(raw)
    assert _torch_checksum(swapped) == checksum(swapped) != checksum(raw)


def allocated(function: Callable[[], object]) -> int:
    """The most bytes that torch held at a time in a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    held = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return int(np.cumsum(held).max())


@pytest.mark.parametrize("first", [0, 2])
def test_what_a_checksum_takes_does_not_grow_with_the_tensor(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_version, "_PIECE", 1 << 12)
    piece = 4 << 12
    for pieces in (1, 4, 32):
        raw = torch.zeros(first + pieces * piece, dtype=torch.uint8)[first:]
        assert piece < allocated(lambda raw=raw: _torch_checksum(raw)) < 5 * piece + 1024  # type: ignore[misc]
    assert allocated(lambda: raw.long()) >= 32 * piece  # the measure sees a copy


def test_another_dtype_is_another_model() -> None:
    model = make_model(0)
    generator = Generator(model, Numbers())
    before = generator.generate(PROMPTS, PARAMS)
    model.bfloat16()
    assert same(generator.generate(PROMPTS, PARAMS), fresh(model))
    model.float()
    after = generator.generate(PROMPTS, PARAMS)
    assert same(after, fresh(model))
    assert not same(after, before)  # 16 bits have gone


def test_weights_without_counters() -> None:
    with torch.inference_mode():
        model, other = make_model(0), make_model(1)
        generator = Generator(model, Numbers())
        before = generator.generate(PROMPTS, PARAMS)
        model.load_state_dict(other.state_dict())
    after = generator.generate(PROMPTS, PARAMS)
    assert same(after, fresh(model))
    assert not same(after, before)


# --- What is cached is used while it may be ------------------------------------------------------


def counting(model: CausalLM) -> list[int]:
    """Tokens of each forward pass from now on."""
    computed: list[int] = []
    plain = model.forward

    def forward(token_ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        computed.append(len(token_ids))
        return plain(token_ids, positions, attend)

    model.forward = forward  # type: ignore[method-assign]
    return computed


def test_unchanged_weights_compute_a_prompt_once() -> None:
    model = make_model(0)
    computed = counting(model)
    generator = Generator(model, Numbers())
    first = generator.generate(PROMPTS[:1], PARAMS)
    assert computed == [40] + [1] * 5
    computed.clear()
    assert same(generator.generate(PROMPTS[:1], PARAMS), first)
    assert computed == [8] + [1] * 5  # two blocks of 16 are known
    computed.clear()
    generator.generate(PROMPTS[1:2], PARAMS)
    assert computed[0] == 36 - 32
    in_place(model)
    computed.clear()
    generator.generate(PROMPTS[:1], PARAMS)
    assert computed[0] == 40


def test_sync_with_nothing_new_drops_the_cache_all_the_same() -> None:
    model = make_model(0)
    computed = counting(model)
    generator = Generator(model, Numbers())
    generator.generate(PROMPTS[:1], PARAMS)
    assert generator.sync(model) == 1
    computed.clear()
    assert versions(generator.generate(PROMPTS[:1], PARAMS)) == {1}
    assert computed[0] == 40


def test_a_closed_stream_is_no_change() -> None:
    model = make_model(0)
    computed = counting(model)
    generator = Generator(model, Numbers())
    stream = generator.stream(PROMPTS[:1], PARAMS)
    generator._step()
    stream.close()
    computed.clear()
    outputs = generator.generate(PROMPTS[:1], PARAMS)
    assert versions(outputs) == {0}
    assert computed[0] == 8


# --- Past the counters ---------------------------------------------------------------------------


def swap_data(model: CausalLM, seed: int) -> None:
    """The weights of `make_model(seed)`, past the counters."""
    for parameter, other in zip(model.parameters(), make_model(seed).parameters(), strict=True):
        parameter.data.copy_(other.data)


def test_a_write_in_the_middle_of_a_call_spoils_no_later_one() -> None:
    model = make_model(0)
    generator = Generator(model, Numbers())
    stream = generator.stream(PROMPTS, PARAMS)
    generator._step()
    swap_data(model, 1)
    list(stream)
    assert same(generator.generate(PROMPTS, PARAMS), fresh(model))


def test_a_write_while_a_stream_is_left_open() -> None:
    model = make_model(0)
    generator = Generator(model, Numbers())
    stream = generator.stream(PROMPTS, SamplingParams(temperature=0, max_new_tokens=60))
    generator._step()
    swap_data(model, 1)
    assert same(generator.generate(PROMPTS, PARAMS), fresh(model))
    stream.close()


def test_weights_that_come_back() -> None:
    """As when an average or a reference is swapped in, and out again."""
    model = make_model(0)
    generator = Generator(model, Numbers())
    generator.generate(PROMPTS[3:], PARAMS)  # too short to be cached
    swap_data(model, 1)
    stream = generator.stream(PROMPTS, PARAMS)
    generator._step()
    stream.close()
    swap_data(model, 0)
    assert same(generator.generate(PROMPTS, PARAMS), fresh(model))


def test_weights_that_come_back_after_whole_calls() -> None:
    model = make_model(0)
    generator = Generator(model, Numbers())
    for seed in (0, 1, 0, 2, 0):
        swap_data(model, seed)
        assert same(generator.generate(PROMPTS, PARAMS), fresh(model))
    assert generator.weights_version == 4


def test_short_prompts_bear_the_version_too() -> None:
    model = make_model(0)
    generator = Generator(model, Numbers())
    assert versions(generator.generate(PROMPTS[3:], PARAMS)) == {0}
    swap_data(model, 1)
    assert versions(generator.generate(PROMPTS[3:], PARAMS)) == {1}


# --- In the middle of a stream -------------------------------------------------------------------


MIDDLE: list[Any] = [
    (by_an_optimizer, "native"),
    (in_place, "native"),
    (in_place, "torch"),
    (by_other_memory, "native"),
    (by_assigning, "native"),
    (by_assigning, "torch"),
    ("sync", "native"),
    ("sync after .data", "native"),
]


@pytest.mark.parametrize("blocks", [None, 24], ids=["room", "tight"])
@pytest.mark.parametrize(("write", "kind"), MIDDLE)
def test_unfinished_samples_begin_anew(write: Any, kind: str, blocks: int | None) -> None:
    model = make_model(0, kind)
    old = fresh(model)
    memory = None if blocks is None else (blocks * 4 * TOKEN_BYTES + 1) / 1e9
    generator = Generator(model, Numbers(), kv_memory_gb=memory, block_size=4)
    params = [PARAMS, SamplingParams(temperature=0, max_new_tokens=3), PARAMS, PARAMS]
    stream = generator.stream(PROMPTS, params)
    first = next(stream)
    assert (
        first.rollout.token_ids
        == old[first.prompt][0].token_ids[: params[first.prompt].max_new_tokens]
    )
    assert stream.unfinished == 3
    assert generator._generation is not None
    put_back = [one for _, one in generator._generation.scheduler._waiting if len(one.tokens)]
    assert len(put_back) == (blocks is not None)
    if write == "sync":
        generator.sync(make_model(1).state_dict())
    elif write == "sync after .data":
        swap_data(model, 1)
        generator.sync(model)
    else:
        write(model)
    rest = list(stream)
    assert [first.rollout.weights_version] + [one.rollout.weights_version for one in rest] == [
        0, 1, 1, 1
    ]  # fmt: skip
    new = fresh(model)
    assert not same(new, old)
    for one in rest:
        tokens = one.rollout.token_ids
        assert tokens == new[one.prompt][0].token_ids[: len(tokens)]
        assert len(tokens) == params[one.prompt].max_new_tokens
        assert len(one.rollout.logprobs) == len(tokens)
    assert same(generator.generate(PROMPTS, PARAMS), new)
    assert generator.weights_version == 1


def test_each_step_may_bring_new_weights() -> None:
    """Only what is drawn after the last change counts."""
    model = make_model(0)
    generator = Generator(model, Numbers())
    stream = generator.stream(PROMPTS, PARAMS)
    for number in range(1, 5):
        generator._step()
        in_place(model)
        through_data(model)
        if number % 2:
            assert generator.sync(model) >= number
    found = {one.prompt: one.rollout for one in stream}
    assert same([[found[prompt]] for prompt in range(4)], fresh(model))
    assert {rollout.weights_version for rollout in found.values()} == {generator.weights_version}


@pytest.mark.parametrize("changes", [(1,), (4,), (1, 3), (2, 5)])
def test_pieces_begin_anew_too(changes: tuple[int, ...]) -> None:
    model = make_model(0)
    stream = Generator(model, Numbers()).stream(PROMPTS[:2], PARAMS)
    texts, restarts, last = ["", ""], [0, 0], [0, 0]
    for number, piece in enumerate(stream.pieces(), start=1):
        if piece.anew:
            texts[piece.prompt] = ""
            restarts[piece.prompt] += 1
        texts[piece.prompt] += piece.text
        if number in changes:
            in_place(model)
            model.model.norm.weight.data.mul_(1.1)
        if piece.rollout is not None:
            last[piece.prompt] = piece.rollout.weights_version
            assert texts[piece.prompt] == piece.rollout.text
    assert texts == [rollout.text for [rollout] in fresh(model)[:2]]
    assert last == [len(changes)] * 2
    assert max(restarts) == len(changes)


# --- Sync ----------------------------------------------------------------------------------------


def test_sync_copies_and_the_version_is_on_every_rollout() -> None:
    generator = Generator(make_model(0), Numbers())
    assert versions(generator.generate(PROMPTS, PARAMS)) == {0}
    for number in (1, 2):
        trainer = make_model(number)
        assert generator.sync(trainer.state_dict()) == number == generator.weights_version
        for mine, given in zip(generator.model.parameters(), trainer.parameters(), strict=True):
            assert torch.equal(mine, given)
            assert mine.data_ptr() != given.data_ptr()
        outputs = generator.generate(PROMPTS, PARAMS)
        assert same(outputs, fresh(trainer))
        assert versions(outputs) == {number}
    trainer = make_model(3)
    generator.sync(trainer)  # a module
    assert same(generator.generate(PROMPTS, PARAMS), fresh(trainer))


def test_sync_of_a_sharded_model_holds_one_tensor_at_a_time() -> None:
    generator, trainer = Generator(make_model(0), Numbers()), make_model(1)
    targets = dict(generator.model.named_parameters())
    asked: list[str] = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in reversed(list(trainer.named_parameters())):
            if asked:
                assert torch.equal(targets[asked[-1]], dict(trainer.named_parameters())[asked[-1]])
            asked.append(name)
            yield name, parameter.detach().clone()

    assert generator.sync(gathered()) == 1
    assert set(asked) == set(targets)
    assert same(generator.generate(PROMPTS, PARAMS), fresh(trainer))


def test_sync_from_another_dtype() -> None:
    trainer = make_model(1).double()
    with torch.no_grad():
        trainer.model.norm.weight.add_(1e-12)  # rounded away
    generator = Generator(make_model(0), Numbers())
    generator.sync(trainer.state_dict())
    trainer.float()
    assert same(generator.generate(PROMPTS, PARAMS), fresh(trainer))


@pytest.mark.parametrize("tied", [True, False])
def test_sync_from_transformers(tied: bool) -> None:
    """Its state dict lists a tied head under both of its names."""
    torch.manual_seed(5)
    trainer: Any = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    assert "lm_head.weight" in trainer.state_dict()
    model = CausalLM(ModelConfig.from_dict(trainer.config.to_dict()))
    generator = Generator(model, Numbers())
    generator.sync(trainer.state_dict())
    other = CausalLM(model.config)
    other.load_state_dict(trainer.state_dict())
    assert same(generator.generate(PROMPTS, PARAMS), fresh(other))
    with torch.no_grad():
        trainer.get_input_embeddings().weight.neg_()
    assert generator.sync(trainer) == 2
    other.load_state_dict(trainer.state_dict())
    assert same(generator.generate(PROMPTS, PARAMS), fresh(other))


def drop(state: dict[str, Any]) -> None:
    del state["model.norm.weight"]
    del state["model.layers.1.mlp.up_proj.weight"]


BAD: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (drop, r"lacks 2 parameters, among them model.layers.1.mlp.up_proj.weight, model.norm.weight"),
    (lambda state: state.clear(), "lacks 21 parameters"),
    (lambda state: state.update({"model.new": torch.zeros(2)}), r"model.new is \[2\].* no such"),
    (
        lambda state: state.update({"model.norm.weight": torch.zeros(47)}),
        r"model.norm.weight is \[47\], .*\[48\]",
    ),
    (
        lambda state: state.update({"model.norm.weight": torch.zeros(48, 1)}),
        r"model.norm.weight is \[48, 1\], .*\[48\]",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_a_bad_source(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    generator = Generator(make_model(0), Numbers())
    generator.generate(PROMPTS, PARAMS)
    state = dict(make_model(1).state_dict())
    spoil(state)
    for source in (state, iter(state.items()), list(state.items())):
        with pytest.raises(ValueError, match=f"^sync: .*{message}"):
            generator.sync(source)
        if source is state:  # checked before anything is copied
            assert same(generator.generate(PROMPTS, PARAMS), fresh(generator.model))
        else:
            with pytest.raises(ValueError, match="sync again before anything is generated"):
                generator.generate(PROMPTS, PARAMS)
            generator.sync(make_model(1))
            assert same(generator.generate(PROMPTS, PARAMS), fresh(make_model(1)))


@pytest.mark.parametrize(("spoil", "message"), [BAD[0], *BAD[2:]])
def test_a_bad_source_changes_nothing(
    spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    generator = Generator(make_model(0), Numbers())
    before = copy.deepcopy(generator.model.state_dict())
    state = dict(make_model(1).state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=message):
        generator.sync(state)
    after = generator.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Moving(Tensor):
    """A tensor that somebody writes to: it reads differently the second time."""

    def to(self, *_: Any, **__: Any) -> Tensor:
        return self.as_subclass(Tensor) + 1


def test_a_copy_is_verified() -> None:
    model, state = make_model(0), dict(make_model(1).state_dict())
    copy_weights(model, state)
    name = "model.layers.1.self_attn.k_proj.weight"
    state[name] = state[name].clone().as_subclass(Moving)
    with pytest.raises(ValueError, match=f"sync: {name} differs from its source after the copy"):
        copy_weights(model, state)


def test_own_memory_is_not_copied() -> None:
    model = make_model(0)
    counters = [parameter._version for parameter in model.parameters()]
    copy_weights(model, model.state_dict())
    assert [parameter._version for parameter in model.parameters()] == counters


def test_another_view_of_the_same_memory_is_not_taken_for_the_same() -> None:
    model = nn.Linear(4, 4, bias=False)
    turned = model.weight.detach().clone().t()
    copy_weights(model, {"weight": model.weight.detach().t()})
    assert torch.equal(model.weight, turned)
    assert not torch.equal(turned, turned.t())
