"""The rollout generator: many prompts, n samples each, in one continuously refilled batch.

What runs in a step is decided in `scheduler.py`, computed in `generation.py`, and kept in a paged
KV cache that lives as long as the generator: what prompts have in common is computed once, in a
call and over calls, until the weights change. What a sample draws does not depend on any of this.

The weights are the module's own parameters: whatever the trainer has written is used next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from rmr1.engine.cache_plan import (
    CachePlan,
    blocks_for,
    bytes_per_token,
    check_fits,
    default_budget,
    plan_cache,
)
from rmr1.engine.config_json import end_token_ids, read_json
from rmr1.engine.detokenize import StopStrings
from rmr1.engine.generation import ENDS, MAY_END, Generation, Rollout
from rmr1.engine.model import CausalLM
from rmr1.engine.rollout_stream import Finished, Piece, RolloutStream
from rmr1.engine.sampling import SamplingParams
from rmr1.engine.sequences import Request, Sequence, new_sequences
from rmr1.engine.weights_version import WeightsVersion, copy_weights

__all__ = ["Finished", "Generator", "Piece", "Rollout", "RolloutStream", "SamplingParams"]

_log = logging.getLogger(__name__)

# The most sequences that run at once; a GPU needs more of them to be busy.
_MAX_ROWS = {"cpu": 256, "cuda": 1024}
# On a CPU a larger step computes nothing faster, and keeps the first token of others waiting.
_MAX_CPU_TOKENS = 1024


class Generator:
    """Samples continuations from a `CausalLM`.

    `kv_memory_gb` is the size of the KV cache in GB (default: what the calls need, up to a share of
    the memory that is free when it is planned), `block_size` the tokens of one of its blocks, and
    `max_batch_tokens` bounds the tokens of one forward pass. None of them changes what is drawn,
    but for rounding.
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
        self._flags: dict[tuple[Any, ...], np.ndarray] = {}
        self._version = WeightsVersion(model)
        self._generation: Generation | None = None
        self._streams: dict[Sequence, RolloutStream] = {}
        self._numbers = count()

    # --- What users call -------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Continue every prompt `params.n` times: `[prompt][sample]`.

        `params` may be a list with one entry a prompt. `progress` is called after each step with
        the sequences that finished and the tokens that were drawn since the last call.

        Raises:
            ValueError: an empty prompt, a token id outside the vocabulary, a prompt that with
                `max_new_tokens` is longer than the model's positions or than the KV cache, logits
                that are not finite.
        """
        stream = self.stream(prompts, params)
        done: dict[tuple[int, int], Rollout] = {}
        try:
            while stream.unfinished:
                before = len(done)
                drawn = self._step()
                while stream._done:
                    one = stream._done.popleft()
                    done[one.prompt, one.sample] = one.rollout
                if progress is not None:
                    progress(len(done) - before, drawn)
        finally:
            stream.close()
        settings = _one_each(params, len(prompts))
        return [
            [done[prompt, sample] for sample in range(settings[prompt].n)]
            for prompt in range(len(prompts))
        ]

    def stream(
        self,
        prompts: list[list[int]] | None = None,
        params: SamplingParams | list[SamplingParams] | None = None,
    ) -> RolloutStream:
        """An iterator over samples as they finish; more requests may be added to it later.

        Raises:
            ValueError: as `generate`, before anything is computed.
        """
        prompts = prompts or []
        settings = _one_each(params, len(prompts))
        for index, (prompt, each) in enumerate(zip(prompts, settings, strict=True)):
            self._check(prompt, each, f"prompts[{index}]")
        self._prepare([(len(p), s) for p, s in zip(prompts, settings, strict=True)])
        stream = RolloutStream(self)
        for prompt, each in zip(prompts, settings, strict=True):
            stream.add(prompt, each)
        return stream

    def sync(
        self, source: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
    ) -> int:
        """Take over a trainer's new weights; returns their version, which later rollouts bear.

        From the generator's own model nothing is copied. From another module, a state dict, or
        pairs of name and whole tensor that are made one at a time (of a sharded model), each tensor
        is copied and the copy verified. Whatever was cached is dropped. Samples that are running
        begin anew, so that each is of one version.

        Raises:
            ValueError: see `copy_weights`.
        """
        if source is not self.model:
            tensors = source.state_dict() if isinstance(source, nn.Module) else source
            copy_weights(self.model, tensors)
        self._version.bump()
        self._forget()
        return self._version.number

    @property
    def plan(self) -> CachePlan | None:
        """The KV cache as planned; None before the first call."""
        return None if self._generation is None else self._generation.plan

    @property
    def weights_version(self) -> int:
        """How many changes of the weights have been noticed."""
        return self._version.number

    @property
    def profile(self) -> dict[str, float]:
        """Seconds spent in the steps of all calls, by part."""
        return {} if self._generation is None else self._generation.profile()

    def end_tokens(self, params: SamplingParams) -> list[int]:
        """Every token that ends a sample."""
        own = set() if params.ignore_eos else self._end_tokens
        return sorted(own.union(params.stop_token_ids))

    # --- What streams call -----------------------------------------------------------------------

    def _enqueue(
        self, stream: RolloutStream, prompt: list[int], params: SamplingParams, number: int
    ) -> list[Sequence]:
        self._check(prompt, params, f"prompts[{number}]")
        generation = self._prepare([(len(prompt), params)])
        request = Request(
            np.array(prompt, dtype=np.int64),
            params,
            number,
            self._flags_of(params),
            self._stops_of(params.stop),
        )
        request.hash_blocks(self.block_size)
        sequences = new_sequences(request, self._numbers)
        generation.scheduler.add(sequences)
        self._streams.update(dict.fromkeys(sequences, stream))
        return sequences

    def _cancel(self, sequence: Sequence) -> None:
        if self._streams.pop(sequence, None) is not None:
            assert self._generation is not None
            self._generation.scheduler.cancel(sequence)

    def _drawn(self, sequence: Sequence) -> list[int]:
        assert self._generation is not None
        if sequence.row < 0:
            return sequence.tokens.tolist()
        return self._generation.rows.drawn(sequence.row).tolist()

    def _step(self) -> int:
        """One step for everybody; returns the tokens drawn."""
        generation = self._generation
        assert generation is not None
        try:
            if self._version.touched():
                self._forget()
            finished, drawn = generation.step(self._version.number)
        except BaseException:  # Ctrl-C too: half a step leaves nothing that could be trusted
            generation.clear()
            for stream in set(self._streams.values()):
                stream._abort()
            self._streams.clear()
            raise
        for sequence, rollout in finished:
            self._streams.pop(sequence)._finish(sequence, rollout)
        if not self._streams:
            self._version.remember()
        return drawn

    # --- Preparation -----------------------------------------------------------------------------

    def _prepare(self, requests: list[tuple[int, SamplingParams]]) -> Generation:
        """A cache in which each of these (prompt length, params) fits, and nothing stale."""
        generation = self._generation
        if generation is not None and not self._streams and not generation.fits():
            generation = None  # another dtype or device
        if generation is None or (not self._streams and self._may_grow(requests, generation)):
            generation = self._new_generation(requests)
            self._version.touched()
        elif self._streams:
            if self._version.touched():
                self._forget()
        elif generation.pool.cached and self._version.changed():
            self._forget()
        self._generation = generation
        _check_fits(requests, generation.plan)
        return generation

    def _may_grow(self, requests: list[tuple[int, SamplingParams]], now: Generation) -> bool:
        if self.kv_memory_gb is not None or now.plan.total_bytes >= 0.9 * now.plan.budget:
            return False
        return self._most_blocks(requests, now.max_rows) > now.plan.blocks

    def _new_generation(self, requests: list[tuple[int, SamplingParams]]) -> Generation:
        weight, config = self.model.lm_head_weight, self.model.config
        self._generation = None  # its memory is free again before more is taken
        tokens = self.max_batch_tokens
        if weight.device.type == "cpu":
            tokens = min(tokens, _MAX_CPU_TOKENS)
        rows = min(_MAX_ROWS[weight.device.type], tokens)
        given = self.kv_memory_gb
        token_bytes = bytes_per_token(config, weight.dtype)
        plan = plan_cache(
            budget=default_budget(weight.device) if given is None else int(given * 1e9),
            token_bytes=token_bytes,
            block_size=self.block_size,
            most_blocks=rows * blocks_for(config.max_position_embeddings, self.block_size)
            if given is not None
            else self._most_blocks(requests, rows),
        )
        _check_fits(requests, plan)
        _log.info("%s", plan)
        return Generation(self.model, self.tokenizer, plan, max(1, rows), tokens)

    def _most_blocks(self, requests: list[tuple[int, SamplingParams]], rows: int) -> int:
        """Blocks with which nobody waits for memory: prompts once, and the samples that can run."""
        size = self.block_size
        prompts = sum(blocks_for(prompt, size) for prompt, _ in requests)
        tails = [blocks_for(p.max_new_tokens, size) + 1 for _, p in requests for _ in range(p.n)]
        return prompts + sum(sorted(tails)[-rows:]) + 1

    def _forget(self) -> None:
        if self._generation is not None:
            self._generation.scheduler.restart()
            self._generation.rebind()

    def _flags_of(self, params: SamplingParams) -> np.ndarray:
        """What a token means, [V] uint8; the same array for the same settings."""
        key = (params.stop, params.stop_token_ids, params.ignore_eos)
        if key not in self._flags:
            words = self.model.config.vocab_size
            flags = np.zeros(words, dtype=np.uint8)
            flags[[token for token in self.end_tokens(params) if token < words]] |= ENDS
            stops = self._stops_of(params.stop)
            if stops is not None:
                flags[stops.may_end] |= MAY_END
            self._flags[key] = flags
        return self._flags[key]

    def _stops_of(self, stop: tuple[str, ...]) -> StopStrings | None:
        """The matcher of these stop strings, built once."""
        if stop and stop not in self._stop_strings:
            words = self.model.config.vocab_size
            self._stop_strings[stop] = StopStrings(self.tokenizer, stop, words)
        return self._stop_strings.get(stop)

    def _check(self, prompt: list[int], params: SamplingParams, name: str) -> None:
        config = self.model.config
        if not prompt:
            raise ValueError(f"{name} is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise ValueError(
                f"{name} holds the token id {wrong}, and the model's vocabulary has "
                f"{config.vocab_size} words; encode it with the model's own tokenizer"
            )
        if len(prompt) + params.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, which with max_new_tokens="
                f"{params.max_new_tokens} is more than the model's "
                f"{config.max_position_embeddings} positions; shorten it or lower max_new_tokens"
            )


def _check_fits(requests: list[tuple[int, SamplingParams]], plan: CachePlan) -> None:
    if requests:
        prompt, params = max(requests, key=lambda one: one[0] + one[1].max_new_tokens)
        check_fits(prompt, params.max_new_tokens, plan)


def _one_each(
    params: SamplingParams | list[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    if isinstance(params, list):
        if len(params) != prompts:
            raise ValueError(
                f"params is a list of {len(params)}, and there are {prompts} prompts; give one"
                " SamplingParams for all, or one each"
            )
        return params
    if params is None and prompts:
        raise ValueError("params is missing: prompts need a SamplingParams")
    return [params] * prompts if params is not None else []


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
