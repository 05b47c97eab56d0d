"""The generator under thousands of random requests, tiny caches and cancellations.

Every sample must be what greedy decoding without a batch and without a cache gives, and every block
must come back.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rmr1.engine.attention import PackedAttention
from rmr1.engine.generator import Finished, Generator, RolloutStream, SamplingParams
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.kernels.dispatch import use

VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM = 300, 2, 2, 8
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=6,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=256,
    initializer_range=0.3,  # far-apart logits
    bos_token_id=None,
    eos_token_id=None,
)
LONGEST_PROMPT, LONGEST_ANSWER = 40, 24
STOPS = tuple(range(0, VOCABULARY, 23))


class Numbers:
    """A tokenizer whose text is the numbers of the tokens."""

    eos_token_id = None

    def decode(self, token_ids: list[int], **_: object) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(1)
    return CausalLM(ModelConfig.from_dict(CONFIG.to_dict()))


class Requests:
    """Random requests, many of which begin alike; what became of each."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.beginnings = [self.tokens(LONGEST_PROMPT - 8) for _ in range(4)]
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.cancelled = 0
        self.done: dict[tuple[int, int], Finished] = {}

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(count)]

    def add(self, stream: RolloutStream) -> None:
        beginning = self.random.choice([[], *self.beginnings])
        length = self.random.randrange(0, len(beginning) + 1)
        prompt = beginning[:length] + self.tokens(self.random.randint(1, 8))
        params = SamplingParams(
            n=self.random.choice([1, 1, 2, 4]),
            temperature=0,
            max_new_tokens=self.random.randint(1, LONGEST_ANSWER),
            stop_token_ids=STOPS if self.random.random() < 0.7 else (),
        )
        assert stream.add(prompt, params) == len(self.prompts)
        self.prompts.append(prompt)
        self.params.append(params)

    def take(self, one: Finished) -> None:
        assert (one.prompt, one.sample) not in self.done
        self.done[one.prompt, one.sample] = one

    def cancel(self, stream: RolloutStream) -> None:
        prompt = self.random.randrange(len(self.prompts))
        before = stream.unfinished
        stream.cancel(prompt, self.random.choice([None, *range(self.params[prompt].n)]))
        self.cancelled += before - stream.unfinished


def run(generator: Generator, seed: int, count: int) -> Requests:
    requests, stream = Requests(seed), generator.stream()
    for _ in range(12):
        requests.add(stream)
    while stream.unfinished or len(requests.prompts) < count:
        for _ in range(requests.random.randrange(4)):
            if len(requests.prompts) < count:
                requests.add(stream)
        if requests.random.random() < 0.1:
            requests.cancel(stream)
        if (one := next(stream, None)) is not None:
            requests.take(one)
    for one in stream:  # the last step may have finished several
        requests.take(one)
    return requests


def assert_greedy(model: CausalLM, requests: Requests) -> None:
    """Each token is the likeliest after what stands before it, by a plain forward pass."""
    for (prompt, _), one in requests.done.items():
        params, drawn = requests.params[prompt], one.rollout.token_ids
        tokens = torch.tensor(requests.prompts[prompt] + drawn)
        hidden = model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))
        logits = (hidden @ model.lm_head_weight.T)[len(requests.prompts[prompt]) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(drawn)[:, None]).squeeze(1)
        assert (logits.amax(-1) - chosen).max() < 1e-4
        logprobs = chosen - logits.logsumexp(-1)
        assert (logprobs - torch.tensor(one.rollout.logprobs)).abs().max() < 1e-4
        # It ended where it should, and not before.
        ends = [token in params.stop_token_ids for token in drawn]
        assert not any(ends[:-1])
        assert ends[-1] or len(drawn) == params.max_new_tokens
        assert one.rollout.finish_reason == ("stop" if ends[-1] else "length")


def assert_everything_came_back(generator: Generator, requests: Requests) -> None:
    samples = {(p, s) for p, params in enumerate(requests.params) for s in range(params.n)}
    assert set(requests.done) <= samples
    assert len(requests.done) == len(samples) - requests.cancelled
    generation = generator._generation
    assert generation is not None
    pool, rows = generation.pool, generation.rows
    assert pool.free == pool.count
    assert not pool.users.any()
    assert rows.free == rows.capacity
    assert not generation.scheduler.unfinished
    assert not generator._streams


def smallest_gb(block_size: int, extra: int = 0) -> float:
    """A cache that just holds the longest sequence."""
    blocks = -(-(LONGEST_PROMPT + LONGEST_ANSWER - 1) // block_size) + extra
    token_bytes = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    return (blocks * block_size * token_bytes + 1) / 1e9


CACHES: list[dict[str, Any]] = [
    {"block_size": 4, "kv_memory_gb": smallest_gb(4)},
    {"block_size": 1, "kv_memory_gb": smallest_gb(1, extra=30), "max_batch_tokens": 7},
    {"block_size": 3, "kv_memory_gb": smallest_gb(3, extra=5), "max_batch_tokens": 64},
    {"block_size": 16, "kv_memory_gb": smallest_gb(16, extra=3)},
    {},
]


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_random_requests(model: CausalLM, options: dict[str, Any]) -> None:
    generator = Generator(model, Numbers(), **options)
    with torch.no_grad():
        requests = run(generator, seed=3, count=250)
        assert_everything_came_back(generator, requests)
        assert len(requests.done) > 300
        assert_greedy(model, requests)
    assert generator._generation is not None
    assert generator._generation.scheduler.preemptions > 20 or not options
    assert requests.cancelled > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_thousands_of_random_requests(model: CausalLM, seed: int) -> None:
    generator = Generator(model, Numbers(), **CACHES[seed % len(CACHES)])
    with torch.no_grad():
        requests = run(generator, seed=100 + seed, count=2000)
        assert_everything_came_back(generator, requests)
        assert_greedy(model, requests)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_random_requests_through_the_models_own_forward(model: CausalLM, backend: Any) -> None:
    """The path of GPUs: kernels in plain torch, and the native ones called op by op."""
    other = CausalLM(model.config)
    other.load_state_dict(model.state_dict())
    if backend == "torch":
        other.forward = other.forward  # type: ignore[method-assign]
    generator = Generator(other, Numbers(), **CACHES[0])
    with torch.no_grad(), use("reference") if backend == "reference" else nullcontext():
        requests = run(generator, seed=8, count=60)
        assert generator._generation is not None
        assert not generator._generation.native
        assert_everything_came_back(generator, requests)
        assert_greedy(model, requests)


def test_a_draw_is_the_same_to_the_last_bit_in_any_batch(model: CausalLM) -> None:
    """On a CPU: alone, with others, in pieces, after being put back, on one thread or two.

    Only the block size has a say: it groups the keys that are summed.
    """
    requests = Requests(5)
    prompts = [requests.beginnings[i % 4] + requests.tokens(5) for i in range(12)]
    params = SamplingParams(n=3, max_new_tokens=LONGEST_ANSWER, seed=4)
    together = Generator(model, Numbers()).generate(prompts, params)
    small = {"kv_memory_gb": smallest_gb(16, extra=2)}
    for options in ({}, small, {"max_batch_tokens": 5}, {**small, "max_batch_tokens": 7}):
        generator = Generator(model, Numbers(), **options)
        assert generator.generate(prompts, params) == together, options
        assert generator._generation is not None
        assert (generator._generation.scheduler.preemptions > 0) == ("kv_memory_gb" in options)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        alone = Generator(model, Numbers()).generate(prompts[:1], params)
    finally:
        torch.set_num_threads(threads)
    assert alone == together[:1]
