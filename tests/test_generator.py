"""The generator against transformers, against the packed forward, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rmr1.engine import generation
from rmr1.engine.attention import PackedAttention
from rmr1.engine.cache_plan import bytes_per_token, plan_cache
from rmr1.engine.detokenize import StopStrings
from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.kv_cache import cache_dtype
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.kernels import kv_store, paged_attention, sample
from rmr1.kernels.token_logprob import token_logprobs

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
    "initializer_range": 0.3,  # far-apart logits: no near ties
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def byte_tokenizer(eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One token per byte, one special token, and tags that are added but not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])  # 256
    tokenizer.add_tokens([AddedToken("<answer>"), AddedToken("</answer>")])  # 257, 258
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(eos=None)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ModelConfig.from_dict(LlamaConfig(**SIZES).to_dict()))


def make_prompts(count: int, longest: int = 60) -> list[list[int]]:
    random = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [torch.randint(0, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def packed_logprobs(
    model: CausalLM, prompt: list[int], rollout: Rollout, temperature: float
) -> torch.Tensor:
    ids = torch.tensor(prompt + rollout.token_ids)
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))
        return token_logprobs(
            hidden[len(prompt) - 1 : -1],
            model.lm_head_weight,
            ids[len(prompt) :],
            temperature=temperature,
        )


class Scripted(CausalLM):
    """A model that says a given text whatever it is asked: the token after position p is fixed."""

    def __init__(self, script: list[int], prompt_length: int) -> None:
        super().__init__(
            ModelConfig.from_dict(
                {**LlamaConfig(**SIZES).to_dict(), "hidden_size": VOCABULARY, "head_dim": 50}
            )
        )
        self.script, self.first = script, prompt_length - 1
        with torch.no_grad():
            self.lm_head_weight.copy_(torch.eye(VOCABULARY) * 100)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> Any:
        super().forward(token_ids, positions, attend)
        places = (positions - self.first).clamp(0, len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[places], VOCABULARY).float()


def say(text: str | list[int], tokenizer: Any, **options: Any) -> Rollout:
    """What the generator makes of a model that says this text."""
    script = tokenizer.encode(text) if isinstance(text, str) else text
    options = {"max_new_tokens": len(script), **options}
    generator = Generator(Scripted(script, 3), tokenizer)
    [[rollout]] = generator.generate([[1, 2, 3]], SamplingParams(**options))
    return rollout


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, tokenizer: Any) -> None:
    torch.manual_seed(3)
    reference = FAMILIES[family]().eval()
    model = CausalLM(ModelConfig.from_dict(reference.config.to_dict()))
    model.load_state_dict(reference.state_dict())
    prompts = make_prompts(20)
    params = SamplingParams(temperature=0, max_new_tokens=30)
    # Too little memory for all: greedy decoding must survive refilled slots.
    for memory in (None, 0.0005):
        outputs = Generator(model, tokenizer, kv_memory_gb=memory).generate(prompts, params)
        for prompt, [rollout] in zip(prompts, outputs, strict=True):
            ids = torch.tensor([prompt])
            expected = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
            )
            assert rollout.token_ids == expected[0, len(prompt) :].tolist()
            assert rollout.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 5])
def test_logprobs_equal_the_packed_forward(
    model: CausalLM, tokenizer: Any, temperature: float, n: int
) -> None:
    prompts = make_prompts(9)
    # Ends at different lengths, so that rows are refilled.
    params = SamplingParams(
        n=n, temperature=temperature, max_new_tokens=25, stop_token_ids=tuple(range(0, 300, 17))
    )
    for options in ({}, {"kv_memory_gb": 0.0001}, {"max_batch_tokens": 7, "block_size": 3}):
        outputs = Generator(model, tokenizer, **options).generate(prompts, params)
        lengths = set()
        for prompt, rollouts in zip(prompts, outputs, strict=True):
            for rollout in rollouts:
                expected = packed_logprobs(model, prompt, rollout, temperature or 1.0)
                torch.testing.assert_close(
                    torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0
                )
                lengths.add(len(rollout.token_ids))
        assert len(lengths) > 3


def test_a_draw_does_not_depend_on_the_batch(model: CausalLM, tokenizer: Any) -> None:
    prompts = make_prompts(7)
    params = SamplingParams(n=4, seed=11, max_new_tokens=20, stop_token_ids=(5, 6, 7, 8, 9))
    everything = Generator(model, tokenizer).generate(prompts, params)
    tokens = [[rollout.token_ids for rollout in group] for group in everything]
    for options in ({"kv_memory_gb": 0.00006}, {"max_batch_tokens": 1}, {"block_size": 1}):
        again = Generator(model, tokenizer, **options).generate(prompts, params)
        assert [[rollout.token_ids for rollout in group] for group in again] == tokens
    # Alone: only the first prompt, and fewer samples of it.
    fewer = SamplingParams(n=2, seed=11, max_new_tokens=20, stop_token_ids=(5, 6, 7, 8, 9))
    [alone] = Generator(model, tokenizer).generate(prompts[:1], fewer)
    assert [rollout.token_ids for rollout in alone] == tokens[0][:2]
    # The samples of a prompt differ, and so do seeds.
    assert len({tuple(ids) for ids in tokens[0]}) == 4
    other = Generator(model, tokenizer).generate(prompts, SamplingParams(seed=12, max_new_tokens=9))
    assert other[0][0].token_ids[:9] != tokens[0][0][:9]


def test_samples_are_contiguous_and_follow_the_order_of_the_prompts(tokenizer: Any) -> None:
    torch.manual_seed(5)
    model = CausalLM(ModelConfig.from_dict(LlamaConfig(**SIZES).to_dict()))
    prompts = make_prompts(6, longest=40)
    greedy = SamplingParams(n=3, temperature=0, max_new_tokens=8)
    outputs = Generator(model, tokenizer).generate(prompts, greedy)
    assert [len(group) for group in outputs] == [3] * 6
    for prompt, group in zip(prompts, outputs, strict=True):
        one = SamplingParams(temperature=0, max_new_tokens=8)
        [[alone]] = Generator(model, tokenizer).generate([prompt], one)
        assert [rollout.token_ids for rollout in group] == [alone.token_ids] * 3


def test_progress_adds_up(model: CausalLM, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    params = SamplingParams(n=3, max_new_tokens=12, stop_token_ids=tuple(range(20)))
    outputs = Generator(model, tokenizer, kv_memory_gb=0.0001).generate(
        make_prompts(5), params, progress=lambda finished, tokens: seen.append((finished, tokens))
    )
    assert sum(finished for finished, _ in seen) == 15
    drawn = sum(len(rollout.token_ids) for group in outputs for rollout in group)
    assert sum(tokens for _, tokens in seen) == drawn


def test_finished_sequences_cost_nothing(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(LlamaConfig(**SIZES).to_dict()))
    computed = 0
    forward = model.forward

    def counting(token_ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        nonlocal computed
        computed += len(token_ids)
        return forward(token_ids, positions, attend)

    model.forward = counting  # type: ignore[method-assign]
    prompts = make_prompts(10)
    params = SamplingParams(n=2, max_new_tokens=30, stop_token_ids=tuple(range(0, 300, 12)))
    outputs = Generator(model, tokenizer).generate(prompts, params)
    drawn = sum(len(rollout.token_ids) for group in outputs for rollout in group)
    # Each prompt once, and each token but a sample's last.
    assert computed == sum(map(len, prompts)) + drawn - 20


def test_training_goes_on_after_generation_with_the_new_weights(tokenizer: Any) -> None:
    torch.manual_seed(7)
    model = CausalLM(ModelConfig.from_dict(LlamaConfig(**SIZES).to_dict())).train()
    model.model.norm.eval()
    generator = Generator(model, tokenizer)
    prompts, params = make_prompts(3), SamplingParams(temperature=0, max_new_tokens=10)
    before = generator.generate(prompts, params)
    assert model.training
    assert model.model.layers.training
    assert not model.model.norm.training
    ids = torch.tensor(prompts[0] + before[0][0].token_ids)
    hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))
    loss = -token_logprobs(hidden[:-1], model.lm_head_weight, ids[1:]).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.5 * parameter.grad.sign()
    after = generator.generate(prompts, params)
    fresh = CausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    expected = Generator(fresh, tokenizer).generate(prompts, params)
    assert after == expected
    assert after != before


# --- 16 bits on a CPU ----------------------------------------------------------------------------


def exact_logprobs(model: CausalLM, ids: list[int]) -> torch.Tensor:
    """Of every token after each of these but the last, in fp64 on the same weights: [T - 1, V]."""
    exact = CausalLM(model.config).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.tensor(ids[:-1])
    with torch.no_grad():
        hidden = exact(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))
        return (hidden @ exact.lm_head_weight.T).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_on_a_cpu(
    family: str, dtype: torch.dtype, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error may be twice that of the packed forward in the same dtype, which is uncached."""
    torch.manual_seed(3)
    config = ModelConfig.from_dict(FAMILIES[family]().config.to_dict())
    model = CausalLM(config).to(dtype)
    generator, prompts = Generator(model, tokenizer), make_prompts(6)
    with monkeypatch.context() as native:
        for module in (kv_store, paged_attention, sample):
            native.setattr(module, "reference", None)
        outputs = generator.generate(prompts, SamplingParams(temperature=0, max_new_tokens=12))
    inside = generator._generation
    assert inside is not None
    assert not inside.native
    assert inside.cache.keys.dtype == torch.float32
    error = yardstick = short = 0.0
    for prompt, [rollout] in zip(prompts, outputs, strict=True):
        exact = exact_logprobs(model, prompt + rollout.token_ids)[len(prompt) - 1 :]
        drawn = exact.gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)
        packed = packed_logprobs(model, prompt, rollout, 1.0)
        error = max(error, float((torch.tensor(rollout.logprobs) - drawn).abs().max()))
        yardstick = max(yardstick, float((packed - drawn).abs().max()))
        short = max(short, float((exact.amax(1) - drawn).max()))
    assert 1e-4 < yardstick < 0.5
    assert error <= 2 * yardstick
    assert short <= 4 * yardstick  # the best token, but for the errors of two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_cache_is_as_large_as_its_dtype_says(dtype: torch.dtype, model: CausalLM) -> None:
    weight = torch.empty(1, dtype=dtype)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    assert cache_dtype(weight) == wide
    assert cache_dtype(weight.to("meta")) == dtype
    assert bytes_per_token(model.config, cache_dtype(weight)) == 2 * 2 * 2 * 8 * wide.itemsize


