"""What a judgment says, taken apart for people and programs: rubric, solution, quotes, votes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rmr1.data import Pair
from rmr1.judge import Judgment
from rmr1.rewards import quoted
from rmr1.verdict import Span, parse_verdict


@dataclass(frozen=True, slots=True)
class Criterion:
    """An item of the rubric; `weight` is a fraction of 1, or None where none is said."""

    text: str
    weight: float | None


@dataclass(frozen=True, slots=True)
class Quote:
    """Words that the judge says are an answer's; `found`: they do stand there."""

    answer: Literal["A", "B"]
    text: str
    found: bool


@dataclass(frozen=True, slots=True)
class JudgmentView:
    """The parts of one judgment's text. "A" is the answer that was shown first."""

    task_type: Literal["chat", "reasoning"] | None
    rubric: tuple[Criterion, ...]
    justification: str
    solution: str
    evaluation: str
    quotes: tuple[Quote, ...]


def view(text: str, shown: Pair) -> JudgmentView:
    """Take a judgment apart; `shown` is the pair in the order in which it was judged."""
    verdict = parse_verdict(text)

    def words(span: Span | None) -> str:
        return "" if span is None else text[span.start : span.end].strip()

    sides: tuple[tuple[Literal["A", "B"], tuple[Span, ...], str], ...] = (
        ("A", verdict.quotes_a, shown.answer_a),
        ("B", verdict.quotes_b, shown.answer_b),
    )
    return JudgmentView(
        task_type=verdict.task_type,
        rubric=tuple(Criterion(words(one.span), one.weight) for one in verdict.rubric_items),
        justification=words(verdict.justify),
        solution=words(verdict.solution),
        evaluation=words(verdict.evaluation),
        quotes=tuple(
            Quote(side, words(span), quoted(text, span, answer))
            for side, spans, answer in sides
            for span in spans
        ),
    )


def to_json(found: Judgment, pair: Pair) -> dict[str, Any]:
    """A verdict (or vote) on a pair with everything that led to it.

    `verdict` and `votes` are in the pair's own order; each of `judgments` is in the order in which
    it was shown (`placement`: "ab" as in the pair, "ba" exchanged). `usage` counts the tokens of
    each prompt once, however many judgments were drawn for it, and those of every judgment.
    """
    single = found.samples or (found,)
    first = view(found.text, pair)
    prompts = {one.placement: one.prompt_tokens for one in single}
    return {
        "verdict": found.verdict,
        "votes": found.votes,
        "task_type": first.task_type,
        "rubric": [asdict(one) for one in first.rubric],
        "justification": first.justification,
        "solution": first.solution,
        "quotes": [asdict(one) for one in first.quotes],
        "text": found.text,
        "judgments": [
            {
                "placement": one.placement,
                "verdict": one.verdict,
                "text": one.text,
                "format_error": one.format_error,
                "finish_reason": one.finish_reason,
                "prompt_tokens": one.prompt_tokens,
                "new_tokens": one.new_tokens,
            }
            for one in single
        ],
        "usage": {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": sum(one.new_tokens for one in single),
        },
    }
