"""`CausalLM` and `PackedAttention` against transformers, fp32, on random tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rmr1.engine.attention import PackedAttention
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.model import CausalLM, ModelConfig, _nan_from
from rmr1.engine.native_step import NativeStep
from rmr1.kernels.rmsnorm import rmsnorm
from rmr1.kernels.rope import RopeScaling, inverse_frequencies, rope, rope_tables
from rmr1.kernels.segments import SLACK_TOKENS
from rmr1.kernels.token_logprob import token_logprobs

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e4,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
NAN, INFINITE = float("nan"), float("inf")  # which JSON as Python reads it may hold
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-biased": LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=16),
    "llama-llama3": LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)),
    "llama-linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama-dynamic": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied-yarn": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=dict(YARN)),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-tied-biased": Qwen3Config(
        **SIZES, head_dim=24, tie_word_embeddings=True, attention_bias=True
    ),
    "qwen3-yarn-mscale": Qwen3Config(
        **SIZES,
        head_dim=16,
        rope_parameters={
            **YARN,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
        },
    ),
}
LENGTHS = [7, 1, 100, 33, 90]


def twins(config: Any) -> tuple[nn.Module, CausalLM]:
    """The same random weights in transformers and here. Norms and biases are random, too."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    ours = CausalLM(ModelConfig.from_dict(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequences(lengths: list[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (length,), generator=generator) for length in lengths]


def packed(rows: list[Tensor]) -> tuple[Tensor, Tensor, PackedAttention]:
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(rows), positions, PackedAttention(lengths)


def log_softmax(model: CausalLM, rows: list[Tensor]) -> Tensor:
    return (model(*packed(rows)) @ model.lm_head_weight.T).log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_transformers(name: str) -> None:
    theirs, ours = twins(FAMILIES[name])
    rows = sequences()
    with torch.no_grad():
        expected = torch.cat([theirs(row[None]).logits[0] for row in rows]).log_softmax(-1)
        found = log_softmax(ours, rows)
    assert expected.std() > 0.5  # random enough to tell models apart
    assert (found - expected).abs().max() < 3e-5


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2-tied-yarn", "qwen3", "llama-tied-biased"])
def test_sft_loss_and_gradients_equal_transformers(name: str) -> None:
    theirs, ours = twins(FAMILIES[name])
    rows = sequences()
    prompt = 3  # tokens without a loss at the start of each row
    count = sum(max(len(row) - prompt, 0) for row in rows)
    loss = torch.tensor(0.0)
    for row in rows:
        logits = theirs(row[None]).logits[0]
        if len(row) > prompt:
            loss = loss + nn.functional.cross_entropy(
                logits[prompt - 1 : -1], row[prompt:], reduction="sum"
            )
    (loss / count).backward()

    ids, positions, attend = packed(rows)
    target = (positions >= prompt).nonzero().squeeze(1)
    hidden = ours(ids, positions, attend)
    mine = -token_logprobs(hidden[target - 1], ours.lm_head_weight, ids[target]).sum() / count
    mine.backward()

    assert abs(mine.item() - loss.item() / count) < 1e-5
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    checked = 0
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert grads[key].abs().max() > 1e-7, key
        error = (parameter.grad - grads[key]).abs().max()
        assert error < 1e-4 * grads[key].abs().max() + 1e-7, key
        checked += 1
    assert checked == len(grads)


