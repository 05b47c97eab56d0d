"""The workloads of `bench_generate.py`: shapes, the least each can take, and its prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from harness import Limits, Work

from rmr1.engine.cache_plan import bytes_per_token
from rmr1.engine.flops import body_size, head_size, pair_flops
from rmr1.engine.model_config import ModelConfig
from rmr1.prompts import load_prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """`prompts` different prompts of `length` tokens, `samples` of each, `new` tokens drawn."""

    prompts: int
    length: int
    samples: int
    new: int

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def name(self) -> str:
        size = f"{self.prompts} x {self.length} tokens x {self.samples} samples"
        return f"{size} x {self.new} new tokens"


# The first two run with all providers, the sweeps with rmr1 and, while it is quick, transformers.
WORKLOADS = {
    "headline": [Shape(4, 512, 8, 128)],
    "group": [Shape(1, 512, 16, 128)],
    "sequences": [Shape(count, 128, 1, 64) for count in (1, 4, 16, 64, 256)],
    "lengths": [Shape(1, length, 8, 64) for length in (128, 512, 1024, 2048, 4096)],
    "samples": [Shape(2, 512, samples, 64) for samples in (1, 2, 4, 8, 16)],
}
WITH_ALL = ("headline", "group")
QUICK = Shape(2, 48, 4, 16)


def shapes_of(chosen: Sequence[str]) -> list[tuple[Shape, bool]]:
    """Names or shapes such as 4x512x8x128 -> each shape, and whether all providers run it."""
    found: dict[Shape, bool] = {}
    for one in chosen:
        if one in WORKLOADS:
            new = dict.fromkeys(WORKLOADS[one], one in WITH_ALL)
        elif re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", one):
            new = {Shape(*map(int, one.split("x"))): True}
        else:
            raise ValueError(
                f"no workload is called {one!r}; choose from {', '.join(WORKLOADS)}, or give"
                " prompts x tokens x samples x new tokens, such as 4x512x8x128"
            )
        found |= {shape: everyone or found.get(shape, False) for shape, everyone in new.items()}
    return list(found.items())


# --- The least a rollout can take ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phases(Work):
    """Prefill and decoding, one after the other."""

    prefill: Work
    decode: Work

    def bound(self, limits: Limits) -> float:
        """The least seconds: in either phase the slower of arithmetic and memory."""
        return self.prefill.bound(limits) + self.decode.bound(limits)


def least(config: ModelConfig, shape: Shape, dtype: torch.dtype, name: str) -> Phases:
    """The operations and bytes of a rollout that shares prompts and runs all sequences at once.

    Operations: 2 for each parameter of the layers' matrices and each token, of the head only where
    a token is drawn from it (once for each prompt, then once for each token but a sequence's last);
    in attention 4 x heads x head size x layers for each token and each token that it sees, itself
    included. Norms, rotations, activations and the draw are left out.

    Prefill computes each prompt once, whatever its samples, and moves all weights once and the
    prompts' keys and values once. Decoding takes new - 1 steps, since the first token comes from
    the prompt. Each reads all weights, the keys and values of every prompt once for all of its
    samples, and those of every sequence's own tokens; and writes those of its new tokens.

    Bytes are of the model in `dtype`: one with 4-bit weights may pass that part.
    """
    body, vocabulary = body_size(config), head_size(config)
    pair = pair_flops(config)  # operations of a token that sees another
    weights = (body + vocabulary) * dtype.itemsize
    stored = bytes_per_token(config, dtype)

    prompt_tokens = shape.prompts * shape.length
    seen = shape.prompts * shape.length * (shape.length + 1) // 2
    prefill = Work(
        f"{name}, prefill",
        2.0 * (body * prompt_tokens + vocabulary * shape.prompts) + pair * seen,
        float(weights + prompt_tokens * stored),
    )
    steps = shape.new - 1
    drawn = shape.sequences * steps
    own = shape.sequences * steps * (steps + 1) // 2  # pairs of a drawn token and another
    decode = Work(
        f"{name}, decoding",
        2.0 * (body + vocabulary) * drawn + pair * (drawn * shape.length + own),
        float(steps * weights + (steps * prompt_tokens + own + drawn) * stored),
    )
    flops, size = prefill.flops + decode.flops, prefill.bytes + decode.bytes
    return Phases(name, flops, size, prefill, decode)


# --- Prompts -------------------------------------------------------------------------------------


def texts(data: Path | None) -> list[str]:
    """What a judge is asked, without its instructions, which would begin every prompt alike."""
    if data is None:
        from rmr1.tasks.catalog import draw_pairs

        pairs = draw_pairs(8000, seed=0, split="train")
    else:
        from rmr1.evals.benchmark_items import Showing
        from rmr1.evals.rm_bench_items import load_rm_bench

        items = list(load_rm_bench(data).items)
        Random(0).shuffle(items)
        pairs = [
            Showing("rm-bench", item, item.contests[4 * style], "A").pair()  # the same style
            for style in range(3)
            for item in items
        ]
    return [load_prompt("rubric").render(pair)[-1]["content"] for pair in pairs]


def prompt_sets(
    found: Iterable[str], tokenizer: Any, shape: Shape, sets: int
) -> list[list[list[int]]]:
    """Sets of prompts of exactly that many tokens, each with some texts of its own.

    Each begins with its number: questions are worded alike, and a provider that keeps what prompts
    have in common would compute less than the rest.
    """
    source: Iterator[str] = iter(found)
    prompts: list[list[int]] = []
    while len(prompts) < sets * shape.prompts:
        prompt: list[int] = tokenizer(f"Task {len(prompts)}\n")["input_ids"]
        while len(prompt) < shape.length:
            text = next(source, None)
            if text is None:
                raise ValueError(
                    f"the texts are too few for {sets} sets of {shape.prompts} prompts of"
                    f" {shape.length} tokens; choose a smaller workload or other --data"
                )
            prompt += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
        prompts.append(prompt[: shape.length])
    return [prompts[i : i + shape.prompts] for i in range(0, len(prompts), shape.prompts)]
