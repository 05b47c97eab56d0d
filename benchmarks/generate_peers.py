"""One provider of rollouts on one workload, in a process and a Python environment of its own.

    PYTHON benchmarks/generate_peers.py '{"provider": "vllm", "model": "DIR", "samples": 8,
        "prompts": "sets.json", "new_tokens": 128, "threads": 2, "device": "cpu",
        "dtype": "float32"}'

`bench_generate.py` calls this script with the interpreter of the provider's environment, so nothing
but the standard library is imported at the top. `prompts` is a JSON file with sets of token id
lists: one set to warm up, then two for every measured run. No set is used twice, or a provider that
keeps prompts from call to call would skip their computation.

Measured alike for all: the time to the first token is that of a call that draws one token for every
sequence, then a call draws all of them; the difference is decoding. Loading and warm-up do not
count. Every sequence is drawn to its full length, whatever token comes. One JSON line on stdout.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from peer_process import Job, answer, peak, reset_peak

# (prompts, tokens to draw for each sequence, seed) -> how many tokens each sequence got
Generate = Callable[[list[list[int]], int, int], list[int]]

WARM_UP = 8  # tokens a sequence


@dataclass(frozen=True)
class Provider:
    """A loaded model. `profile`: the seconds that all calls spent in each part, if it is known."""

    generate: Generate
    version: str
    profile: Callable[[], dict[str, float]] = dict
    stop: Callable[[], object] = lambda: None


def transformers(job: Job) -> Provider:
    """`generate` on a batch in which every prompt stands once for each of its samples."""
    import torch

    model = _transformers_model(job)

    def generate(prompts: list[list[int]], new_tokens: int, seed: int) -> list[int]:
        torch.manual_seed(seed)
        rows = [prompt for prompt in prompts for _ in range(job["samples"])]
        ids = torch.tensor(rows, device=job["device"])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return [len(row) for row in out[:, ids.shape[1] :].tolist()]

    return Provider(generate, metadata.version("transformers"))


def transformers_paged(job: Job) -> Provider:
    """Continuous batching over a paged cache; one manager, as a server would keep it."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _transformers_model(job)
    page = 256  # its default, in tokens
    longest = max(len(prompt) for prompt in _sets(job)[0]) + job["new_tokens"]
    sequences = len(_sets(job)[0]) * job["samples"]
    manager = model.init_continuous_batching(
        GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=job["new_tokens"],
            num_return_sequences=job["samples"],
            eos_token_id=-1,
            pad_token_id=0,
        ),
        # What it would take by itself is a share of all memory, and its mask covers that.
        ContinuousBatchingConfig(num_blocks=sequences * -(-longest // page), page_size=page),
    )
    manager.start()

    def generate(prompts: list[list[int]], new_tokens: int, seed: int) -> list[int]:
        manager.add_requests(prompts, max_new_tokens=new_tokens)
        lengths: list[int] = []
        while len(lengths) < len(prompts) * job["samples"]:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                lengths.append(len(result.generated_tokens))
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped by itself")
        return lengths

    return Provider(generate, metadata.version("transformers"), stop=manager.stop)


def _transformers_model(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, local_files_only=True)
    return model.to(job["device"]).eval()


def vllm(job: Job) -> Provider:
    """vLLM; on a CPU with its threads bound to cores, without which it leaves one idle."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}")
    from vllm import LLM, SamplingParams

    prompts = _sets(job)[0]
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=max(2048, max(map(len, prompts)) + job["new_tokens"]),
        max_num_seqs=max(128, len(prompts) * job["samples"]),
    )

    def generate(prompts: list[list[int]], new_tokens: int, seed: int) -> list[int]:
        # Without a seed: one of its own for every request makes vLLM draw row by row.
        params = SamplingParams(
            n=job["samples"], temperature=1.0, max_tokens=new_tokens, ignore_eos=True
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, params, use_tqdm=False)
        return [len(one.token_ids) for output in outputs for one in output.outputs]

    # The package of the CPU build has a name of its own.
    names = {one.metadata["Name"] for one in metadata.distributions()}
    return Provider(generate, metadata.version("vllm-cpu" if "vllm-cpu" in names else "vllm"))


def llama_cpp(job: Job) -> Provider:
    """llama.cpp by its C functions: one KV cache for all, a prompt decoded once for its samples."""
    import llama_cpp as c

    prompts = _sets(job)[0]
    sequences = len(prompts) * job["samples"]
    c.llama_backend_init()
    model = c.llama_model_load_from_file(job["gguf"].encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx = sum(map(len, prompts)) + sequences * job["new_tokens"]
    params.n_batch = most = max(512, sequences)
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = job["threads"]
    params.kv_unified = True
    context = c.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp made no context of {params.n_ctx} tokens")
    batch = c.llama_batch_init(most, 0, sequences)

    def decode(entries: list[tuple[int, int, range, bool]]) -> None:
        """Each entry: token, position, the sequences it belongs to, whether logits are wanted."""
        batch.n_tokens = len(entries)
        for row, (token, position, owners, wanted) in enumerate(entries):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row] = len(owners)
            for place, owner in enumerate(owners):
                batch.seq_id[row][place] = owner
        if c.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")

    def generate(prompts: list[list[int]], new_tokens: int, seed: int) -> list[int]:
        sampler = c.llama_sampler_init_dist(seed)
        c.llama_memory_clear(c.llama_get_memory(context), True)
        tokens: list[list[int]] = []
        for number, prompt in enumerate(prompts):
            owners = range(number * job["samples"], (number + 1) * job["samples"])
            last = len(prompt) - 1
            entries = [(token, i, owners, i == last) for i, token in enumerate(prompt)]
            for start in range(0, len(entries), most):
                decode(entries[start : start + most])
            tokens += [[c.llama_sampler_sample(sampler, context, -1)] for _ in owners]
        length = len(prompts[0])  # all are as long
        for step in range(new_tokens - 1):
            decode(
                [(row[-1], length + step, range(i, i + 1), True) for i, row in enumerate(tokens)]
            )
            for i, row in enumerate(tokens):
                row.append(c.llama_sampler_sample(sampler, context, i))
        c.llama_sampler_free(sampler)
        return [len(row) for row in tokens]

    return Provider(generate, metadata.version("llama-cpp-python"))


def rmr1(job: Job) -> Provider:
    """This project's generator."""
    import torch

    import rmr1
    from rmr1.models import load_tokenizer

    torch.set_num_threads(job["threads"])
    model = rmr1.load_model(job["model"], dtype=job["dtype"], device=job["device"])
    generator = rmr1.Generator(model, load_tokenizer(Path(job["model"])))

    def generate(prompts: list[list[int]], new_tokens: int, seed: int) -> list[int]:
        params = rmr1.SamplingParams(
            n=job["samples"], max_new_tokens=new_tokens, seed=seed, ignore_eos=True
        )
        groups = generator.generate(prompts, params)
        return [len(rollout.token_ids) for group in groups for rollout in group]

    return Provider(generate, rmr1.__version__, profile=lambda: dict(generator.profile))


# --- Measuring -----------------------------------------------------------------------------------


def load(job: Job) -> Provider:
    """The provider that the job names."""
    match job["provider"]:
        case "transformers":
            return transformers(job)
        case "transformers-paged":
            return transformers_paged(job)
        case "vllm":
            return vllm(job)
        case "llama.cpp":
            return llama_cpp(job)
        case "rmr1":
            return rmr1(job)
    raise ValueError(f"no provider is called {job['provider']!r}")


def measure(job: Job) -> dict[str, Any]:
    """The seconds of every run, and the peak of memory over all of them."""
    provider = load(job)
    warm, *sets = _sets(job)
    new_tokens = job["new_tokens"]
    provider.generate(warm, min(WARM_UP, new_tokens), 0)
    gc.collect()
    reset_peak()
    runs = []
    for seed in range(len(sets) // 2):
        start = time.perf_counter()
        provider.generate(sets[2 * seed], 1, seed)
        first = time.perf_counter() - start
        before = provider.profile()
        start = time.perf_counter()
        lengths = provider.generate(sets[2 * seed + 1], new_tokens, seed)
        total = time.perf_counter() - start
        if set(lengths) != {new_tokens}:
            found = f"{min(lengths)} to {max(lengths)}"
            raise RuntimeError(f"sequences have {found} tokens and not {new_tokens}")
        run = {"first": first, "decode": total - first, "total": total, "tokens": sum(lengths)}
        runs.append(run | {"profile": _since(before, provider.profile())})
    peak_memory = peak(job["device"]) / 2**20
    provider.stop()
    return {"version": provider.version, "runs": runs, "peak_memory_mb": peak_memory}


def _since(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was spent between two profiles. One that is less than before was begun anew."""
    if any(after.get(part, 0.0) < seconds for part, seconds in before.items()):
        return after
    return {part: seconds - before.get(part, 0.0) for part, seconds in after.items()}


def _sets(job: Job) -> list[list[list[int]]]:
    sets: list[list[list[int]]] = json.loads(Path(job["prompts"]).read_text())
    return sets


if __name__ == "__main__":
    answer(measure)