# --- What is kept from step to step --------------------------------------------------------------


def test_what_is_drawn_lies_in_memory_of_its_own(
    model: CausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits' memory is one for all steps, and what users get is not in it."""
    prompts, params = make_prompts(8), SamplingParams(n=2, max_new_tokens=12, top_k=40)
    plain = Generator(model, tokenizer).generate(prompts, params)
    places, rows = set[int](), 0
    draw = generation.Generation._draw

    def spoiled(self: generation.Generation, step: Any, hidden: torch.Tensor) -> Any:
        nonlocal rows
        drawn = draw(self, step, hidden)
        if len(step.rows):
            places.add(self._logits_memory.data_ptr())
            rows = max(rows, len(step.rows))
        self._logits_memory.fill_(torch.nan)
        hidden.fill_(torch.nan)
        return drawn

    monkeypatch.setattr(generation.Generation, "_draw", spoiled)
    generator = Generator(model, tokenizer)
    first = generator.generate(prompts, params)
    second = generator.generate(prompts, params)
    assert first == second == plain
    assert rows == 16
    assert len(places) == 1
    # In several pieces, each of which overwrites the one before.
    monkeypatch.setitem(generation.MOST_LOGITS, "cpu", 3 * VOCABULARY)
    generator = Generator(model, tokenizer)
    assert generator.generate(prompts, params) == plain
    inside = generator._generation
    assert inside is not None
    assert inside._logits_memory.numel() == 3 * VOCABULARY


# --- Adapters and hooks --------------------------------------------------------------------------


class Adapter(torch.nn.Linear):
    """A projection with something beside it, as LoRA's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.roll(1, -1)[..., : self.out_features]


def adapted(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.__class__ = Adapter


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: -output)


@pytest.mark.parametrize("change", [adapted, hooked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_cached_outlives_a_change_of_the_modules(
    model: CausalLM, tokenizer: Any, change: Any, dtype: torch.dtype
) -> None:
    """Computed in C++ before, or through modules as on a GPU; afterwards through modules."""
    own, other = CausalLM(model.config).to(dtype), CausalLM(model.config).to(dtype)
    for one in (own, other):
        one.load_state_dict(model.state_dict())
    prompts, params = [[7] * 50], SamplingParams(temperature=0, max_new_tokens=8)
    generator = Generator(own, tokenizer)
    before = generator.generate(prompts, params)
    for one in (own, other):
        change(one)
    after = generator.generate(prompts, params)
    assert after == Generator(other, tokenizer).generate(prompts, params)
    assert after[0][0].logprobs != before[0][0].logprobs
    kept = generator._generation
    assert generator.generate(prompts, params)[0][0].token_ids == after[0][0].token_ids
    assert generator._generation is kept


def test_an_adapter_that_comes_while_samples_run(model: CausalLM, tokenizer: Any) -> None:
    own, other = CausalLM(model.config), CausalLM(model.config)
    for one in (own, other):
        one.load_state_dict(model.state_dict())
    adapted(other)
    prompts, params = make_prompts(3), SamplingParams(temperature=0, max_new_tokens=20)
    wanted = Generator(other, tokenizer).generate(prompts, params)
    generator = Generator(own, tokenizer)
    stream = generator.stream(prompts, params)
    for _ in range(5):
        generator._step()
    adapted(own)
    generator.sync(own)  # they begin anew
    found = {one.prompt: one.rollout.token_ids for one in stream}
    assert [found[prompt] for prompt in range(3)] == [group[0].token_ids for group in wanted]
    assert found[0] != Generator(model, tokenizer).generate(prompts, params)[0][0].token_ids
    assert generator._generation is not None
    assert not generator._generation.native


def test_stop_token_is_in_the_ids_and_not_in_the_text() -> None:
    tokenizer = byte_tokenizer()
    rollout = say("yes<eos>no", tokenizer, temperature=0)
    assert rollout.text == "yes"
    assert rollout.finish_reason == "stop"
    assert rollout.token_ids == tokenizer.encode("yes<eos>")
    assert len(rollout.logprobs) == 4
    # A stop token that is no special one, and the last token allowed.
    rollout = say("abc!", tokenizer, temperature=0, stop_token_ids=tokenizer.encode("!"))
    assert (rollout.text, rollout.finish_reason) == ("abc", "stop")


def test_added_tags_stay_in_the_text() -> None:
    rollout = say("<answer>A</answer><eos>", byte_tokenizer(), temperature=0)
    assert rollout.text == "<answer>A</answer>"
    assert len(rollout.token_ids) == 4


def test_end_tokens_of_every_source(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [258, 65]}')
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    model = CausalLM(ModelConfig.from_dict({**LlamaConfig(**SIZES).to_dict(), "eos_token_id": 9}))
    generator = Generator(model, loaded)
    assert generator.end_tokens(SamplingParams(stop_token_ids=(3,))) == [3, 9, 65, 256, 258]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one END two", ("two", "END"), "one "),
        ("aab aaab", ("aaab",), "aab "),
        ("END", ("END",), ""),
        ("x。文字", ("文",), "x。"),
        ("a\n\nb", ("\n\n",), "a"),
        ("ab 🙂 cd", ("🙂 c",), "ab "),
    ],
)
def test_stop_strings_lie_across_tokens(
    text: str, stop: tuple[str, ...], expected: str, tokenizer: Any
) -> None:
    rollout = say(text, tokenizer, temperature=0, stop=stop)
    assert rollout.text == expected
    assert rollout.finish_reason == "stop"
    # It ended with the token that completed the stop string, not later.
    kept = tokenizer.decode(rollout.token_ids)
    ended = [s for s in stop if kept.endswith(s)]
    assert len(ended) == 1
    assert kept == expected + ended[0]


def test_stop_string_of_an_added_tag_and_one_that_never_comes(tokenizer: Any) -> None:
    rollout = say("<answer>A</answer> more", tokenizer, temperature=0, stop=("</answer>",))
    assert rollout.text == "<answer>A"
    assert len(rollout.token_ids) == 3
    rollout = say("EN D E ND", tokenizer, temperature=0, stop=("END",))
    assert (rollout.text, rollout.finish_reason) == ("EN D E ND", "length")


def test_stop_table_asks_for_few_tokens(tokenizer: Any) -> None:
    stops = StopStrings(tokenizer, ("</answer>",), VOCABULARY)
    ids = tokenizer.encode("a>b<answer>")
    # Not "a", "b": only what holds a ">", and ids the tokenizer does not know.
    assert stops.may_end[[*ids, 299]].tolist() == [False, True, False, True, True]


def test_multi_byte_text_is_whole(tokenizer: Any) -> None:
    text = "né 漢字 🙂🏽 ok"
    assert say(text, tokenizer, temperature=0).text == text
    # Cut inside a character: the replacement character, nothing raised.
    assert say(tokenizer.encode("a🙂")[:3], tokenizer, temperature=0).text.startswith("a\ufffd")


def test_no_prompts(model: CausalLM, tokenizer: Any) -> None:
    assert Generator(model, tokenizer).generate([], SamplingParams()) == []


def test_the_longest_sequence_is_accepted(model: CausalLM, tokenizer: Any) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=6)
    [[rollout]] = Generator(model, tokenizer).generate([[1] * 250], params)
    assert len(rollout.token_ids) == 6


@pytest.mark.parametrize(
    ("prompts", "new", "memory", "message"),
    [
        ([[1], []], 5, None, r"prompts\[1\] is empty"),
        ([[1, 300]], 5, None, r"prompts\[0\] .*token id 300.*vocabulary has 300"),
        ([[1], [-1]], 5, None, r"prompts\[1\] .*token id -1"),
        ([[1] * 250], 7, None, r"250 tokens.*max_new_tokens=7.*256 positions"),
        ([[1], [1] * 99], 50, 1e-5, r"99 tokens.*max_new_tokens=50.*\S+ GB.* 1e-05 GB"),
    ],
)
def test_bad_prompts(
    model: CausalLM,
    tokenizer: Any,
    prompts: list[list[int]],
    new: int,
    memory: float | None,
    message: str,
) -> None:
    generator = Generator(model, tokenizer, kv_memory_gb=memory)
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, SamplingParams(max_new_tokens=new))


@pytest.mark.parametrize("name", ["kv_memory_gb", "block_size", "max_batch_tokens"])
def test_bad_options(model: CausalLM, tokenizer: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        Generator(model, tokenizer, **{name: 0})  # type: ignore[arg-type]


def test_plan_stays_within_the_budget() -> None:
    for budget in (159, 160, 5_000, 10**9):
        plan = plan_cache(budget=budget, token_bytes=10, block_size=16, most_blocks=1000)
        assert plan.total_bytes <= budget
        assert plan.blocks == min(1000, budget // 160)
    assert "1,000 blocks of 16 tokens = 16,000 tokens, 0.00016 GB of 1 GB" in str(plan)
