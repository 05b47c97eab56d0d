"""Sampling, with and without filters: one kernel against softmax and multinomial of plain torch.

    python benchmarks/bench_sample.py [--rows 1 256] [--device cuda]

Logits as of a trained model (N(0, 2.5), one token at 12) and nearly flat ones (N(0, 0.1)), which
leave a filter the most to look at. Providers: the op; torch's own way, log-softmax and multinomial,
with topk before it for filters; and the same with an exponential race in the place of multinomial,
which does not make a GPU's host wait. All return the token and both its log-probabilities. The
yardstick is a copy that moves as many bytes as the logits have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import harness
import torch
from check import WrongResult, check
from harness import Limits, Row, Run, Work
from torch import Tensor

from rmr1.kernels.sample import Drawn, reference, sample

WORDS = {"cpu": 49_152, "cuda": 152_064}
FILTERS: dict[str, tuple[int, float]] = {"no filter": (0, 1.0), "top_k 50, top_p 0.9": (50, 0.9)}
Draw = Callable[[Tensor], Tensor]


def case(kind: str, rows: int, words: int) -> Tensor:
    """Logits [B, V]."""
    if kind == "flat":
        return torch.randn(rows, words) * 0.1
    logits = torch.randn(rows, words) * 2.5
    logits[torch.arange(rows), torch.randint(0, words, (rows,))] = 12.0
    return logits


def columns(rows: int, top_k: int, top_p: float, device: str) -> dict[str, Tensor]:
    """Keys and settings [B] at temperature 1, alike for all rows."""
    return {
        "keys": torch.arange(rows, device=device),
        "temperature": torch.ones(rows, device=device),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32, device=device),
        "top_p": torch.full((rows,), top_p, device=device),
        "min_p": torch.zeros(rows, device=device),
    }


def multinomial(p: Tensor) -> Tensor:
    return torch.multinomial(p, 1)


def race(p: Tensor) -> Tensor:
    """The token whose exponential variate of rate p is the first."""
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def plain(logits: Tensor, top_k: int, top_p: float, draw: Draw) -> tuple[Tensor, ...]:
    """Token and log-probabilities of each row in plain torch, the filters in the same order."""
    full = torch.log_softmax(logits.float(), -1)
    if not top_k:
        token = draw(full.exp())
        logprob = full.gather(1, token)
        return token, logprob, logprob
    kept, ids = full.topk(top_k)
    p = kept.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    place = draw(p)
    chosen = p.gather(1, place)
    return ids.gather(1, place), kept.gather(1, place), (chosen / p.sum(-1, keepdim=True)).log()


def verify(kind: str, top_k: int, top_p: float, dtype: torch.dtype, device: str) -> float:
    """The error in units of torch's own, at an awkward size; the tokens must be the reference's."""
    logits = case(kind, 67, 1025).to(device, dtype)
    settings = columns(67, top_k, top_p, device)
    tokens = sample(logits, **settings).tokens
    wanted = reference(logits, **settings).tokens
    if not torch.equal(tokens, wanted):
        raise WrongResult(
            f"sample: {int((tokens != wanted).sum())} of 67 tokens differ from the reference's on"
            f" {kind} logits with top_k {top_k} and top_p {top_p}; nothing was timed."
        )

    def torchs(logits: Tensor) -> tuple[Tensor, ...]:
        full = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        kept = full
        if top_k:
            largest, ids = full.topk(top_k)
            p = largest.softmax(-1)
            out = p.cumsum(-1) - p >= top_p
            kept = torch.full_like(full, -torch.inf).scatter(
                1, ids, largest.masked_fill(out, -torch.inf)
            )
        return tuple(x.gather(1, tokens[:, None]).squeeze(1) for x in (full, kept.log_softmax(-1)))

    return check("sample", lambda x: sample(x, **settings)[1:], torchs, [logits], 0)


def measure(options: argparse.Namespace, limits: Limits) -> list[Row]:
    """Check every kind of logits with every filter, then the rows of each size."""
    torch.manual_seed(0)
    dtype, device = getattr(torch, options.dtype), options.device
    kinds = [(kind, name) for kind in ("peaked", "flat") for name in FILTERS]
    errors = {(kind, name): verify(kind, *FILTERS[name], dtype, device) for kind, name in kinds}
    found = []
    words = 1025 if options.quick else WORDS[device]
    for rows in options.rows or ([17] if options.quick else [1, 32, 256]):
        for kind, name in kinds:
            logits = case(kind, rows, words).to(device, dtype)
            top_k, top_p = FILTERS[name]
            settings = columns(rows, top_k, top_p, device)
            work = Work(
                f"B={rows} V={words} {options.dtype} {kind}, {name}",
                # Of every logit: a difference, a product, the dozen of an exponential, a sum.
                15.0 * logits.numel(),
                # The logits in; a token and two log-probabilities a row do not count.
                float(logits.numel() * logits.element_size()),
            )

            def op(logits: Tensor = logits, settings: dict[str, Tensor] = settings) -> Drawn:
                return sample(logits, **settings)

            runs: dict[str, Run] = {
                "copy of the bytes": harness.copy_of(work.bytes, device),
                "rmr1 sample": op,
                "plain torch": partial(plain, logits, top_k, top_p, multinomial),
                "plain torch, race": partial(plain, logits, top_k, top_p, race),
            }
            if options.compile:
                fast = harness.compiled(plain)
                runs["torch.compile, race"] = partial(fast, logits, top_k, top_p, race)
            error = {"rmr1 sample": errors[kind, name]}
            found += harness.measure(work, runs, options, limits, error, results=16 * rows)
    return found


def main() -> int:
    parser = harness.arguments(__doc__, "sample", samples=15)
    parser.add_argument("--rows", type=int, nargs="+", help="default 1 32 256")
    return harness.run(parser, "Sampling", measure)


if __name__ == "__main__":
    sys.exit(main())