@pytest.mark.parametrize(
    "lengths",
    [
        [5],
        [9, 9, 9],
        [1, 1, 1],
        [200, 3, 57, 60, 58, 3, 199, 1],
        [10 + (i * 37) % 120 for i in range(60)],
        [4, 4 + SLACK_TOKENS, 5 + SLACK_TOKENS],
    ],
)
def test_packed_equals_separate_forward_and_backward(lengths: list[int]) -> None:
    """Every sequence alone through plain attention gives what the packed batch gives."""
    torch.manual_seed(2)
    total, heads, keys, dim = sum(lengths), 6, 2, 8
    q, k, v = (torch.randn(total, n, dim, requires_grad=True) for n in (heads, keys, keys))
    weight = torch.randn(total, heads, dim)
    pieces = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        ks, vs = (x.repeat_interleave(heads // keys, dim=1) for x in (ks, vs))
        scores = torch.einsum("qnd,knd->nqk", qs, ks) / dim**0.5
        hidden = torch.ones(len(qs), len(qs)).triu(1).bool()
        pieces.append(
            torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vs)
        )
    expected = torch.cat(pieces)
    attend = PackedAttention(lengths)
    found = attend(0, q, k, v)
    again = attend(1, q, k, v)
    assert found.shape == (total, heads, dim)
    assert torch.equal(found, again)
    assert (found - expected).abs().max() < 1e-5
    truth = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    mine = torch.autograd.grad((found * weight).sum(), (q, k, v))
    for a, b in zip(mine, truth, strict=True):
        assert max(lengths) == 1 or b.abs().max() > 0.01
        assert (a - b).abs().max() < 1e-4


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    _, ours = twins(FAMILIES["qwen3"])
    rows = sequences()
    with torch.no_grad():
        together = ours(*packed(rows)).split(LENGTHS)
        for row, hidden in zip(rows, together, strict=True):
            assert (ours(*packed([row])) - hidden).abs().max() < 2e-5


def test_attend_is_called_once_per_layer_with_rotated_heads() -> None:
    _, ours = twins(FAMILIES["llama"])
    seen = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return torch.zeros_like(q)

    hidden = ours(torch.arange(5), torch.arange(5), attend)
    assert hidden.shape == (5, 48)
    assert seen == [(layer, (5, 6, 8), (5, 2, 8), (5, 2, 8)) for layer in range(3)]


@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen3"])
def test_16_bit_weights_compute_near_fp32(name: str) -> None:
    _, ours = twins(FAMILIES[name])
    rows = sequences([20, 9])
    with torch.no_grad():
        exact = ours(*packed(rows))
        rounded = ours.to(torch.bfloat16)(*packed(rows))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_norm_statistics_are_fp32() -> None:
    x = torch.randn(4, 1024).to(torch.bfloat16) * 100
    exact = rmsnorm(x.double(), torch.ones(1024, dtype=torch.float64), 1e-6)
    found = rmsnorm(x, torch.ones(1024, dtype=torch.bfloat16), 1e-6)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 6), (1, 1)])
def test_norm_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm(x, w, 1e-3), (x, w))
    plain = nn.functional.rms_norm(x, shape[-1:], w, 1e-3)
    assert torch.allclose(rmsnorm(x, w, 1e-3), plain)
    with torch.no_grad():
        assert torch.equal(rmsnorm(x, w, 1e-3), rmsnorm(x.detach(), w, 1e-3))


def test_rope_gradient() -> None:
    frequencies = inverse_frequencies(8, 1e4, RopeScaling())
    cos, sin = rope_tables(torch.arange(3), frequencies, 1.3, torch.float64)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))
    with torch.no_grad():
        assert torch.equal(rope(x, cos, sin), rope(x.detach(), cos, sin))


def test_rope_depends_on_distances_only() -> None:
    frequencies = inverse_frequencies(16, 1e4, RopeScaling())
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(at: int, distance: int) -> float:
        cos, sin = rope_tables(torch.tensor([at, at + distance]), frequencies, 1.0, torch.float32)
        return float((rope(q, cos[1:], sin[1:]) * rope(k, cos[:1], sin[:1])).sum())

    assert abs(score(0, 5) - score(100, 5)) < 1e-4
    assert abs(score(0, 5) - score(0, 9)) > 1e-3


def test_dynamic_rope_beyond_the_trained_length_is_an_error() -> None:
    _, ours = twins(FAMILIES["llama-dynamic"])
    row = [torch.zeros(257, dtype=torch.int64)]
    with pytest.raises(ValueError, match=r"position 256 .*max_position_embeddings = 256.*dynamic"):
        ours(*packed(row))


