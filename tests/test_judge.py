"""Judging: order, placements, limits and votes with a fake generator, then a real tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rmr1.answers import LocalModel
from rmr1.data import Pair
from rmr1.engine.generator import Rollout, SamplingParams
from rmr1.judge import Judge, Judgment, judge_pairs, majority, prompt_room
from rmr1.prompts import load_prompt

GREEDY = SamplingParams(n=1, temperature=0.0, max_new_tokens=16)
CHAT = "<type>Chat</type><rubric>1. x (100%)<justify>y</justify></rubric><eval>z</eval>"


class FakeTokenizer:
    """One token a character; the chat template is the contents, one under the other."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: list[dict], **_options: Any) -> str:
        return "\n".join(message["content"] for message in messages)

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_options: Any
    ) -> dict[str, list[int]]:
        assert not add_special_tokens  # the template has written them: no second BOS
        return {"input_ids": [ord(letter) for letter in text]}


@dataclass
class FakeGenerator:
    """Answers with `judge(prompt text, sample index)`; keeps what it was asked."""

    judge: Callable[[str, int], str]
    calls: list[tuple[list[list[int]], SamplingParams]] = field(default_factory=list)

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        self.calls.append((prompts, params))
        answers = []
        for ids in prompts:
            prompt = "".join(map(chr, ids))
            texts = [self.judge(prompt, sample) for sample in range(params.n)]
            answers.append([Rollout([1, 2, 3], [0.0] * 3, text, "stop") for text in texts])
            if progress is not None:
                progress(params.n, 3 * params.n)
        return answers


def says(verdict: str) -> str:
    return f"{CHAT}<answer>[[{verdict}]]</answer>"


def prefers(word: str) -> Callable[[str, int], str]:
    """A judge that looks at the answers: the one that holds `word` wins."""

    def judge(prompt: str, _sample: int) -> str:
        after_a = prompt.split("[Answer A]", 1)[1]
        return says("A" if word in after_a.split("[Answer B]", 1)[0] else "B")

    return judge


def pair(name: str = "p", good: str = "good", bad: str = "bad", question: str = "Why?") -> Pair:
    return Pair(name, "tasks/x", ({"role": "user", "content": question},), good, bad, "A", "chat")


def judged(generator: FakeGenerator, pairs: list[Pair], **options: Any) -> list[Judgment]:
    options = {"prompt": load_prompt("compact"), "sampling": GREEDY} | options
    model = LocalModel(generator, FakeTokenizer(), options.pop("max_prompt_tokens", None))
    return judge_pairs(model, pairs, **options)


def test_order_is_pairs_by_placements_by_samples() -> None:
    generator = FakeGenerator(prefers("good"))
    found = judged(
        generator,
        [pair("p"), pair("q").swapped()],
        placements=("ab", "ba"),
        sampling=SamplingParams(n=2, temperature=1.0, max_new_tokens=16),
    )
    assert [(one.id, one.placement, one.sample) for one in found] == [
        ("p", "ab", 0), ("p", "ab", 1), ("p", "ba", 0), ("p", "ba", 1),
        ("q", "ab", 0), ("q", "ab", 1), ("q", "ba", 0), ("q", "ba", 1),
    ]  # fmt: skip
    # Labels and verdicts name answers as shown; this judge is right in every placement.
    assert [one.label for one in found] == ["A", "A", "B", "B", "B", "B", "A", "A"]
    assert all(one.correct for one in found)
    assert [one.pair_verdict for one in found] == ["A"] * 4 + ["B"] * 4
    assert len(generator.calls) == 1  # one call: the generator batches


def test_a_record_holds_what_was_said() -> None:
    texts = iter([says("B"), "no verdict at all"])
    generator = FakeGenerator(lambda _prompt, _sample: next(texts))
    wrong, unread = judged(generator, [pair("p"), pair("q")])
    assert (wrong.verdict, wrong.correct, wrong.text) == ("B", False, says("B"))
    assert wrong.format_error == "OK"
    assert wrong.new_tokens == 3
    assert wrong.finish_reason == "stop"
    assert wrong.prompt_tokens == len(generator.calls[0][0][0])
    assert (unread.verdict, unread.correct) == (None, False)
    assert unread.format_error == "NO_TYPE"


def test_a_long_prompt_is_counted_and_never_cut() -> None:
    generator = FakeGenerator(prefers("good"))
    short, long = pair("short"), pair("long", bad="bad " * 400)
    limit = 400
    done: list[tuple[int, int]] = []
    found = judged(
        generator,
        [long, short],
        max_prompt_tokens=limit,
        progress=lambda now, total: done.append((now, total)),
    )
    assert [one.skipped for one in found] == ["prompt_too_long", ""]
    assert found[0].verdict is None
    assert found[0].prompt_tokens > 1600  # the full length is told
    assert [len(ids) for ids in generator.calls[0][0]] == [found[1].prompt_tokens]
    assert done == [(1, 2), (2, 2)]
    # A prompt of just the limit is judged.
    exact = judged(generator, [short], max_prompt_tokens=found[1].prompt_tokens)
    assert exact[0].skipped == ""


