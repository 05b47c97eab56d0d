"""The loop of the generator: plan a step, compute it, draw, and let go of what is finished.

One `Generation` lives as long as its KV cache: across calls, so that what prompts have in common is
computed once, until the weights change.

Legend: B rows that draw, W wanted hidden states, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rmr1.engine.block_pool import BlockPool
from rmr1.engine.cache_plan import MOST_LOGITS, CachePlan
from rmr1.engine.cuda_graphs import structure
from rmr1.engine.detokenize import decode
from rmr1.engine.endings import ENDS, MAY_END
from rmr1.engine.kv_cache import PagedCache, cache_dtype, upload
from rmr1.engine.model import CausalLM
from rmr1.engine.native_step import NativeStep
from rmr1.engine.sampling import token_keys
from rmr1.engine.scheduler import Scheduler, Step
from rmr1.engine.sequences import Array, Rows, Sequence
from rmr1.engine.torch_step import TorchStep
from rmr1.kernels.linear import linear
from rmr1.kernels.sample import Drawn, sample

# Words of a 16-bit head that a CPU converts at a time.
_STRIP = 512


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sample.

    `token_ids` includes the stop token that ended it, `text` does not, nor a stop string and what
    follows it. `logprobs` are natural logarithms under the full distribution at `temperature`,
    `sampled_logprobs` under what top_k, top_p and min_p left of it. `weights_version` counts the
    changes of the weights that the generator had seen: one version for all tokens of a sample.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    sampled_logprobs: list[float] | None = None
    weights_version: int = field(default=0, compare=False)


class Generation:
    """Rows, blocks and queue of a generator, and its steps."""

    def __init__(
        self, model: CausalLM, tokenizer: Any, plan: CachePlan, max_rows: int, max_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.max_rows = max_rows
        positions = min(model.config.max_position_embeddings, plan.tokens)
        width = -(-positions // plan.block_size)
        self.cache = PagedCache(model.config, plan, model.lm_head_weight)
        self._width, self._max_tokens = width, max_tokens
        self._structure = structure(model)
        self._forward = self._make_forward()
        self._logits_memory = torch.empty(0, dtype=torch.float32, device="cpu")  # of a CPU's steps
        self.spent: defaultdict[str, float] = defaultdict(float)  # seconds, by part of a step
        self.clear()

    def _make_forward(self) -> NativeStep | TorchStep:
        if NativeStep.suits(self.model):
            return NativeStep(self.model, self.cache)
        return TorchStep(self.model, self.cache, self.max_rows, self._width)

    @property
    def native(self) -> bool:
        """Whether steps are computed in C++, not through the model's forward."""
        return isinstance(self._forward, NativeStep)

    def fits(self) -> bool:
        """Whether the model is still what the cache and the forward were made for.

        Weights are not looked at, but what is computed with them: an adapter or a hook more, and
        nothing that is cached is valid.
        """
        head = self.model.lm_head_weight
        return (
            cache_dtype(head) == self.cache.keys.dtype
            and head.device == self.cache.keys.device
            and NativeStep.suits(self.model) == self.native
            and (self.native or structure(self.model) == self._structure)
        )

    def rebind(self) -> None:
        """The parameters may lie elsewhere now, and adapters may have come with new ones."""
        if isinstance(self._forward, TorchStep) and not NativeStep.suits(self.model):
            self._forward.rebind()  # its graphs may still be good
            return
        self.spent = self.totals()
        self._forward = self._make_forward()

    def totals(self) -> defaultdict[str, float]:
        """Seconds spent by part; `layers` is also there by its own parts, where they are known."""
        parts = self.spent.copy()
        if isinstance(self._forward, NativeStep):
            for part, seconds in self._forward.seconds().items():
                parts[part] += seconds
        return parts

    def profile(self) -> dict[str, float]:
        """Seconds spent, by parts that add up. On a GPU a part is the time to launch it, and the
        last one, `sample`, waits for all of them.
        """
        parts = self.totals()
        inside = sum(parts[part] for part in NativeStep.PARTS if part in parts)
        if inside:
            parts["rest of the layers"] = max(0.0, parts.pop("layers") - inside)
        return dict(parts)

    def clear(self) -> None:
        """Drop everything that waits, runs or is cached."""
        self.pool = BlockPool(self.plan.blocks, lazy=self.cache.keys.device.type == "cpu")
        self.rows = Rows(self.max_rows, self._width)
        self.scheduler = Scheduler(self.pool, self.rows, self.plan.block_size, self._max_tokens)

    def step(self, version: int) -> tuple[list[tuple[Sequence, Rollout]], int]:
        """Compute and draw once: the samples that this finished, and how many tokens it drew."""
        began = time.perf_counter()
        step = self.scheduler.plan()
        began = self._spend("schedule", began)
        device = self.cache.keys.device
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with here, torch.inference_mode():
            hidden = self._forward(step)
            began = self._spend("layers", began)
            drawn = self._draw(step, hidden)
            began = time.perf_counter()
        tokens = drawn.tokens.numpy()
        if tokens.size and tokens.min() < 0:
            self._refuse(step.rows[int(tokens.argmin())])
        logprobs = np.stack([drawn.logprobs.numpy(), drawn.sampled_logprobs.numpy()])
        self.rows.draw(step.rows, tokens, logprobs)
        finished = self._finish(step.rows, tokens, version)
        self._spend("finish", began)
        return finished, len(step.rows)

    def _draw(self, step: Step, hidden: Tensor) -> Drawn:
        """A token for each row of the step, on the host: hidden [W, H] -> [B]."""
        if not len(step.rows):  # a piece in the middle of a prompt
            nothing = torch.empty(0)
            return Drawn(nothing.long(), nothing, nothing)
        head, device = self.model.lm_head_weight, hidden.device
        piece = max(1, MOST_LOGITS[device.type] // head.shape[0])
        draws = []
        for first in range(0, len(step.wanted), piece):
            began = time.perf_counter()
            logits = self._logits(hidden[first : first + piece], head)  # [<= piece, V]
            began = self._spend("head", began)
            here = (step.source >= first) & (step.source < first + piece)
            rows, source = step.rows[here], step.source[here] - first
            if len(rows) != len(logits) or not (np.diff(source) == 1).all():
                logits = logits[upload(source, device)]  # samples of one prompt share its logits
            places, settings = np.nonzero(here)[0], self.rows
            drawn = sample(
                logits,
                upload(token_keys(settings.keys[rows], settings.count[rows]), device),
                temperature=upload(settings.temperature[rows], device),
                top_k=upload(settings.top_k[rows], device),
                top_p=upload(settings.top_p[rows], device),
                min_p=upload(settings.min_p[rows], device),
            )
            draws.append((places, drawn))
            self._spend("sample", began)
        began = time.perf_counter()
        order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in draws])))
        columns = zip(*(drawn for _, drawn in draws), strict=True)
        # The one place where a step waits for a GPU.
        result = Drawn(*(torch.cat(column).cpu()[order] for column in columns))
        self._spend("sample", began)
        return result

    def _logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """hidden [W, H], head [V, H] -> [W, V]; on a CPU valid until the next call.

        In fp32 whatever the weights are, as the trainer has them: rounded logits are the commonest
        mismatch between the two.
        """
        if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        if hidden.device.type != "cpu":
            return linear(hidden, head)
        words = len(hidden) * len(head)
        if self._logits_memory.numel() < words:
            # Its pages take memory only once they are written.
            rows = max(len(hidden), min(self.max_rows, MOST_LOGITS["cpu"] // len(head)))
            self._logits_memory = torch.empty(rows * len(head), dtype=torch.float32, device="cpu")
        out = self._logits_memory[:words].view(len(hidden), len(head))
        if hidden.dtype.itemsize > 2:
            return linear(hidden, head, out=out)
        hidden = hidden.float()
        for first in range(0, len(head), _STRIP):
            strip = head[first : first + _STRIP].float()
            out[:, first : first + _STRIP] = linear(hidden, strip)
        return out

    def _finish(self, rows: Array, tokens: Array, version: int) -> list[tuple[Sequence, Rollout]]:
        """Take out what is complete after these draws."""
        sequences = self.rows.sequences
        flags = self.rows.flags(rows, tokens)
        full = self.rows.count[rows] >= self.rows.limit[rows]
        finished = []
        for index in np.nonzero(full | (flags != 0))[0]:
            row, ended = int(rows[index]), bool(flags[index] & ENDS)
            sequence = sequences[row]
            assert sequence is not None
            stops = sequence.request.stops
            cut = (
                stops.find(self.rows.drawn(row).tolist())
                if stops is not None and not ended and flags[index] & MAY_END
                else None
            )
            if not ended and not full[index] and cut is None:
                continue
            self.scheduler.finish(row)
            finished.append((sequence, self._rollout(sequence, ended, version)))
        return finished

    def _rollout(self, sequence: Sequence, ended: bool, version: int) -> Rollout:
        token_ids = sequence.tokens.tolist()
        text = decode(self.tokenizer, token_ids[:-1] if ended else token_ids)
        stops = sequence.request.stops
        cut = None if stops is None else stops.find_in(text)
        full, sampled = sequence.logprobs.tolist()
        stopped = ended or cut is not None
        return Rollout(
            token_ids, full, text[:cut], "stop" if stopped else "length", sampled, version
        )

    def _refuse(self, row: int) -> None:
        sequence = self.rows.sequences[row]
        assert sequence is not None
        raise ValueError(
            f"the model's logits for prompt {sequence.request.index} are not finite after"
            f" {int(self.rows.count[row])} tokens; its weights are damaged, or its dtype too narrow"
        )

    def _spend(self, part: str, began: float) -> float:
        now = time.perf_counter()
        self.spent[part] += now - began
        return now
