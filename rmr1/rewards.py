"""Verifiable rewards of judgments: small functions, summed as a configuration weighs them.

Each takes N verdicts (with texts and pairs, where it needs them; `pairs` are in order, each
repeated for its samples) and gives N numbers. RM-R1 uses `correctness` alone: a reward for the
format made no significant difference there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rmr1.data import Pair
from rmr1.grpo_config import RewardConfig
from rmr1.verdict import FormatError, Span, Verdict

# A quote must have so many characters (or be the whole answer): single words occur anywhere.
SHORTEST_QUOTE = 12


def correctness(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> list[float]:
    """+1 when the verdict names the better answer, -1 otherwise, without a verdict too."""
    return [
        1.0 if verdict.answer == pair.label else -1.0
        for verdict, pair in zip(verdicts, pairs, strict=True)
    ]


def swap_consistency(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> list[float]:
    """The share of a pair's judgments in the other order that prefer the same answer, 0 to 1.

    0 without a verdict, or where the other order was not judged. After J1 (arXiv 2505.10320), which
    has both orders of a pair in one batch.
    """
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)  # (id, label): that order's
    for verdict, pair in zip(verdicts, pairs, strict=True):
        if verdict.answer in ("A", "B"):
            right[pair.id, pair.label].append(verdict.answer == pair.label)
    rewards = []
    for verdict, pair in zip(verdicts, pairs, strict=True):
        other = right[pair.id, "B" if pair.label == "A" else "A"]
        if verdict.answer not in ("A", "B") or not other:
            rewards.append(0.0)
            continue
        # Both right or both wrong: the same answer, which stands in the other place.
        rewards.append(other.count(verdict.answer == pair.label) / len(other))
    return rewards


def grounding(
    verdicts: Sequence[Verdict], texts: Sequence[str], pairs: Sequence[Pair]
) -> list[float]:
    """The share of quotes that occur in the answer they are said to be from; 0 without quotes.

    Runs of spaces count as one, and quotation marks around a quote as none. A quote that is too
    short to say anything counts as one that does not occur.
    """
    return [
        _grounded(verdict, text, pair)
        for verdict, text, pair in zip(verdicts, texts, pairs, strict=True)
    ]


def _grounded(verdict: Verdict, text: str, pair: Pair) -> float:
    found = [
        quoted(text, span, answer) and _says_something(text, span, answer)
        for spans, answer in ((verdict.quotes_a, pair.answer_a), (verdict.quotes_b, pair.answer_b))
        for span in spans
    ]
    return sum(found) / len(found) if found else 0.0


def quoted(text: str, span: Span, answer: str) -> bool:
    """Whether a judgment's quote stands in an answer."""
    quote = _bare(text, span)
    return bool(quote) and quote in " ".join(answer.split())


def _says_something(text: str, span: Span, answer: str) -> bool:
    return len(_bare(text, span)) >= min(SHORTEST_QUOTE, len(" ".join(answer.split())))


def _bare(text: str, span: Span) -> str:
    return " ".join(text[span.start : span.end].split()).strip("\"'“”‘’«» ")


def well_formed(verdicts: Sequence[Verdict]) -> list[float]:
    """1 for a judgment that keeps the chain of rubrics, else 0."""
    return [float(verdict.error == FormatError.OK) for verdict in verdicts]


def shortness(lengths: Sequence[int], limit: int) -> list[float]:
    """From 0 for no tokens down to -1 at the limit."""
    return [-min(1.0, length / limit) for length in lengths]


def overlong(lengths: Sequence[int], limit: int, buffer: int) -> list[float]:
    """DAPO's soft punishment: 0 up to limit - buffer tokens, then down to -1 at the limit.

    Source: Yu et al. (arXiv 2503.14476), equation 13.
    """
    return [-min(1.0, max(0.0, (length - limit + buffer) / buffer)) for length in lengths]


def weighed(
    config: RewardConfig,
    verdicts: Sequence[Verdict],
    texts: Sequence[str],
    lengths: Sequence[int],
    pairs: Sequence[Pair],
    *,
    limit: int,
    buffer: int,
) -> dict[str, list[float]]:
    """The parts that count, times their weights; `correctness` is the first.

    `lengths` are in tokens, `limit` is their cap, `buffer` what `overlong` punishes (0: nothing).
    """
    parts = {"correctness": correctness(verdicts, pairs)}
    if config.swap_consistency:
        parts["swap_consistency"] = swap_consistency(verdicts, pairs)
    if config.grounding:
        parts["grounding"] = grounding(verdicts, texts, pairs)
    if config.format:
        parts["format"] = well_formed(verdicts)
    if config.length:
        parts["length"] = shortness(lengths, limit)
    weights = config.model_dump()
    found = {name: [weights[name] * one for one in part] for name, part in parts.items()}
    return found | ({"overlong": overlong(lengths, limit, buffer)} if buffer else {})