def test_nothing_to_generate_asks_nothing() -> None:
    generator = FakeGenerator(prefers("good"))
    assert judged(generator, []) == []
    assert judged(generator, [pair()], max_prompt_tokens=3)[0].skipped == "prompt_too_long"
    assert generator.calls == []


def votes_of(*told: tuple[str, str | None]) -> list[Judgment]:
    return [
        Judgment("p", "s", "chat", None, verdict, placement, index, text=f"text {index}")  # type: ignore[arg-type]
        for index, (placement, verdict) in enumerate(told)
    ]


def test_majority_is_told_in_the_pairs_own_order() -> None:
    # Two say A where the pair stands as it is; one says A of the exchanged pair, which is B.
    vote = majority(votes_of(("ab", "B"), ("ab", "A"), ("ab", "A"), ("ba", "A")))
    assert vote.votes == {"A": 2, "B": 2, "tie": 0, "unparsed": 0}
    assert vote.verdict == "tie"  # equal counts are never broken by order
    vote = majority(votes_of(("ab", "B"), ("ab", "A"), ("ba", "B"), ("ba", None)))
    assert vote.votes == {"A": 2, "B": 1, "tie": 0, "unparsed": 1}
    assert (vote.verdict, vote.placement, vote.text) == ("A", "ab", "text 1")
    assert len(vote.samples) == 4
    assert majority(votes_of(("ab", None), ("ba", None))).verdict is None
    # Only exchanged samples: the verdict is still in the pair's own order.
    assert majority(votes_of(("ba", "A"))).verdict == "B"
    single = votes_of(("ab", "A"))[0]
    assert majority([single]) is single


def test_prompt_room() -> None:
    assert prompt_room(2048, 512) == 1536
    with pytest.raises(ValueError, match="only 512 positions"):
        prompt_room(512, 512)


def judge_with(generator: FakeGenerator, **options: Any) -> Judge:
    """A Judge without a model directory."""
    judge = Judge.__new__(Judge)
    judge.model = LocalModel(generator, FakeTokenizer(), options.get("max_prompt_tokens"))
    judge.prompt = load_prompt("compact")
    judge.greedy = GREEDY
    judge.sampled = SamplingParams(temperature=0.7, max_new_tokens=16, seed=3)
    return judge


def test_compare_greedy_votes_and_swap() -> None:
    generator = FakeGenerator(prefers("good"))
    judge = judge_with(generator)
    one = judge.compare("Why?", "bad", "good")
    assert (one.verdict, one.label, one.samples) == ("B", None, ())
    assert generator.calls[-1][1].temperature == 0.0
    many = judge.compare([{"role": "user", "content": "Why?"}], "bad", "good", votes=3, swap=True)
    assert many.verdict == "B"
    assert many.votes == {"A": 0, "B": 6, "tie": 0, "unparsed": 0}
    prompts, params = generator.calls[-1]
    assert (len(prompts), params.n, params.temperature) == (2, 3, 0.7)


def test_compare_swap_exposes_a_judge_that_goes_by_position() -> None:
    judge = judge_with(FakeGenerator(lambda _prompt, _sample: says("A")))
    assert judge.compare("Why?", "good", "bad").verdict == "A"
    assert judge.compare("Why?", "good", "bad", swap=True).verdict == "tie"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Why?", "", "b"), 'field "answer_a"'),
        (("Why?", "a", 3), 'field "answer_b"'),
        (("  ", "a", "b"), "argument prompt must not be empty"),
        (([{"role": "assistant", "content": "x"}], "a", "b"), "end with a user turn"),
        (([], "a", "b"), "conversation"),
    ],
)
def test_compare_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    judge = judge_with(FakeGenerator(prefers("good")))
    with pytest.raises(ValueError, match=message):
        judge.compare(*arguments)


def test_compare_refuses_what_it_cannot_judge() -> None:
    judge = judge_with(FakeGenerator(prefers("good")), max_prompt_tokens=20)
    with pytest.raises(ValueError, match="more than this judge takes"):
        judge.compare("Why?", "good", "bad")
    with pytest.raises(ValueError, match="votes must be at least 1"):
        judge.compare("Why?", "good", "bad", votes=0)


def tiny_model(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, as a Hugging Face directory."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<|end|>", *letters])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_real_model_end_to_end(tmp_path: Path) -> None:
    judge = Judge(tiny_model(tmp_path / "model"), style="compact", max_new_tokens=12, seed=1)
    assert judge.model.max_prompt_tokens == 1024 - 12
    first = judge.compare("What is 2 + 2?", "4", "5")
    assert first == judge.compare("What is 2 + 2?", "4", "5")  # greedy: the same again
    assert first.verdict is None  # a random model keeps no format
    assert first.format_error not in ("", "OK")
    assert 0 < first.new_tokens <= 12
    many = judge.compare("What is 2 + 2?", "4", "5", votes=3, swap=True)
    assert many.votes["unparsed"] == 6
    assert len({one.text for one in many.samples}) > 1  # samples differ
    assert many == judge.compare("What is 2 + 2?", "4", "5", votes=3, swap=True)  # seeded
    with pytest.raises(ValueError, match="2088 tokens, more than this judge takes"):
        judge.compare("What?", "x" * 2000, "y")
