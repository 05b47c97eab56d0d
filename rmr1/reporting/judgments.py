"""Judgments marked up for the report: sections, rubric items, quotes and verdict.

A judgment is cut at the spans of `parse_verdict`. The tags around a recognised section give way
to its label; everything else stays as the model wrote it. A quote is looked up in the answer it
claims to come from: found ones are numbered and highlighted on both sides, others are marked as
absent. Every text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from markupsafe import Markup, escape

from rmr1.data import Pair
from rmr1.terminal import STAGES
from rmr1.verdict import Span, Verdict, parse_verdict

# How many judgments the report shows, and in what order stages are asked for one.
SHOWN = 12
STAGE_TURNS = ("rl", "distilled", "rl", "base")

_TAG = re.compile(r"</?[A-Za-z_]{1,20}>")
_OPENING = re.compile(r"<[A-Za-z_]{1,20}>\s*\Z")
_CLOSING = re.compile(r"\s*</[A-Za-z_]{1,20}>")
_QUOTATION_MARKS = ('""', "''", "“”", "‘’", "«»", "``")


@dataclass(frozen=True, slots=True)
class Sample:
    """One judgment of a run: what was asked, what the model wrote and what was read from it.

    `label` is the better side as it was placed in this prompt; `verdict` is None if unparsed.
    """

    stage: str
    pair: Pair
    text: str
    verdict: str | None
    label: str

    @property
    def right(self) -> bool:
        """Whether the verdict names the better answer."""
        return self.verdict == self.label


class Piece(NamedTuple):
    """A stretch of the judgment with its style and label; a rubric item has a weight of 1."""

    start: int
    end: int
    style: str
    label: str
    block: bool
    weight: float | None = None


def pick_samples(samples: Sequence[Sample], count: int = SHOWN) -> list[Sample]:
    """About a dozen judgments: right and wrong in turn, of all stages, of many sources.

    The choice depends on the samples only. Stages without samples leave their turns to others.
    """
    left = list(samples)
    chosen: list[Sample] = []
    while left and len(chosen) < count:
        stage = STAGE_TURNS[len(chosen) % len(STAGE_TURNS)]
        best = min(left, key=partial(_unfitness, stage=stage, chosen=chosen))
        left.remove(best)
        chosen.append(best)
    order = list(STAGE_TURNS)
    return sorted(
        chosen,
        key=lambda one: (order.index(one.stage) if one.stage in order else 9, not one.right),
    )


def _unfitness(one: Sample, stage: str, chosen: Sequence[Sample]) -> tuple[int, ...]:
    """How badly a sample fits the next turn: stage, then outcome, then a source seen before."""
    had = [other for other in chosen if other.stage == stage]
    want_right = len(had) % 2 == 0
    return (
        # Judgments of an evaluation go before those of a training step.
        (one.stage != stage) + (one.stage not in STAGES),
        one.right != want_right,
        # One unparsed judgment of a stage shows what there is to see.
        one.verdict is None and any(other.verdict is None for other in had),
        sum(other.pair.source == one.pair.source for other in chosen),
        sum(other.pair.id == one.pair.id for other in chosen),
    )


def find_quote(quote: str, answer: str) -> tuple[int, int] | None:
    """Where a quote occurs word for word in an answer, quotation marks around it left aside."""
    candidates = [quote.strip()]
    bare = candidates[0]
    if len(bare) > 2 and any(bare[0] == m[0] and bare[-1] == m[1] for m in _QUOTATION_MARKS):
        candidates.append(bare[1:-1].strip())
    for text in candidates:
        start = answer.find(text) if text else -1
        if start >= 0:
            return start, start + len(text)
    return None


def mark_answer(answer: str, found: Iterable[tuple[int, int, int]]) -> Markup:
    """The answer with its quoted stretches (start, end, number) highlighted and numbered."""
    parts: list[Markup] = []
    at = 0
    for start, end, number in sorted(found):
        if start < at:  # Overlaps an earlier quote: the longer reach is kept in that one's mark.
            continue
        parts.append(escape(answer[at:start]))
        parts.append(Markup("<mark>{}<sup>{}</sup></mark>").format(answer[start:end], number))
        at = end
    parts.append(escape(answer[at:]))
    return Markup("").join(parts)


def _plain(text: str) -> Markup:
    """Text outside the sections; tags that belong to none are dimmed."""
    parts: list[Markup] = []
    at = 0
    for tag in _TAG.finditer(text):
        parts.append(escape(text[at : tag.start()]))
        parts.append(Markup('<span class="tag">{}</span>').format(tag.group()))
        at = tag.end()
    parts.append(escape(text[at:]))
    return Markup("").join(parts)


def _quote_pieces(
    text: str, side: str, spans: Iterable[Span], answer: str
) -> tuple[list[Piece], list[tuple[int, int, int]]]:
    """Pieces for the quotes of one side, and (start, end, number) of the found ones."""
    pieces: list[Piece] = []
    found: list[tuple[int, int, int]] = []
    for span in spans:
        place = find_quote(text[span.start : span.end], answer)
        if place is None:
            pieces.append(Piece(span.start, span.end, "quote absent", f"not in {side}", False))
            continue
        number = len(found) + 1
        found.append((*place, number))
        pieces.append(Piece(span.start, span.end, "quote", f"quotes {side} {number}", False))
    return pieces, found


def _section_pieces(verdict: Verdict) -> list[Piece]:
    """Pieces for every recognised section but the quotes."""
    pieces = []
    for style, label, span in (
        ("solution", "Own solution", verdict.solution),
        ("rubric", "Rubric", verdict.rubric),
        ("justify", "Why this rubric", verdict.justify),
        ("evaluation", "Evaluation", verdict.evaluation),
        ("answer", "Verdict", verdict.answer_span),
    ):
        if span is not None:
            pieces.append(Piece(span.start, span.end, style, label, True))
    for item in verdict.rubric_items:
        pieces.append(Piece(item.span.start, item.span.end, "item", "", False, item.weight))
    for side, spans in (("A", verdict.summaries_a), ("B", verdict.summaries_b)):
        pieces += [Piece(span.start, span.end, "summary", f"on {side}", False) for span in spans]
    return pieces


def _with_tags(text: str, piece: Piece) -> tuple[int, int]:
    """The stretch that a piece replaces: its content and the tags right around it."""
    if piece.style == "item":
        return piece.start, piece.end
    opening = _OPENING.search(text, max(0, piece.start - 40), piece.start)
    closing = _CLOSING.match(text, piece.end)
    return (
        opening.start() if opening else piece.start,
        closing.end() if closing and closing.end() - piece.end < 40 else piece.end,
    )


def _render(text: str, start: int, end: int, pieces: Sequence[Piece]) -> Markup:
    """text[start:end] with `pieces` marked; a piece inside another is rendered within it."""
    parts: list[Markup] = []
    at = start
    for piece in pieces:
        # Within an earlier sibling, or across a bound: sections of malformed texts may overlap,
        # and losing a mark is better than losing text.
        if piece.start < at or piece.end > end or piece.start >= piece.end:
            continue
        outer_start, outer_end = _with_tags(text, piece)
        outer_start, outer_end = max(at, outer_start), min(end, outer_end)
        between = text[at:outer_start]
        # A block stands on lines of its own, so the spaces around it would be empty lines.
        parts.append(_plain(between.strip("\n") if piece.block else between))
        inner = [one for one in pieces if one is not piece and _inside(one, piece)]
        parts.append(_mark(text, piece, inner))
        at = outer_end
        if piece.block:
            at += len(text[at:end]) - len(text[at:end].lstrip("\n"))
    parts.append(_plain(text[at:end]))
    return Markup("").join(parts)


def _mark(text: str, piece: Piece, inner: Sequence[Piece]) -> Markup:
    """One piece as an element with its label, its weight and what lies inside it."""
    start, end = piece.start, piece.end
    if piece.block:
        content = text[start:end]
        start += len(content) - len(content.lstrip())
        end = max(start, end - len(content) + len(content.rstrip()))
    body = _render(text, start, end, [one for one in inner if one.start >= start])
    tag = "div" if piece.block else "span"
    label: Markup | str = ""
    if piece.label:
        label = Markup('<span class="label">{}</span>').format(piece.label)
    if piece.weight is not None:
        share = min(max(100 * piece.weight, 0.0), 100.0)
        body += Markup('<i class="weight" title="weight {:.0f} %" style="--v:{:.1f}"></i>').format(
            share, share
        )
    return Markup('<{} class="{}">{}{}</{}>').format(tag, piece.style, label, body, tag)


def _inside(inner: Piece, outer: Piece) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def mark_judgment(sample: Sample) -> dict[str, object]:
    """What the template shows of a sample: both answers, the judgment, the outcome in words."""
    verdict = parse_verdict(sample.text)
    pair = sample.pair
    quotes_a, found_a = _quote_pieces(sample.text, "A", verdict.quotes_a, pair.answer_a)
    quotes_b, found_b = _quote_pieces(sample.text, "B", verdict.quotes_b, pair.answer_b)
    pieces = sorted(
        [*_section_pieces(verdict), *quotes_a, *quotes_b], key=lambda p: (p.start, -p.end)
    )
    outcome = "right" if sample.right else "unparsed" if sample.verdict is None else "wrong"
    quotes = len(quotes_a) + len(quotes_b)
    return {
        "sample": sample,
        "outcome": outcome,
        "answers": [
            ("A", mark_answer(pair.answer_a, found_a), sample.label == "A"),
            ("B", mark_answer(pair.answer_b, found_b), sample.label == "B"),
        ],
        "judgment": _render(sample.text, 0, len(sample.text), pieces),
        "fault": "" if verdict.well_formed else verdict.error.name.lower().replace("_", " "),
        "quotes": quotes,
        "quotes_found": len(found_a) + len(found_b),
    }
