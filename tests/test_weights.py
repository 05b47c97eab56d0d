"""Model directories: what is read, what is written, and what is said about broken ones."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rmr1.engine.attention import PackedAttention
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.weights import load_model, read_config, save_model

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": [3, 4],
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


def tiny(seed: int = 0, **change: Any) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig.from_dict({**CONFIG, **change}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logprobs(model: CausalLM) -> Tensor:
    ids = torch.arange(40) % 61
    hidden = model(ids, torch.arange(40), PackedAttention([40]))
    return (hidden @ model.lm_head_weight.T).float().log_softmax(-1)


def same(a: CausalLM, b: CausalLM) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen3", "head_dim": 16},
    ],
)
def test_saved_model_loads_here_and_in_transformers(tmp_path: Path, change: dict) -> None:
    model = tiny(**change)
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = theirs((torch.arange(40) % 61)[None]).logits[0].log_softmax(-1)
    assert expected.std() > 0.5
    assert (logprobs(model) - expected).abs().max() < 3e-5


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    save_model(tiny(tie_word_embeddings=True), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert same(load_model(tmp_path / "theirs"), tiny(tie_word_embeddings=True))


def test_shards_round_trip_and_replace_a_single_file(tmp_path: Path) -> None:
    save_model(tiny(seed=1), tmp_path)
    model = tiny(seed=2)
    save_model(model, tmp_path, max_shard_bytes=20_000)
    names = sorted(file.name for file in tmp_path.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors" not in names
    assert all((tmp_path / name).stat().st_size < 25_000 for name in shards)
    assert same(load_model(tmp_path), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
    save_model(tiny(seed=3), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same(load_model(tmp_path), tiny(seed=3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_convert_on_reading_and_survive_saving(saved: Path, dtype: str) -> None:
    model = load_model(saved, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert all(p.dtype == wanted and p.requires_grad for p in model.parameters())
    again = saved.parent / "again"
    save_model(model, again)
    assert all(t.dtype == wanted for t in load_file(again / "model.safetensors").values())
    assert AutoModelForCausalLM.from_pretrained(again).dtype == wanted
    assert load_model(again).lm_head_weight.dtype == torch.float32
    assert 0 < (logprobs(load_model(again)) - logprobs(tiny())).abs().max() < 0.5


def test_loaded_weights_do_not_follow_the_file(saved: Path) -> None:
    model = load_model(saved)
    before = logprobs(model)
    with (saved / "model.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 20_000)
    assert torch.equal(logprobs(model), before)


def test_tokenizer_files_travel(saved: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 4}')
    (source / "optimizer.pt").write_text("left behind")
    save_model(tiny(), saved, extra_files_from=source)
    assert json.loads((saved / "generation_config.json").read_text()) == {"eos_token_id": 4}
    assert sorted(file.name for file in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    save_model(tiny(), saved, extra_files_from=saved)  # onto itself
    assert (saved / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match="nowhere is no directory"):
        save_model(tiny(), saved, extra_files_from=tmp_path / "nowhere")


def test_everyone_may_read_what_is_saved(saved: Path) -> None:
    modes = {file.stat().st_mode for file in saved.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(("limit", "shard"), [(30_000, 10**9), (9_000, 9_000)])
def test_a_full_disk_is_an_oserror_and_the_old_model_survives(
    tmp_path: Path, limit: int, shard: int
) -> None:
    """Files may not grow past `limit` bytes, which fails a write as a full disk does."""
    save_model(tiny(), tmp_path, max_shard_bytes=shard)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = tiny(seed=9)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError, match=r"(?i)cannot write weights|too large"):
            save_model(model, tmp_path, max_shard_bytes=shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same(load_model(tmp_path), tiny())


def edit_config(directory: Path, **change: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_missing_directory_config_and_weights(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: expected model\.safetensors"):
        load_model(saved)
    (saved / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"only pickled weights.*convert them to safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"config\.json is not valid JSON"),
        (b"\xff\xfe", r"config\.json is not valid JSON"),
        (b"[1]", r"must hold a JSON object, got list"),
        (b"[" * 100_000, r"config\.json is nested too deep to be read"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", r"config\.json is not valid JSON"),
        (b'{"model_type": ["llama"]}', r"config\.json: .*unknown architecture \['llama'\]"),
        (b'{"model_type": "t5"}', r"config\.json: .*unknown architecture 't5'.*llama.*qwen3"),
    ],
)
def test_bad_config_file(saved: Path, content: bytes, words: str) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_config(saved)
    with pytest.raises(ValueError, match=words):
        load_model(saved)


@pytest.mark.parametrize("depth", range(940, 1010, 3))
def test_a_config_near_the_depth_that_python_reads(saved: Path, depth: int) -> None:
    """Where the file can be read and its value cannot be shown whole."""
    (saved / "config.json").write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ValueError, match=r"config\.json.*(nested too deep|unknown architecture)"):
        read_config(saved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"is not valid JSON"),
        ("[]", r"must hold a JSON object, got list"),
        ("[" * 100_000, r"is nested too deep"),
        ('{"eos_token_id": "x"}', r"eos_token_id must be a token id or a list .*, got 'x'"),
        ('{"eos_token_id": 2.0}', r"eos_token_id must be a token id or a list .*, got 2\.0"),
        ('{"eos_token_id": [3, "x"]}', r"eos_token_id must hold token ids only, got \[3, 'x'\]"),
        (f'{{"eos_token_id": [3, {10**30}]}}', r"eos_token_id must hold token ids only"),
    ],
)
def test_bad_generation_config(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    tokenizer = SimpleNamespace(eos_token_id=3, name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"generation_config\.json:? {words}"):
        Generator(tiny(), tokenizer)


def test_a_generation_config_may_name_one_end_token_or_none(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=3, name_or_path=str(tmp_path))
    for content, ends in [("{}", [3, 4]), ('{"eos_token_id": 7}', [3, 4, 7])]:
        (tmp_path / "generation_config.json").write_text(content)
        assert Generator(tiny(), tokenizer).end_tokens(SamplingParams()) == ends


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 5_000, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors"):
        load_model(saved)


def test_garbage_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\x80\x04pickle" * 100)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_model(saved)


def test_missing_unexpected_misshapen_and_integer_tensors(saved: Path) -> None:
    file = saved / "model.safetensors"
    good = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    cases = [
        ({k: v for k, v in good.items() if k != norm}, rf"1 missing \({norm}\), nothing unexp"),
        ({**good, "score.weight": torch.ones(2)}, r"nothing missing, 1 unexpected \(score"),
        ({**good, norm: torch.ones(31)}, rf"{norm} has shape \[31\], but .* asks for \[32\]"),
        ({**good, norm: torch.ones(32).int()}, r"is torch.int32, not a floating dtype"),
    ]
    for tensors, words in cases:
        save_file(tensors, file)
        with pytest.raises(ValueError, match=words):
            load_model(saved)
    save_file({**good, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    assert same(load_model(saved), tiny())
    edit_config(saved, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"12 missing \(model\.layers\.2\."):
        load_model(saved)


def test_a_tied_head_in_the_file_is_ignored(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(61, 32)}, file)
    assert same(load_model(tmp_path), model)


def test_broken_shards(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    for content, words in [
        ("{", "not valid JSON"),
        ("{}", "has no `weight_map`"),
        (json.dumps({"weight_map": {"a": "../secret.safetensors"}}), r"lacks 1 of the 1 .*secret"),
    ]:
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path)
    index.write_text(good)
    shard = next(tmp_path.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of the \d weight files.*{shard.name}"):
        load_model(tmp_path)


def test_unknown_dtype(saved: Path) -> None:
    with pytest.raises(ValueError, match="one of float32, bfloat16, float16, got 'int8'"):
        load_model(saved, dtype="int8")
