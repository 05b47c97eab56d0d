"""Attention of training: packed sequences, in groups that may share a prompt.

Every token sees itself and what is before it in its own run; a response whose prompt is shared sees
all of the prompt too. `merged` below defines the op for whatever device and dtype: attention of
every run on itself, then of the responses on their prompts (`varlen_attention.py`), and the two
merged through their log-sum-exp. On a CPU in fp32 it is one native kernel
(csrc/packed_attention.cpp).

Nothing is differentiated here; `rmr1/engine/attention.py` does.

Shapes: T packed tokens, N query heads, K key/value heads, D head size; S runs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels import varlen_attention
from rmr1.kernels.dispatch import choose
from rmr1.kernels.segments import Segments

WIDEST = 256  # heads of the native kernel


class Layout:
    """Who sees whom in a packed batch; made once, for all layers.

    Args:
        groups: of each the tokens of the prompt and of the responses behind it. One response has
            its prompt to itself; none: the prompt is a whole sequence.

    Raises:
        ValueError: nothing at all, or a run without tokens.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        lengths, token = list[int](), 0
        self.prompts: list[slice] = []  # shared ones
        self.answers: list[slice] = []  # all responses to each of them
        segments, of_groups = list[list[int]](), list[list[int]]()
        for prompt, responses in groups:
            first, end = len(lengths), token + prompt
            if len(responses) < 2:
                lengths.append(prompt + sum(responses))
            else:
                lengths += [prompt, *responses]
                self.prompts.append(slice(token, end))
                self.answers.append(slice(end, end + sum(responses)))
            for number, count in enumerate(lengths[first:]):
                shared = [0, 0] if number == 0 else [end - prompt, end]
                segments.append([token, token + count, *shared])
                token += count
            of_groups.append([first, len(lengths)])
        self.own = Segments(lengths)
        self.across = (
            Segments(_counts(self.answers), _counts(self.prompts)) if self.prompts else None
        )
        self.tokens = token
        self.segments = torch.tensor(segments)  # [S, 4]: begin, end, those of the shared prompt
        self.groups = torch.tensor(of_groups)  # [G, 2] into segments


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attend: q [T, N, D], k and v [T, K, D] -> [T, N, D] and the log-sum-exp of scores, [T, N].

    Scores are scaled by 1/sqrt(D). The log-sum-exp is natural, in fp32 (fp64 for fp64).

    Raises:
        ValueError: a number of tokens that is not the layout's.
    """
    if not len(q) == len(k) == len(v) == layout.tokens:
        raise ValueError(
            f"packed_attention: the batch was laid out for {layout.tokens} tokens and got {len(q)}"
            f" queries and {len(k)} keys: the sum of the lengths must be the number of tokens."
        )
    if not _native(q):
        return merged(q, k, v, layout)
    q, k, v = (_heads_contiguous(x) for x in (q, k, v))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    scale, threads = q.shape[2] ** -0.5, torch.get_num_threads()
    _C.packed_attention(q, k, v, layout.segments, layout.groups, scale, out, lse, threads)
    return out, lse


def backward(
    on_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from what `forward` took and gave."""
    if not _native(q):
        return merged_backward(on_out, q, k, v, out, lse, layout)
    q, k, v = (_heads_contiguous(x) for x in (q, k, v))
    on_q, on_k, on_v = (x.new_empty(x.shape) for x in (q, k, v))
    _C.packed_attention_backward(
        on_out.contiguous(),
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        layout.segments,
        layout.groups,
        q.shape[2] ** -0.5,
        on_q,
        on_k,
        on_v,
        torch.get_num_threads(),
    )
    return on_q, on_k, on_v


def _native(q: Tensor) -> bool:
    fits = q.dtype == torch.float32 and q.shape[2] % 8 == 0 and q.shape[2] <= WIDEST
    # What the kernel does not take, torch's own does, whichever kernels are forced.
    return choose("packed_attention", q, native=True) == "native" and fits


def _heads_contiguous(x: Tensor) -> Tensor:
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


# --- Two calls, merged ---------------------------------------------------------------------------


def merged(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The op by two calls of `varlen_attention`."""
    out, lse = varlen_attention.forward(q, k, v, layout.own)
    if layout.across is None:
        return out, lse
    rows, keys = layout.answers, layout.prompts
    more, more_lse = varlen_attention.forward(
        _rows(q, rows), _rows(k, keys), _rows(v, keys), layout.across
    )
    for place, part in _parts(rows):
        _merge(out[place], lse[place], more[part], more_lse[part])
    return out, lse


def merged_backward(
    on_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradient: each call gets the result and the log-sum-exp of the whole."""
    grads = varlen_attention.backward(on_out, q, k, v, out, lse, layout.own)
    if layout.across is None:
        return grads
    rows, keys = layout.answers, layout.prompts
    more = varlen_attention.backward(
        _rows(on_out, rows),
        _rows(q, rows),
        _rows(k, keys),
        _rows(v, keys),
        _rows(out, rows),
        _rows(lse, rows),
        layout.across,
    )
    for whole, extra, places in zip(grads, more, (rows, keys, keys), strict=True):
        for place, part in _parts(places):
            whole[place] += extra[part]
    return grads


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """One softmax over the keys of both, in place: out, more [L, N, D], their sums [L, N]."""
    total = torch.logaddexp(lse, more_lse)
    out *= (lse - total).exp_()[..., None].to(out.dtype)
    out.addcmul_(more, (more_lse - total).exp_()[..., None].to(out.dtype))
    lse.copy_(total)


def _counts(places: list[slice]) -> list[int]:
    return [place.stop - place.start for place in places]


def _rows(x: Tensor, places: list[slice]) -> Tensor:
    """Runs of rows one after the other."""
    return x[places[0]] if len(places) == 1 else torch.cat([x[place] for place in places])


def _parts(places: list[slice]) -> list[tuple[slice, slice]]:
    """Each run, and where its rows stand among `_rows`."""
    found, start = [], 0
    for place, count in zip(places, _counts(places), strict=True):
        found.append((place, slice(start, start + count)))
        start += count
    return found
