"""The rollout generator: many prompts, n samples each, in one continuously refilled batch.

What runs in a step is decided in `scheduler.py`, computed in `generation.py`, and kept in a paged
KV cache that lives as long as the generator: what prompts have in common is computed once, in a
call and over calls, until the weights change. What a sample draws does not depend on any of this.

The weights are the module's own parameters: whatever the trainer has written is used next.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor, nn

from rmr1.engine.cache_plan import (
    BLOCK_SIZE,
    MOST_ROWS,
    MOST_TOKENS,
    CachePlan,
    blocks_for,
    bytes_per_token,
    check_fits,
    default_budget,
    plan_cache,
)
from rmr1.engine.endings import Endings
from rmr1.engine.generation import Generation, Rollout
from rmr1.engine.kv_cache import cache_dtype
from rmr1.engine.model import CausalLM
from rmr1.engine.released import give_back, take_back
from rmr1.engine.rollout_stream import Finished, Piece, RolloutStream
from rmr1.engine.sampling import SamplingParams, one_each
from rmr1.engine.sequences import Request, Sequence, new_sequences
from rmr1.engine.weights_version import WeightsVersion, check_source, copy_weights

__all__ = ["Finished", "Generator", "Piece", "Rollout", "RolloutStream", "SamplingParams"]

_log = logging.getLogger(__name__)


class Generator:
    """Samples continuations from a `CausalLM`.

    `kv_memory_gb` bounds the KV cache, in GB (default: a share of the memory that is free at the
    first call). On a GPU it is taken at once, on a CPU as it comes into use. `block_size` is the
    tokens of one of its blocks (flash-attn, where it is installed, wants 256 and is taken then),
    and `max_batch_tokens` bounds the tokens of one forward pass. None of them changes what is
    drawn, but for rounding.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        *,
        kv_memory_gb: float | None = None,
        block_size: int = BLOCK_SIZE,
        max_batch_tokens: int = MOST_TOKENS["cuda"],
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
        self._endings = Endings(model.config, tokenizer)
        self._version = WeightsVersion(model)
        self._generation: Generation | None = None
        self._streams: dict[Sequence, weakref.ref[RolloutStream]] = {}
        self._dropped: deque[Sequence] = deque()  # of streams that nobody holds any more
        self._numbers = count()
        self._mixed = False  # weights, by a sync that failed
        self._weightless = False  # by `release`
        self._spent: dict[str, float] = {}  # in caches that are gone

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
        settings = one_each(params, len(prompts))
        stream = self._open(prompts, settings)
        finished = 0
        try:
            while stream.unfinished:
                drawn = self._step()
                before, finished = finished, len(stream._done)
                if progress is not None:
                    progress(finished - before, drawn)
        finally:
            stream.close()
        done = {(one.request.index, one.sample): rollout for one, rollout in stream._done}
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
        return self._open(prompts, one_each(params, len(prompts)))

    def sync(self, source: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
        """Take over a trainer's new weights; returns their version, which later rollouts bear.

        From the generator's own model nothing is copied. From another module, a state dict, or
        pairs of name and whole tensor that are made one at a time (of a sharded model), each tensor
        is copied and the copy verified. Whatever was cached is dropped. Samples that are running
        begin anew, so that each is of one version. Hooks and adapters that come or go while samples
        run are noticed here, and between calls.

        Raises:
            ValueError: see `copy_weights`.
        """
        if isinstance(source, nn.Module) and source is not self.model:
            source = source.state_dict()
        if isinstance(source, Mapping):
            check_source(self.model, source)  # nothing has been written if it does not fit
        if self._weightless:
            if isinstance(source, nn.Module):
                raise ValueError("the weights were released; sync them from another model")
            take_back(self.model)
            self._weightless = False
        self._mixed = True  # until all is copied: it may be interrupted anywhere
        try:
            if not isinstance(source, nn.Module):
                copy_weights(self.model, source)
            self._mixed = False
        finally:
            self._version.bump()
            self._forget()
        return self._version.number

    def release(self, *, weights: bool = False) -> None:
        """Give back the memory of the KV cache; the next call takes it again.

        With `weights` that of the model too: what they held is gone, and nothing can be generated
        until `sync` brings new ones.

        Raises:
            ValueError: samples are running.
        """
        self._collect()
        if self._streams:
            raise ValueError("samples are running; close their streams before anything is released")
        if self._generation is not None:
            self._spent = self._generation.totals()
        self._generation = None
        if weights:
            give_back(self.model)
            self._weightless = True

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
        return self._endings.tokens(params)

    # --- What streams call -----------------------------------------------------------------------

    def _add(
        self,
        stream: RolloutStream,
        prompt: list[int],
        params: SamplingParams,
        number: int,
        draws_as: int | None,
    ) -> list[Sequence]:
        """One more request of a stream, checked."""
        tokens = self._tokens(prompt, params, f"prompts[{number}]")
        # While others run, whoever writes weights past torch's knowledge has to call `sync`.
        self._prepare([(len(tokens), params)], look=not self._streams)
        return self._enqueue(stream, tokens, params, number, draws_as)

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
        self._collect()
        try:
            if self._version.touched():
                self._forget()
            finished, drawn = generation.step(self._version.number)
            for sequence, rollout in finished:
                stream = self._streams.pop(sequence)()
                if stream is not None:
                    stream._finish(sequence, rollout)
        except BaseException as error:  # Ctrl-C too: half a step leaves nothing to be trusted
            generation.clear()
            for held in set(self._streams.values()):
                if (stream := held()) is not None:
                    stream._abort(error)
            self._streams.clear()
            raise
        return drawn

    def _collect(self) -> None:
        """Cancel what was left of streams that are gone; refuse to go on with mixed weights."""
        if self._mixed:
            raise ValueError(
                "the last sync failed and left old and new weights side by side; sync again before"
                " anything is generated"
            )
        if self._weightless:
            raise ValueError("the weights were released; sync before anything is generated")
        while self._dropped:
            self._cancel(self._dropped.popleft())

    # --- Preparation -----------------------------------------------------------------------------

    def _open(self, prompts: list[list[int]], settings: list[SamplingParams]) -> RolloutStream:
        """A stream of these requests, all of them checked first."""
        pairs = list(zip(prompts, settings, strict=True))
        tokens = [self._tokens(*pair, f"prompts[{index}]") for index, pair in enumerate(pairs)]
        self._prepare([(len(p), each) for p, each in pairs], look=True)
        stream = RolloutStream(self)
        for number, (prompt, each) in enumerate(zip(tokens, settings, strict=True)):
            stream._take(self._enqueue(stream, prompt, each, number))
        return stream

    def _enqueue(
        self,
        stream: RolloutStream,
        prompt: np.ndarray,
        params: SamplingParams,
        number: int,
        draws_as: int | None = None,
    ) -> list[Sequence]:
        flags, stops = self._endings.flags(params), self._endings.stops(params)
        request = Request(prompt, params, number, flags, stops, draws_as=draws_as)
        request.hash_blocks(self.block_size)
        sequences = new_sequences(request, self._numbers)
        assert self._generation is not None
        self._generation.scheduler.add(sequences)
        self._streams.update(dict.fromkeys(sequences, weakref.ref(stream)))
        return sequences

    def _prepare(self, requests: list[tuple[int, SamplingParams]], *, look: bool) -> None:
        """A cache in which each of these (prompt length, params) fits, and nothing stale.

        `look` at the weights themselves, not only at what torch knows of them.
        """
        self._collect()
        if self._version.changed() if look else self._version.touched():
            self._forget()
        now = self._generation
        if not self._streams and (now is None or not now.fits()):
            spent = self._spent if now is None else now.totals()
            self._generation = now = None  # its memory is free again before more is taken
            self._generation = self._new_generation()
            self._generation.spent.update(spent)
        assert self._generation is not None
        if requests:
            prompt, params = max(requests, key=lambda one: one[0] + one[1].max_new_tokens)
            check_fits(prompt, params.max_new_tokens, self._generation.plan)

    def _new_generation(self) -> Generation:
        """With a KV cache for all calls to come: as much as is allowed and could find a use."""
        weight, config = self.model.lm_head_weight, self.model.config
        kind, tokens = weight.device.type, self.max_batch_tokens
        if kind == "cpu":
            tokens = min(tokens, MOST_TOKENS[kind])
        rows = min(MOST_ROWS[kind], tokens)
        given = self.kv_memory_gb
        plan = plan_cache(
            budget=default_budget(weight.device) if given is None else int(given * 1e9),
            token_bytes=bytes_per_token(config, cache_dtype(weight)),
            block_size=self.block_size,
            most_blocks=rows * blocks_for(config.max_position_embeddings, self.block_size),
        )
        if not plan.blocks:
            raise ValueError(
                f"{plan.budget / 1e9:.3g} GB of KV cache do not hold one block of"
                f" {plan.block_size} tokens ({plan.block_size * plan.token_bytes / 1e9:.3g} GB);"
                " raise kv_memory_gb"
            )
        _log.info("%s", plan)
        return Generation(self.model, self.tokenizer, plan, rows, tokens)

    def _forget(self) -> None:
        if self._generation is not None:
            self._generation.scheduler.restart()
            self._generation.rebind()

    def _tokens(self, prompt: list[int], params: SamplingParams, name: str) -> np.ndarray:
        """The prompt as an array, checked: [P] int64."""
        config = self.model.config
        tokens = np.asarray(prompt)
        if not tokens.size:
            raise ValueError(f"{name} is empty; a prompt needs at least one token")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{name} must be a list of token ids, got {str(prompt)[:60]}")
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"{name} holds the token id {wrong[0]}, and the model's vocabulary has "
                f"{config.vocab_size} words; encode it with the model's own tokenizer"
            )
        if len(tokens) + params.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{name} has {len(tokens)} tokens, which with max_new_tokens="
                f"{params.max_new_tokens} is more than the model's "
                f"{config.max_position_embeddings} positions; shorten it or lower max_new_tokens"
            )
        return tokens.astype(np.int64)
