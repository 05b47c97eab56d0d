"""A model small enough to train in a test, runs that start from it, and instruction sets."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmr1 import _C
from rmr1.config import RlvrConfig, SftConfig
from rmr1.data import Pair, write_pairs
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.weights import save_model

# Read when a kernel is defined, which is when its op first runs. With a GPU the kernels run there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SPECIAL = ("<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# One token each, in a vocabulary this small: a random model gives both verdicts now and then.
VERDICTS = ("<answer>[[A]]</answer>", "<answer>[[B]]</answer>")
WORDS = ("Judge", "the", "two", "answers.", "[Question]", "[Answer", "A]", "B]", "[End]", "+", "=",
         *map(str, range(10)))  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": len(SPECIAL) + len(VERDICTS) + len(WORDS),
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": 1,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces, one token each."""
    words = {word: index for index, word in enumerate((*SPECIAL, *VERDICTS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word) for word in VERDICTS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|unk|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has."""
    if not _C.force_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C.force_isa("best")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: 25,000 random weights and a tokenizer of 28 words."""
    directory = tmp_path_factory.mktemp("tiny")
    model = CausalLM(ModelConfig.from_dict(MODEL))
    model.init_weights(torch.Generator().manual_seed(0))
    make_tokenizer().save_pretrained(directory)
    save_model(model, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine sums; traces of three lengths that end in the right verdict. The last pair is long."""
    pairs = []
    for number in range(9):
        left, right = number % 4, (number * 3) % 5
        answers = (str(left + right), str(left + right + 1))
        label: Any = "AB"[number % 2]
        a, b = answers if label == "A" else answers[::-1]
        question = " ".join([str(left), "+"] * (12 if number == 8 else 1) + [str(right)])
        work = f"{left} + {right} = {left + right} " * (1 + number % 3)
        pairs.append(
            Pair(
                id=f"sum-{number}",
                source="tests/sums",
                conversation=({"role": "user", "content": question},),
                answer_a=a,
                answer_b=b,
                label=label,
                kind="reasoning",
                trace=f"{work}{VERDICTS[label == 'B']}",
            )
        )
    path = tmp_path_factory.mktemp("pairs") / "sums.jsonl"
    write_pairs(path, pairs)
    return path


@pytest.fixture
def sft_config(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> Callable[..., SftConfig]:
    """Make a run of 4 steps in 2 epochs: 8 traces (the long prompt is dropped) by 4."""

    def make(**changes: Any) -> SftConfig:
        settings: dict[str, Any] = {
            "runs_dir": str(tmp_path),
            "name": "sft",
            "model": str(tiny_model),
            "prompt_style": "compact",
            "max_prompt_tokens": 24,
            "checkpoint_every": 100,
            "data": {"path": str(tiny_pairs)},
            "batch_size": 4,
            "epochs": 2,
            "optim": {"learning_rate": 1e-2, "warmup_steps": 1, "schedule": "linear"},
        }
        return SftConfig.model_validate({**settings, **changes})

    return make


@pytest.fixture
def rlvr_config(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> Callable[..., RlvrConfig]:
    """Make a run of 4 steps, each with 3 pairs x 4 samples in 2 updates."""

    def make(**changes: Any) -> RlvrConfig:
        settings: dict[str, Any] = {
            "runs_dir": str(tmp_path),
            "name": "rlvr",
            "model": str(tiny_model),
            "prompt_style": "compact",
            "max_prompt_tokens": 24,
            "checkpoint_every": 100,
            "data": {"path": str(tiny_pairs)},
            "steps": 4,
            "rollout": {"prompts": 3, "samples": 4, "max_new_tokens": 8, "kv_memory_gb": 0.1},
            "grpo": {"minibatches": 2},
            "optim": {"learning_rate": 1e-2},
        }
        return RlvrConfig.model_validate({**settings, **changes})

    return make


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start a command as every rank of a job, as a launcher would; what still runs is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], ranks: int, **env: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    **job,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    **env,
                },
            )
            for rank in range(ranks)
        ]
        started.extend(own)
        return own

    yield start
    for process in started:
        process.kill()
        process.communicate()


def outcomes(processes: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of every rank."""
    ended = []
    deadline = time.monotonic() + timeout
    for process in processes:
        out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        ended.append((process.returncode, out, err))
    return ended


@pytest.fixture
def run_ranks(
    start_ranks: Callable[..., list[subprocess.Popen[str]]],
) -> Callable[..., list[tuple[int, str, str]]]:
    """Run a command as every rank of a job and wait for its end."""

    def run(command: list[str], ranks: int, *, timeout: float = 150, **env: str) -> Any:
        return outcomes(start_ranks(command, ranks, **env), timeout)

    return run