def test_dynamic_rope_waits_for_no_device() -> None:
    """A tensor without values cannot be looked at: neither may a GPU's be."""
    _, ours = twins(FAMILIES["llama-dynamic"])
    with torch.device("meta"):
        hidden = ours.to("meta")(torch.zeros(300).long(), torch.arange(300), lambda _, q, *__: q)
    assert hidden.shape == (300, 48)


def test_dynamic_rope_beyond_the_trained_length_is_nan_on_a_device() -> None:
    """The rest is what the same positions give on a CPU."""
    config = ModelConfig.from_dict(FAMILIES["llama-dynamic"].to_dict())
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    positions = torch.tensor([0, 255, 256, 7, 4000])
    marked = _nan_from(positions, 256)
    for found, plain in zip(
        rope_tables(marked, frequencies, 1.0, torch.float32),
        rope_tables(positions, frequencies, 1.0, torch.float32),
        strict=True,
    ):
        inside = positions < 256
        assert torch.equal(found[inside], plain[inside])
        assert found[~inside].isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dynamic_rope_on_a_gpu() -> None:
    _, ours = twins(FAMILIES["llama-dynamic"])
    ours.cuda()
    ids = torch.zeros(257, dtype=torch.int64, device="cuda")
    positions = torch.arange(257, device="cuda")
    ours(ids, positions, lambda _, q, *__: q)  # frequencies are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = ours(ids, positions, lambda _, q, *__: q)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden[:256].isfinite().all()
    assert hidden[256].isnan().all()


@pytest.mark.parametrize("length", [1, 255, 256])
def test_dynamic_rope_up_to_the_trained_length_equals_transformers(length: int) -> None:
    theirs, ours = twins(FAMILIES["llama-dynamic"])
    rows = sequences([length])
    with torch.no_grad():
        expected = theirs(rows[0][None]).logits[0].log_softmax(-1)
        assert (log_softmax(ours, rows) - expected).abs().max() < 3e-5


class Numbers:
    """A tokenizer for the generator."""

    eos_token_id = None

    def decode(self, token_ids: list[int], **_: object) -> str:
        return str(token_ids)


def test_dynamic_rope_in_every_path_of_the_generator() -> None:
    """In C++ and through the model's forward alike, to the last position, and not past it."""
    _, ours = twins(FAMILIES["llama-dynamic"])
    prompt = sequences([240])[0].tolist()
    params = SamplingParams(temperature=0, max_new_tokens=16)
    found = []
    for native in (True, False):
        if not native:
            ours.forward = ours.forward  # type: ignore[method-assign]
        assert NativeStep.suits(ours) == native
        generator = Generator(ours, Numbers())
        [[rollout]] = generator.generate([prompt], params)
        found.append(rollout)
        with pytest.raises(ValueError, match="256 positions"):
            generator.generate([[*prompt, 1]], params)
    assert found[0].token_ids == found[1].token_ids
    assert torch.tensor(found[0].logprobs).allclose(torch.tensor(found[1].logprobs), atol=1e-4)
    with torch.no_grad():
        rows = [torch.tensor([*prompt, *found[0].token_ids])]
        whole = log_softmax(ours, rows)[239:255].gather(1, rows[0][240:, None]).squeeze(1)
    assert torch.tensor(found[0].logprobs).allclose(whole, atol=1e-4)


