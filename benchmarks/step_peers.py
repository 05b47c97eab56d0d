"""One GRPO step of a provider, in a process and a Python environment of its own.

    PYTHON benchmarks/step_peers.py '{"provider": "trl", "model": "DIR", "prompts": "prompts.json",
        "samples": 8, "new_tokens": 128, "beta": 1e-3, "micro_batch": 4, "threads": 2,
        "device": "cpu", "dtype": "float32"}'

`bench_step.py` calls this script. `prompts` is a JSON list of {"text", "token_ids"}, texts that the
model's tokenizer turns into exactly these tokens. Alike for all: the samples are drawn at
temperature 1 to their full length, the rewards are +1 and -1 in turn, one update is made of the
step, AdamW at 1e-6. Loading does not count, nor anything before the step; memory does. One JSON
line on stdout.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from peer_process import Job, answer, peak, reset_peak


def trl(job: Job) -> dict[str, Any]:
    """TRL's GRPOTrainer, as BENCHMARKS.md ran it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job["threads"])
    prompts = json.loads(Path(job["prompts"]).read_text())
    cpu = job["device"] == "cpu"
    sequences = len(prompts) * job["samples"]
    config = GRPOConfig(
        output_dir=job["folder"],
        use_cpu=cpu,
        bf16=job["dtype"] == "bfloat16",
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=sequences // job["micro_batch"],
        num_generations=job["samples"],
        max_completion_length=job["new_tokens"],
        beta=job["beta"],
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": job["new_tokens"]},
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    model = AutoModelForCausalLM.from_pretrained(job["model"], local_files_only=True)
    seen: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(len(ids) for ids in completion_ids)
        return [1.0 if i % 2 else -1.0 for i in range(len(completions))]

    trainer = GRPOTrainer(
        model,
        reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": one["text"]} for one in prompts]),
        processing_class=AutoTokenizer.from_pretrained(job["model"], local_files_only=True),
    )
    times: dict[str, float] = {}

    class Watch(TrainerCallback):
        """From the moment before the first sample to that after the optimiser's step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times["began"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["ended"] = time.perf_counter()

    spent: defaultdict[str, float] = defaultdict(float)
    for name in ("_generate", "_generate_and_score_completions"):
        setattr(trainer, name, _timed(getattr(trainer, name), spent, name))
    trainer.add_callback(Watch())
    reset_peak()
    trainer.train()
    if set(seen) != {job["new_tokens"]} or len(seen) != sequences:
        raise RuntimeError(f"TRL's samples have {sorted(set(seen))} tokens, {len(seen)} of them")
    whole = times["ended"] - times["began"]
    scored = spent["_generate_and_score_completions"]
    phases = {
        "rollout": spent["_generate"],
        "reward and reference": scored - spent["_generate"],
        "update": whole - scored,
    }
    return {"seconds": whole, "phases": phases, "version": metadata.version("trl")}


def rmr1(job: Job) -> dict[str, Any]:
    """This project's step."""
    from dataclasses import replace

    import torch

    from rmr1 import __version__, load_model
    from rmr1.engine.optim_config import OptimConfig
    from rmr1.engine.reference import Reference
    from rmr1.engine.trainer import Trainer
    from rmr1.group_sampling import Task
    from rmr1.grpo import Grpo
    from rmr1.grpo_config import GrpoConfig, RolloutConfig
    from rmr1.models import load_tokenizer

    torch.set_num_threads(job["threads"])
    prompts = json.loads(Path(job["prompts"]).read_text())
    device = torch.device(job["device"])

    def load(device: torch.device) -> Any:
        return load_model(job["model"], dtype=job["dtype"], device=device)

    trainer = Trainer(
        load(device),
        OptimConfig(learning_rate=1e-6),
        total_updates=1,
        max_micro_tokens=job["max_micro_tokens"],
    )
    beta = job["beta"]
    grpo = Grpo(
        trainer,
        load_tokenizer(Path(job["model"])),
        # On the disk between its uses: loading it anew is part of the time.
        reference=Reference(load, device, offload=True) if beta else None,
        rollout=RolloutConfig(
            prompts=len(prompts), samples=job["samples"], max_new_tokens=job["new_tokens"]
        ),
        grpo=GrpoConfig(beta=beta, minibatches=1),
    )
    grpo.sampling = replace(grpo.sampling, ignore_eos=True)
    tasks = iter([Task(one["token_ids"], None) for one in prompts])

    def reward(_: Any, rollouts: Any) -> Any:
        return {"right": torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(rollouts))])}

    reset_peak()
    began = time.perf_counter()
    done = grpo.step(tasks, reward, seed=0)
    whole = time.perf_counter() - began
    lengths = {len(tokens) for tokens in done.drawn.samples.token_ids}
    if lengths != {job["new_tokens"]} or not done.updates[0].grad_norm > 0:
        raise RuntimeError(f"samples have {lengths} tokens, gradient {done.updates[0].grad_norm}")
    return {"seconds": whole, "phases": done.seconds, "version": __version__}


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            spent[name] += time.perf_counter() - began

    return timed


def measure(job: Job) -> dict[str, Any]:
    """Seconds of the step, by phase too, and the peak of memory in it."""
    result = {"trl": trl, "rmr1": rmr1}[job["provider"]](job)
    return result | {"peak_memory_mb": peak(job["device"]) / 2**20}


if __name__ == "__main__":
    answer(measure)
