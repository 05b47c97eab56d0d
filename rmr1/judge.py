"""Judging: pairs go to a model and come back as judgments; `Judge` is the short way.

`judge_pairs` is what evaluation and the benchmarks use. A prompt that the model skips, as it is too
long, becomes a judgment without a verdict that says why in `skipped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rmr1.answers import Answers, LocalModel, Progress, Reply
from rmr1.data import Kind, Label, Message, Pair, pair_from_row
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.weights import load_model
from rmr1.models import load_tokenizer, model_id, resolve_model
from rmr1.prompts import Prompt, load_prompt
from rmr1.verdict import parse_verdicts

Placement = Literal["ab", "ba"]
Answer = Literal["A", "B", "tie"]

BOTH_PLACEMENTS: tuple[Placement, ...] = ("ab", "ba")
_EXCHANGED: dict[Answer | None, Answer | None] = {"A": "B", "B": "A", "tie": "tie", None: None}


@dataclass(frozen=True, slots=True)
class Judgment:
    """One judgment of one pair in one placement, or (with `samples`) a vote over several.

    `label` and `verdict` name answers as they were shown: "A" is the answer shown first. In
    placement "ab" they are shown as they stand in the pair, in "ba" exchanged. A vote is always
    told in the pair's own order. `verdict` is None where none could be read (`format_error` says
    why) or nothing was generated (`skipped` says why). `label` is None where nobody knows it.
    """

    id: str
    source: str
    kind: Kind
    label: Label | None
    verdict: Answer | None
    placement: Placement = "ab"
    sample: int = 0
    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish_reason: Literal["stop", "length", ""] = ""
    format_error: str = ""
    skipped: str = ""
    samples: tuple[Judgment, ...] = ()

    @property
    def correct(self) -> bool:
        """Whether the verdict names the better answer; False without a verdict or a label."""
        return self.verdict is not None and self.verdict == self.label

    @property
    def pair_verdict(self) -> Answer | None:
        """The verdict in the pair's own order, whatever the placement."""
        return self.verdict if self.placement == "ab" else _EXCHANGED[self.verdict]

    @property
    def votes(self) -> dict[str, int]:
        """How many samples said "A", "B" and "tie" (pair's own order), and "unparsed"."""
        counts = Counter(one.pair_verdict or "unparsed" for one in self.samples or (self,))
        return {name: counts[name] for name in ("A", "B", "tie", "unparsed")}


def judge_pairs(
    model: Answers,
    pairs: Sequence[Pair],
    *,
    prompt: Prompt,
    sampling: SamplingParams,
    placements: Sequence[Placement] = ("ab",),
    progress: Progress | None = None,
) -> list[Judgment]:
    """Judge each pair in each placement: pairs x placements x samples judgments, in that order.

    `progress(done, total)` counts judgments, those of prompts that the model skips too.
    """
    places = placed(pairs, placements)
    chats = [prompt.render(pair) for pair, _ in places]
    return judgments_of(places, model.answer(chats, sampling, progress=progress))


def placed(pairs: Sequence[Pair], placements: Sequence[Placement]) -> list[tuple[Pair, Placement]]:
    """Each pair in each placement, as it is shown there."""
    return [
        (pair if placement == "ab" else pair.swapped(), placement)
        for pair in pairs
        for placement in placements
    ]


def judgments_of(
    places: Sequence[tuple[Pair, Placement]], replies: Sequence[Sequence[Reply]]
) -> list[Judgment]:
    """What a model replied about pairs as they were shown, read; [place][sample] in a row."""
    verdicts = iter(parse_verdicts([reply.text for samples in replies for reply in samples]))
    judgments = []
    for (pair, placement), samples in zip(places, replies, strict=True):
        for index, reply in enumerate(samples):
            verdict = next(verdicts)
            judgments.append(
                Judgment(
                    id=pair.id,
                    source=pair.source,
                    kind=pair.kind,
                    label=pair.label,
                    verdict=None if reply.skipped else verdict.answer,
                    placement=placement,
                    sample=index,
                    text=reply.text,
                    prompt_tokens=reply.prompt_tokens,
                    new_tokens=reply.new_tokens,
                    finish_reason=reply.finish_reason,
                    format_error="" if reply.skipped else verdict.error.name,
                    skipped=reply.skipped,
                )
            )
    return judgments


def majority(samples: Sequence[Judgment]) -> Judgment:
    """The vote of several judgments of one pair, told in the pair's own order.

    The answer with most votes wins; unparsed samples do not vote. Equal counts are a "tie": to
    break them by order would bring back the very position bias that judging both placements takes
    out. None when no sample could be read. The text is that of the first sample that has the
    winning verdict, among those in the pair's own order (else the first of these).
    """
    votes = Counter(one.pair_verdict for one in samples if one.verdict is not None)
    ranked = votes.most_common()
    verdict: Answer | None = None
    if ranked:
        level = len(ranked) > 1 and ranked[0][1] == ranked[1][1]
        verdict = "tie" if level else ranked[0][0]
    own_order = [one for one in samples if one.placement == "ab"]
    spokesman = next(
        (one for one in own_order if one.verdict == verdict), (own_order or list(samples))[0]
    )
    if len(samples) == 1 and spokesman.placement == "ab":
        return spokesman
    label = spokesman.label
    if spokesman.placement == "ba" and label is not None:
        label = "B" if label == "A" else "A"
    return replace(
        spokesman,
        label=label,
        verdict=verdict,
        placement="ab",
        sample=0,
        new_tokens=sum(one.new_tokens for one in samples),
        samples=tuple(samples),
    )


