"""Hugging Face model directories: config.json and safetensors in, the same out. Never pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmr1.engine.config_json import read_json
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.tensor_files import SHARD_BYTES, write_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What a tokenizer and generation need beside the weights, copied from `extra_files_from`.
EXTRA_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def load_model(
    path: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> CausalLM:
    """Read a Hugging Face directory of a Llama, Qwen2 or Qwen3 model.

    Args:
        path: a directory with config.json and model.safetensors, or its shards with their index.
        dtype: "float32", "bfloat16" or "float16"; each tensor is converted as it is read.
        device: where the parameters live.

    Raises:
        ValueError: one sentence on what is missing, unknown, misshapen or corrupt.
    """
    directory = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    config = read_config(directory)
    with torch.device("meta"):  # names and shapes only: the weights are assigned, never copied
        model = CausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in _weight_files(directory):
        found = _read_file(file, expected, DTYPES[dtype], torch.device(device))
        unexpected += [name for name in found if name not in expected]
        state.update({name: tensor for name, tensor in found.items() if tensor is not None})
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in unexpected if not _harmless(name, config)]
    if missing or unexpected:
        raise ValueError(
            f"the weights in {directory} do not fit its config.json: "
            f"{_listed('missing', missing)}, {_listed('unexpected', unexpected)}."
        )
    model.load_state_dict(state, assign=True)
    return model


def read_config(directory: str | Path) -> ModelConfig:
    """Read `directory`/config.json. ValueError if there is none or it is not understood."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"model directory {directory} does not exist.")
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json.")
    raw = read_json(file)
    try:
        return ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    """Find the safetensors files, and say what is wrong when there are none."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
            raise ValueError(
                f"{directory} holds only pickled weights, which are never read because loading "
                f"them can run code; convert them to safetensors first."
            )
        raise ValueError(
            f"{directory} has no weights: expected {SINGLE_FILE} or {INDEX_FILE} with its shards."
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} is not a shard index: it has no `weight_map`.")
    names = sorted({str(name) for name in places.values()})
    absent = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    if absent:
        raise ValueError(
            f"{directory} lacks {len(absent)} of the {len(names)} weight files that {INDEX_FILE} "
            f"names: {', '.join(absent[:4])}."
        )
    return [directory / name for name in names]


def _read_file(
    file: Path, expected: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor | None]:
    """Read the expected tensors of one file; others are listed without a value."""
    found: dict[str, Tensor | None] = {}
    try:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - the reader is no dict
                if name not in expected:
                    found[name] = None
                    continue
                shape = tuple(reader.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise ValueError(
                        f"{file}: tensor {name} has shape {list(shape)}, but config.json asks for "
                        f"{list(expected[name])}."
                    )
                tensor = reader.get_tensor(name)
                if not tensor.is_floating_point():
                    raise ValueError(
                        f"{file}: tensor {name} is {tensor.dtype}, not a floating dtype; "
                        f"quantized weights are not read."
                    )
                # A copy of its own: what was read may be a window on the file.
                found[name] = tensor.to(device, dtype, copy=True)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}); get it again."
        ) from error
    return found


def _harmless(name: str, config: ModelConfig) -> bool:
    """Say whether a tensor nobody needs may be there: a tied head, or old cached frequencies."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return f"nothing {what}"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {what} ({shown})"


def save_model(
    model: CausalLM,
    directory: str | Path,
    *,
    extra_files_from: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a directory that `load_model`, transformers and vLLM read; see `save_weights`."""
    save_weights(
        model.state_dict().items(),
        model.config,
        directory,
        extra_files_from=extra_files_from,
        max_shard_bytes=max_shard_bytes,
    )


def save_weights(
    named: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    directory: str | Path,
    *,
    extra_files_from: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a directory that `load_model`, transformers and vLLM read.

    All files are written aside, flushed to the disk and only then renamed, so that a failure while
    writing leaves what stood there before.

    Args:
        named: the parameters, which are written in their dtype; one file's worth is held at a time.
        config: of their model.
        directory: made if it does not exist; an older model in it is replaced.
        extra_files_from: a model directory whose tokenizer files are copied along.
        max_shard_bytes: weights above this are split into several files with an index.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: `extra_files_from` is no directory.
    """
    directory = Path(directory)
    if extra_files_from is not None and not Path(extra_files_from).is_dir():
        raise ValueError(f"extra_files_from: {extra_files_from} is no directory.")
    directory.mkdir(parents=True, exist_ok=True)
    files, dtypes = _Aside(directory), list[torch.dtype]()

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            dtypes.append(tensor.dtype)
            yield name, tensor

    try:
        written = write_tensors(noted(), lambda n: files.path(_shard(n)), max_bytes=max_shard_bytes)
        shards = {_shard(n, len(written)): names for n, names in enumerate(written)}
        for number, name in enumerate(shards):  # how many there are is known only now
            files.rename(_shard(number), name)
        if len(shards) > 1:
            files.path(INDEX_FILE).write_text(_index(shards), encoding="utf-8")
        dtype = str(dtypes[0]).removeprefix("torch.")
        about = {**config.to_dict(), "torch_dtype": dtype}
        files.path("config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for name in EXTRA_FILES if extra_files_from is not None else ():
            source = Path(str(extra_files_from)) / name
            if source.is_file():
                shutil.copyfile(source, files.path(name))
        files.put_in_place()
    finally:
        files.discard()
    kept = {*shards, INDEX_FILE} if len(shards) > 1 else set(shards)
    for old in (*directory.glob("model*.safetensors"), directory / INDEX_FILE):
        if old.name not in kept:  # of an older model: a reader would take it for this one's
            old.unlink(missing_ok=True)


def _shard(number: int, count: int = 0) -> str:
    """The name of file `number` of `count`; of 0, while nobody knows how many there will be."""
    if count == 1:
        return SINGLE_FILE
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(shards: dict[str, dict[str, int]]) -> str:
    total = sum(sum(sizes.values()) for sizes in shards.values())
    places = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"


class _Aside:
    """Files written beside their final names, then renamed together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []

    def path(self, name: str) -> Path:
        """Return where to write the file that will be called `name`."""
        if name not in self.names:
            self.names.append(name)
        return self.directory / f".{name}.{os.getpid()}.partial"

    def rename(self, old: str, new: str) -> None:
        """Let what was written for one name be called another."""
        if old != new:
            self.path(old).rename(self.path(new))
            self.names.remove(old)

    def put_in_place(self) -> None:
        """Flush all files to the disk, then give them their names."""
        for name in self.names:
            # safetensors makes its files readable by their owner alone; a model is no secret.
            shutil.copymode(self.path("config.json"), self.path(name))
            with self.path(name).open("rb") as file:
                os.fsync(file.fileno())
        for name in self.names:
            self.path(name).replace(self.directory / name)
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)  # the new names, too
        finally:
            os.close(handle)

    def discard(self) -> None:
        """Remove what was not put in place."""
        for name in self.names:
            self.path(name).unlink(missing_ok=True)
