"""The rollout generator: many prompts, n samples each, in one continuously refilled batch.

Prompts are computed in packed batches, once each, whatever n is; then every running sample gets one
token per step. A sample that ends leaves its slot at once and a waiting one takes it, so finished
sequences cost nothing. What a sample draws does not depend on any of this (see `sampling`).

The weights are the module's own parameters: whatever the trainer has written is used next.

Legend: B running samples (rows), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmr1.engine.cache_plan import bytes_per_token, default_budget, plan_cache
from rmr1.engine.config_json import end_token_ids, read_json
from rmr1.engine.detokenize import StopStrings, decode
from rmr1.engine.kv_cache import DecodeLayout, SharedPromptCache
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.sampling import Rows, SamplingParams

__all__ = ["Generator", "Rollout", "SamplingParams"]

# Waiting samples start when this share of the slots is free: a prompt alone is a slow batch.
_REFILL_SHARE = 4


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sample.

    `token_ids` includes the stop token that ended it, `text` does not, nor a stop string and what
    follows it. `logprobs` are natural logarithms under the full distribution at `temperature`.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]


class Generator:
    """Samples continuations from a `CausalLM`.

    `kv_memory_gb` bounds the KV cache (default: a share of the memory free at each call),
    `block_size` is the granularity of its slots in tokens, and `max_batch_tokens` bounds the tokens
    of one forward pass (a longer prompt passes alone). None of them changes what is drawn.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        *,
        kv_memory_gb: float | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 8192,
    ) -> None:
        if kv_memory_gb is not None and not kv_memory_gb > 0:
            raise ValueError(f"kv_memory_gb must be above 0, got {kv_memory_gb!r}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size!r}")
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.kv_memory_gb = kv_memory_gb
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self._end_tokens = _end_tokens(model, tokenizer)
        self._stop_strings: dict[tuple[str, ...], StopStrings] = {}

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Continue every prompt `params.n` times: `[prompt][sample]`.

        `progress` is called after each step with the sequences that finished and the tokens that
        were drawn since the last call.

        Raises:
            ValueError: an empty prompt, a token id outside the vocabulary, a prompt that with
                `max_new_tokens` is longer than the model's positions or than the KV memory.
        """
        _check_prompts(prompts, params, self.model.config)
        if not prompts:
            return []
        with _evaluating(self.model), torch.inference_mode():
            run = _Run(self, prompts, params)
            while run.unfinished:
                finished, drawn = run.step()
                if progress is not None:
                    progress(finished, drawn)
        return run.results()

    def end_tokens(self, params: SamplingParams) -> list[int]:
        """Every token that ends a sample."""
        return sorted(self._end_tokens.union(params.stop_token_ids))

    def stop_strings(self, stop: tuple[str, ...]) -> StopStrings | None:
        """The matcher of these stop strings, built once."""
        if stop and stop not in self._stop_strings:
            vocabulary = self.model.config.vocab_size
            self._stop_strings[stop] = StopStrings(self.tokenizer, stop, vocabulary)
        return self._stop_strings.get(stop)

    def make_cache(self, prompts: list[list[int]], params: SamplingParams) -> SharedPromptCache:
        """Plan and allocate the cache of one call."""
        weight = self.model.lm_head_weight
        budget = self.kv_memory_gb
        plan = plan_cache(
            budget=default_budget(weight.device) if budget is None else int(budget * 1e9),
            token_bytes=bytes_per_token(self.model.config, weight.dtype),
            block_size=self.block_size,
            prompts=len(prompts),
            samples=params.n,
            longest_prompt=max(map(len, prompts)),
            max_new_tokens=params.max_new_tokens,
            max_rows=self.max_batch_tokens,
        )
        return SharedPromptCache(self.model.config, plan, self.block_size, weight)


class _Run:
    """One call of `generate`: the queue, the rows that run and the results."""

    def __init__(
        self, generator: Generator, prompts: list[list[int]], params: SamplingParams
    ) -> None:
        self._generator, self._model = generator, generator.model
        self._prompts, self._params = prompts, params
        self._cache = generator.make_cache(prompts, params)
        self._stops = generator.stop_strings(params.stop)
        self._device = self._model.lm_head_weight.device
        self._end = torch.tensor(generator.end_tokens(params), device=self._device)
        # Longest first: neighbours in the cache then have similar lengths.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        self._waiting = deque(order)  # prompts without a slot
        self._ready: deque[tuple[int, int]] = deque()  # (prompt, sample) with a prompt slot, no row
        self._slot_prompts: list[int] = []  # which prompt is in each prompt slot
        self._slot_hidden = self._model.lm_head_weight.new_empty(0)  # [P, H] at its last token
        self._rows: list[tuple[int, int]] = []  # which (prompt, sample) is in each row
        self._state = Rows(self._cache.plan.tail_slots, params, self._device)
        self._layout: DecodeLayout | None = None
        self._done: dict[tuple[int, int], Rollout] = {}

    @property
    def unfinished(self) -> bool:
        """Whether any sample still waits or runs."""
        return bool(self._waiting or self._ready or self._rows)

    def results(self) -> list[list[Rollout]]:
        """`[prompt][sample]`."""
        return [
            [self._done[prompt, number] for number in range(self._params.n)]
            for prompt in range(len(self._prompts))
        ]

    def step(self) -> tuple[int, int]:
        """Let waiting samples in, then draw a token for each row: sequences finished, tokens."""
        if self._may_enter():
            first = len(self._rows)
            self._enter()
            slots = torch.tensor(self._row_slots()[first:], device=self._device)
            drawn = len(self._rows) - first
            return self._draw(first, self._slot_hidden[slots]), drawn
        if self._layout is None:
            self._layout = self._cache.layout(self._row_slots())
        drawn, positions = len(self._rows), self._layout.positions
        hidden = self._model(self._state.last[:drawn], positions, self._cache.decode(self._layout))
        return self._draw(0, hidden), drawn

    def _may_enter(self) -> bool:
        plan, running = self._cache.plan, len(self._rows)
        free = plan.tail_slots - running
        has_prompt = bool(self._ready) or (
            bool(self._waiting) and len(self._slot_prompts) < plan.prompt_slots
        )
        return has_prompt and (running == 0 or free * _REFILL_SHARE >= plan.tail_slots)

    def _enter(self) -> None:
        """Fill the free rows, computing prompts as they are needed."""
        plan, rows = self._cache.plan, self._rows
        first = len(rows)
        while len(rows) < plan.tail_slots:
            if not self._ready:
                room = plan.prompt_slots - len(self._slot_prompts)
                wanted = -(-(plan.tail_slots - len(rows)) // self._params.n)
                batch = self._next_prompts(min(room, wanted))
                if not batch:
                    break
                self._prefill(batch)
            rows.append(self._ready.popleft())
        self._cache.add_tails(len(rows) - first)
        self._state.start(first, rows[first:])
        self._layout = None

    def _next_prompts(self, most: int) -> list[int]:
        batch: list[int] = []
        tokens = 0
        while self._waiting and len(batch) < most:
            tokens += len(self._prompts[self._waiting[0]])
            if batch and tokens > self._generator.max_batch_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _prefill(self, batch: list[int]) -> None:
        """Compute prompts into new slots and make their samples ready."""
        lengths = [len(self._prompts[index]) for index in batch]
        packed = [token for index in batch for token in self._prompts[index]]
        token_ids = torch.tensor(packed, device=self._device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        hidden = self._model(token_ids, positions, self._cache.prefill(lengths))
        ends = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        self._slot_hidden = torch.cat([self._slot_hidden.view(-1, hidden.shape[-1]), hidden[ends]])
        self._slot_prompts.extend(batch)
        self._ready.extend((index, number) for index in batch for number in range(self._params.n))

    def _row_slots(self) -> list[int]:
        slots = {prompt: slot for slot, prompt in enumerate(self._slot_prompts)}
        return [slots[prompt] for prompt, _ in self._rows]

    def _draw(self, first: int, hidden: Tensor) -> int:
        """Draw a token for the rows from `first` on; returns how many of them are done and left."""
        rows = slice(first, len(self._rows))
        tokens = self._state.draw(rows, hidden, self._model.lm_head_weight)
        ended = (tokens[:, None] == self._end).any(-1)
        full = self._state.count[rows] >= self._params.max_new_tokens
        done = {first + row for row in (ended | full).nonzero().squeeze(1).tolist()}
        by_token = {first + row for row in ended.nonzero().squeeze(1).tolist()} if done else set()
        if self._stops is not None:
            done |= self._with_stop_string(first, tokens, by_token)
        for row in done:
            self._done[self._rows[row]] = self._rollout(row, row in by_token)
        if done:
            self._leave(done)
        return len(done)

    def _with_stop_string(self, first: int, tokens: Tensor, ended: set[int]) -> set[int]:
        assert self._stops is not None
        candidates = [first + row for row in self._stops.may_end(tokens)]
        return {
            row
            for row in candidates
            if row not in ended and self._stops.find(self._state.token_ids(row)) is not None
        }

    def _rollout(self, row: int, ended: bool) -> Rollout:
        """The sample of a row that is done; `ended` says by a stop token."""
        token_ids, logprobs = self._state.token_ids(row), self._state.row_logprobs(row)
        text = decode(self._generator.tokenizer, token_ids[:-1] if ended else token_ids)
        cut = None if self._stops is None else self._stops.find_in(text)
        stopped = ended or cut is not None
        return Rollout(token_ids, logprobs, text[:cut], "stop" if stopped else "length")

    def _leave(self, done: set[int]) -> None:
        """Free the slots of rows that are done, and of prompts that no sample needs any more."""
        keep = [row for row in range(len(self._rows)) if row not in done]
        moves = self._cache.keep_tails(keep)
        self._state.move(moves)
        _rearrange(self._rows, moves, len(keep))
        needed = {prompt for prompt, _ in self._rows} | {prompt for prompt, _ in self._ready}
        keep = [slot for slot, prompt in enumerate(self._slot_prompts) if prompt in needed]
        moves = self._cache.keep_prompts(keep)
        if moves:
            self._slot_hidden[list(moves.values())] = self._slot_hidden[list(moves)]
        self._slot_hidden = self._slot_hidden[: len(keep)]
        _rearrange(self._slot_prompts, moves, len(keep))
        self._layout = None


def _rearrange(items: list[Any], moves: dict[int, int], count: int) -> None:
    for old, new in moves.items():
        items[new] = items[old]
    del items[count:]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _end_tokens(model: CausalLM, tokenizer: Any) -> set[int]:
    """The tokens with which the model ends a turn, by its tokenizer, config and generation config.

    They often differ: an instruct model's tokenizer names the end of a turn, its config the end of
    a text, and only generation_config.json both.
    """
    sources = [tokenizer.eos_token_id, model.config.eos_token_id]
    path = Path(str(getattr(tokenizer, "name_or_path", ""))) / "generation_config.json"
    if path.is_file():
        raw = read_json(path)
        try:
            sources.append(end_token_ids(raw))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    ends: set[int] = set()
    for source in sources:
        if source is not None:
            ends.update([source] if isinstance(source, int) else source)
    return ends


def _check_prompts(prompts: list[list[int]], params: SamplingParams, config: ModelConfig) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{index}] is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise ValueError(
                f"prompts[{index}] holds the token id {wrong}, and the model's vocabulary has "
                f"{config.vocab_size} words; encode it with the model's own tokenizer"
            )
        if len(prompt) + params.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens, which with max_new_tokens="
                f"{params.max_new_tokens} is more than the model's "
                f"{config.max_position_embeddings} positions; shorten it or lower max_new_tokens"
            )