class Judge:
    """A model that compares two answers.

        judge = rmr1.Judge("runs/demo/rlvr/checkpoints/step-000018", style="compact")
        judge.compare("What is 2 + 2?", "4", "5").verdict     # "A", "B", "tie" or None

    The model is a Hugging Face directory, or a name that rmr1/models.py knows ("pocket"). `style`
    is the prompt it was trained with: a name, a .jinja file, or a `Prompt` (see rmr1/prompts.py).
    One vote is greedy; several are sampled at `temperature`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        style: str | Prompt = "rubric",
        dtype: str = "float32",
        device: str = "cpu",
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Load the model once.

        `max_new_tokens=None` allows 1,024 tokens, or half of the model's positions where that is
        less; `max_prompt_tokens=None` takes what the positions leave beside the answer.
        """
        directory = resolve_model(model_dir)
        self.name, self.dtype = model_id(directory), dtype
        self.tokenizer = load_tokenizer(directory)
        model = load_model(directory, dtype=dtype, device=device)
        self.prompt = load_prompt(style) if isinstance(style, str) else style
        if max_new_tokens is None:
            max_new_tokens = min(1024, model.config.max_position_embeddings // 2)
        if max_prompt_tokens is None:
            max_prompt_tokens = prompt_room(model.config.max_position_embeddings, max_new_tokens)
        self.generator = Generator(model, self.tokenizer)
        self.model = LocalModel(self.generator, self.tokenizer, max_prompt_tokens)
        self.greedy = SamplingParams(n=1, temperature=0.0, max_new_tokens=max_new_tokens)
        self.sampled = replace(self.greedy, temperature=temperature, top_p=top_p, seed=seed)

    def compare(
        self,
        prompt: str | Sequence[Message],
        answer_a: str,
        answer_b: str,
        *,
        votes: int = 1,
        swap: bool = False,
    ) -> Judgment:
        """Judge two answers to a prompt (a text, or messages that end with a user turn).

        `votes` samples are judged and the majority wins; `swap` judges as many again with the
        answers exchanged. Equal counts give "tie" (see `majority`). The verdict is always in the
        order of the arguments; `samples` holds the single judgments. ValueError when an argument
        is malformed or the prompt is too long for the model.
        """
        pair = pair_of(prompt, answer_a, answer_b)
        return self.compare_all([pair], votes=votes, swap=swap)[0]

    def compare_all(
        self,
        pairs: Sequence[Pair],
        *,
        votes: int = 1,
        swap: bool = False,
        progress: Progress | None = None,
    ) -> list[Judgment]:
        """`compare` for many pairs at once (see `pair_of`), in their order.

        Raises:
            ValueError: a prompt is too long for the model.
        """
        judgments = judge_pairs(
            self.model,
            pairs,
            prompt=self.prompt,
            sampling=self.sampling(votes),
            placements=placements_of(swap=swap),
            progress=progress,
        )
        each = len(judgments) // max(1, len(pairs))
        return [vote(judgments[at : at + each]) for at in range(0, len(judgments), each or 1)]

    def making(self, *, votes: int = 1, swap: bool = False) -> dict[str, Any]:
        """What makes a judgment: other values may make another. The seed is that of votes."""
        sampling = self.sampling(votes)
        return {
            "model": self.name,
            "dtype": self.dtype,
            "prompt_hash": self.prompt.hash,
            "max_new_tokens": sampling.max_new_tokens,
            "samples": sampling.n,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "swap": swap,
        }

    def sampling(self, votes: int) -> SamplingParams:
        """Greedy for one vote, sampled for several."""
        if votes < 1:
            raise ValueError(f"argument votes must be at least 1, got {votes}")
        return self.greedy if votes == 1 else replace(self.sampled, n=votes)


def placements_of(*, swap: bool) -> Sequence[Placement]:
    """One placement, or both."""
    return BOTH_PLACEMENTS if swap else ("ab",)


def pair_of(prompt: str | Sequence[Message], answer_a: str, answer_b: str) -> Pair:
    """A pair whose better answer nobody knows; ValueError names what is malformed.

    Its label is a stand-in, which no template shows and `vote` takes out.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("argument prompt must not be empty")
        prompt = [{"role": "user", "content": prompt}]
    return pair_from_row(
        {
            "id": "compare",
            "source": "compare",
            "conversation": list(prompt),
            "answer_a": answer_a,
            "answer_b": answer_b,
            "label": "A",
            "kind": "chat",
        }
    )


def vote(judgments: Sequence[Judgment]) -> Judgment:
    """The majority of one pair's judgments, without a label; ValueError if nothing was judged."""
    skipped = [one for one in judgments if one.skipped]
    if skipped:
        longest = max(one.prompt_tokens for one in judgments)
        raise ValueError(
            f"the prompt has {longest} tokens, more than this judge takes ({skipped[0].skipped});"
            " shorten the answers, or lower max_new_tokens"
        )
    return majority([replace(one, label=None) for one in judgments])


def prompt_room(max_positions: int, max_new_tokens: int) -> int:
    """The longest prompt that leaves `max_new_tokens` positions for the answer."""
    if max_new_tokens >= max_positions:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, but the model has only {max_positions}"
            " positions for prompt and answer together; lower max_new_tokens"
        )
    return max_positions - max_new_tokens