def test_random_start_is_what_the_config_says() -> None:
    config = ModelConfig.from_dict(FAMILIES["qwen2"].to_dict())
    first, second = (
        CausalLM(config),
        CausalLM(config),
    )
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(3))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    state = first.state_dict()
    assert abs(state["model.embed_tokens.weight"].std() - 0.02) < 0.002
    assert (state["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    assert (state["model.norm.weight"] == 1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_config_survives_its_own_dictionary(name: str) -> None:
    config = ModelConfig.from_dict(FAMILIES[name].to_dict())
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_old_and_new_spelling_of_rope_agree() -> None:
    base = {**SIZES, "model_type": "llama"}
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    new = ModelConfig.from_dict({**base, "rope_parameters": LLAMA3})
    old = ModelConfig.from_dict({**base, "rope_theta": 5e4, "rope_scaling": scaling})
    older = ModelConfig.from_dict(
        {**base, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    assert new == old
    assert (new.rope_theta, new.rope_scaling.kind) == (5e4, "llama3")
    assert (older.rope_theta, older.rope_scaling.kind) == (1e6, "linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, r"unknown architecture 'mamba'.*llama .*qwen2 .*qwen3"),
        ({"model_type": None}, r"unknown architecture None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"not a causal language model"),
        ({"hidden_size": None}, r"hidden_size must be a positive integer, got None"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be a positive integer, got 0"),
        ({"num_key_value_heads": 4}, r"\(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"head_dim": 7}, r"head_dim must be even"),
        ({"hidden_act": "gelu"}, r"hidden_act must be silu, got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, r"quantized"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"rope type 'longrope'.*llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor must be a number, got None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, r"low_freq_factor must be"),
        ({"rope_scaling": {"full_attention": {"rope_theta": 1.0}}}, r"one flat object"),
        ({"rms_norm_eps": "tiny"}, r"rms_norm_eps must be a number, got 'tiny'"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 1,
            },
            r"sliding_window = 64",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            r"sliding_window = 64",
        ),
    ],
)
def test_bad_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict({**SIZES, "model_type": "llama", **change})


SLIDING = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": ["llama"]}, r"unknown architecture \['llama'\]"),
        ({"model_type": {}}, r"unknown architecture \{\}"),
        ({"architectures": 1}, r"architectures must be a list of names, got 1"),
        ({"architectures": "LlamaForCausalLM"}, r"architectures must be a list of names"),
        ({"architectures": [None]}, r"architectures must be a list of names"),
        ({"layer_types": 1}, r"layer_types must be a list of names, got 1"),
        ({**SLIDING, "max_window_layers": None}, r"max_window_layers must be an integer from 0 up"),
        ({**SLIDING, "num_hidden_layers": "3"}, r"num_hidden_layers must be .* got '3'"),
        ({**SLIDING, "max_window_layers": 0, "sliding_window": "64"}, r"sliding_window must be a"),
        ({**SLIDING, "max_position_embeddings": None}, r"max_position_embeddings must be a pos"),
        ({**SLIDING, "use_sliding_window": "false"}, r"use_sliding_window must be true or false"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings must be true or false, got 'f"),
        ({"vocab_size": 10**30}, r"vocab_size must be at most 1048576, got 10{30}"),
        ({"vocab_size": 97.0}, r"vocab_size must be a positive integer, got 97\.0"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers must be at most 4096"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be a positive integer, got 0"),
        ({"head_dim": [16]}, r"head_dim must be a positive integer, got \[16\]"),
        ({"rms_norm_eps": NAN}, r"rms_norm_eps must be a finite number above 0 .*, got nan"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps must be a finite number above 0"),
        ({"initializer_range": -1}, r"initializer_range must be 0 or a finite number above it"),
        ({"rope_theta": 0}, r"rope_theta must be a finite number above 0 .*, got 0"),
        ({"rope_theta": INFINITE}, r"rope_theta must be a finite number above 0 .*, got inf"),
        ({"rope_theta": 10**400}, r"rope_theta must be a finite number above 0"),
        ({"eos_token_id": "x"}, r"eos_token_id must be a token id or a list .* got 'x'"),
        ({"eos_token_id": [[2]]}, r"eos_token_id must hold token ids only, got \[\[2\]\]"),
        ({"bos_token_id": 2**40}, r"bos_token_id must be a token id, got 1099511627776"),
        *(
            ({"rope_scaling": {**LINEAR, "factor": value}}, rf"factor must be .* got {value}")
            for value in (0, 0.0, -2.0, NAN, INFINITE, 1e-320, True)
        ),
        ({"rope_scaling": {**LINEAR, "rope_type": "dynamic", "factor": 0}}, r"factor must be"),
        ({"rope_scaling": {**LLAMA3, "factor": NAN}}, r"factor must be .* got nan"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, r"above low_freq_factor \(1\.0\)"),
        ({"rope_scaling": {**YARN, "factor": 0}}, r"factor must be"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, r"beta_fast must be"),
        ({"rope_scaling": {**YARN, "rope_theta": 1}}, r"frequencies that are not finite"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e38, "rope_theta": 1}}, r"not finite"),
        ({"rope_scaling": {**YARN, "attention_factor": [1]}}, r"attention_factor must be a number"),
        ({"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1}}, r"mscale must be a num"),
        ({"rope_scaling": {**YARN, "truncate": 0}}, r"truncate must be true or false, got 0"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": True}},
            r"original_max_position_embeddings must be a positive integer, got True",
        ),
    ],
)
def test_values_of_the_wrong_type_or_size(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ModelConfig.from_dict({**SIZES, "model_type": "llama", **change})
    assert len(str(caught.value)) < 400


def test_any_value_in_any_place_is_understood_or_refused() -> None:
    """No value gives another error than ValueError, nor a model whose angles are not finite."""
    whole = {**FAMILIES["qwen2-tied-yarn"].to_dict(), **SLIDING, "max_window_layers": 3}
    whole |= {"attention_bias": False, "layer_types": None, "rope_theta": 1e4}
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    odd = [None, True, 0, -1, 1, 2.5, 10**30, 10**400, NAN, -INFINITE, 1e-320, 1e300, "", "x"]
    odd += [[], [None], [[1]], {}, {"factor": 1}, deep, {"x": deep}]
    outcomes = []
    for kind in ("yarn", "linear", "llama3", "dynamic"):
        rope = {**YARN, **LLAMA3, "rope_type": kind, "mscale": 1.0, "mscale_all_dim": 1.0}
        rope |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True}
        cases = [{**whole, "rope_parameters": rope, name: value} for name in whole for value in odd]
        cases += [
            {**whole, "rope_parameters": {**rope, name: value}} for name in rope for value in odd
        ]
        for raw in cases:
            try:
                config = ModelConfig.from_dict(raw)
            except ValueError as error:
                assert len(str(error)) < 500  # noqa: PT017
                outcomes.append(False)
                continue
            outcomes.append(True)
            frequencies = inverse_frequencies(
                config.head_dim, config.rope_theta, config.rope_scaling
            )
            assert frequencies.isfinite().all()
            assert ModelConfig.from_dict(config.to_dict()) == config
    assert 0.2 < sum(outcomes) / len(outcomes) < 0.8


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": None, "pad_token_id": -1, "eos_token_id": [2, 3]},
        {"architectures": None, "layer_types": None, "rope_scaling": None, "rms_norm_eps": None},
        {"max_position_embeddings": 10_485_760, "vocab_size": 262_144, "initializer_range": 0},
        {"max_window_layers": None, "use_sliding_window": False},
    ],
)
def test_values_that_real_models_have_are_fine(change: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**SIZES, "model_type": "qwen2", **change})
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
    ],
)
def test_a_window_that_hides_nothing_is_fine(change: dict[str, Any]) -> None:
    assert ModelConfig.from_dict({**SIZES, "model_type": "qwen2", **change}).qkv_bias


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="`vocab_size` is missing"):
        ModelConfig.from_dict({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1})


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="leave empty sequences out"):
        PackedAttention([3, 0])
    with pytest.raises(ValueError, match="leave empty sequences out"):
        PackedAttention([])
    x = torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match="laid out for 6 tokens and got 5"):
        PackedAttention([3, 3])(0, x, x, x)
