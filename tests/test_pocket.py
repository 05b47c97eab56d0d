"""The pocket model: what it is made from, its tokenizer, and the directory that is shipped."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmr1 import pocket
from rmr1.answers import LocalModel
from rmr1.engine.generator import SamplingParams
from rmr1.evaluate import Evaluation, evaluate_pairs
from rmr1.models import POCKET, load_tokenizer
from rmr1.prompts import encode, load_prompt
from rmr1.tasks.catalog import FAMILIES, draw_pairs
from rmr1.tasks.family import split_of
from rmr1.verdict import parse_verdicts


@cache
def tasks() -> tuple[pocket.Drawn, ...]:
    return tuple(islice(pocket.drawn_tasks(0), 2000))


def test_tasks_are_of_the_training_split_in_turn_and_seeded() -> None:
    for number, task in enumerate(tasks()):
        family = pocket.TURNS[number % len(pocket.TURNS)]
        assert task.pair.source == f"tasks/{family.name}"
        assert split_of(family.name, task.item.params) == "train"
    assert tuple(islice(pocket.drawn_tasks(0), 50)) == tasks()[:50]
    assert tuple(islice(pocket.drawn_tasks(1), 50)) != tasks()[:50]


def test_judgments_keep_the_format_and_take_sides_at_random() -> None:
    verdicts = parse_verdicts([task.judgment for task in tasks()])
    assert all(verdict.well_formed for verdict in verdicts)
    for kind in ("chat", "reasoning"):
        for label in "AB":
            said = [
                verdict.answer
                for verdict, task in zip(verdicts, tasks(), strict=True)
                if task.pair.kind == kind and task.pair.label == label
            ]
            # The same for both labels: the verdict knows nothing of the label.
            four_errors = 4 * (pocket.A_SHARE * (1 - pocket.A_SHARE) / len(said)) ** 0.5
            assert abs(said.count("A") / len(said) - pocket.A_SHARE) < four_errors, (kind, label)


def test_judgments_quote_the_answers_and_solve_the_task() -> None:
    for task, verdict in zip(tasks(), parse_verdicts([t.judgment for t in tasks()]), strict=True):
        text = task.judgment
        for spans, answer in (
            (verdict.quotes_a, task.pair.answer_a),
            (verdict.quotes_b, task.pair.answer_b),
        ):
            assert [text[span.start : span.end] in answer for span in spans] == [True]
        if task.pair.kind == "reasoning":
            assert verdict.solution is not None
            assert text[verdict.solution.start : verdict.solution.end] == task.item.solution


def test_the_notes_are_true_whatever_the_verdict() -> None:
    """Notes say of each answer what holds for it, so that only the verdict is left to learn."""
    for task, verdict in zip(tasks(), parse_verdicts([t.judgment for t in tasks()]), strict=True):
        (a,), (b,) = verdict.summaries_a, verdict.summaries_b
        chosen, rejected = (a, b) if task.pair.label == "A" else (b, a)
        text = task.judgment
        assert text[chosen.start : chosen.end] == task.item.chosen_note
        assert text[rejected.start : rejected.end] == task.item.rejected_note


# --- The tokenizer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pocket.train_tokenizer(tasks()[:400])


def test_words_tags_and_passages_are_one_token_each(tokenizer: Any) -> None:
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert len(tokenizer) <= pocket.VOCABULARY == pocket.MODEL["vocab_size"]
    for text in (*pocket.PASSAGES, *pocket.MARKERS, "<answer>", "</quote_B>"):
        assert count(text) == 1, text
    assert count("2048") == 4  # digits stand alone
    assert count("qzxv") == 4  # a word nobody has seen, letter by letter
    (end,) = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    assert end == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, end)


@settings(max_examples=60, deadline=None)
@given(
    st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from("🙂👩‍🔬日本語  \n\n\t'<>[]/|1203 the a"),
        ),
        max_size=60,
    )
)
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < pocket.VOCABULARY for token in ids)


def test_tasks_come_back_and_fit_the_model(tokenizer: Any) -> None:
    for pair in draw_pairs(3 * len(FAMILIES), seed=0, split="heldout"):
        (message,) = load_prompt("compact").render(pair)
        prompt = encode(tokenizer, [message])
        assert tokenizer.decode(prompt) == f"<|user|>{message['content']}<|end|><|assistant|>"
        trace = tokenizer(pair.trace, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(trace) == pair.trace
        assert len(prompt) + len(trace) < pocket.MODEL["max_position_embeddings"]


# --- The directory in the package ----------------------------------------------------------------

shipped = pytest.mark.skipif(
    not (POCKET / "model.safetensors").is_file(),
    reason="rmr1/pocket is not there yet; `python -m rmr1.pocket --output rmr1/pocket` makes it",
)


def sampled_judgments(directory: Path) -> Evaluation:
    """102 held-out pairs in both placements, sampled as the demo samples them."""
    from rmr1.engine.generator import Generator
    from rmr1.engine.weights import load_model

    tokenizer = load_tokenizer(directory)
    return evaluate_pairs(
        LocalModel(Generator(load_model(directory), tokenizer), tokenizer, 768),
        draw_pairs(102, seed=0, split="heldout"),
        prompt=load_prompt("compact"),
        sampling=SamplingParams(temperature=1.0, max_new_tokens=192, seed=0),
    )


@shipped
def test_the_shipped_directory_is_small_and_plain() -> None:
    names = {path.name for path in POCKET.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py"))}
    assert sum(path.stat().st_size for path in POCKET.iterdir()) <= 8_000_000


@shipped
def test_the_shipped_model_is_the_one_that_the_code_describes() -> None:
    from rmr1.engine.weights import load_model

    model, tokenizer = load_model(POCKET), load_tokenizer(POCKET)
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 3e6
    written = model.config.to_dict()
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "attention_bias"):
        assert written[key] == pocket.MODEL[key], key
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.chat_template == pocket.CHAT_TEMPLATE
    for text in (*pocket.PASSAGES, *pocket.MARKERS):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


@shipped
def test_transformers_reads_the_shipped_directory_alike() -> None:
    """Model and tokenizer: AutoTokenizer goes by the model's type and may pick another one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rmr1.engine.attention import PackedAttention
    from rmr1.engine.weights import load_model

    pair = draw_pairs(1, seed=0, split="heldout")[0]
    text = load_prompt("compact").render(pair)[-1]["content"] + (pair.trace or "")
    ids = load_tokenizer(POCKET)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(POCKET)(text)["input_ids"] == ids
    assert load_tokenizer(POCKET).decode(ids) == text
    theirs = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    ours = load_model(POCKET)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        want = theirs(tokens[None]).logits[0]
        hidden = ours(tokens, torch.arange(len(ids)), PackedAttention((len(ids),)))
        got = hidden @ ours.lm_head_weight.T
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@shipped
def test_the_shipped_model_keeps_to_the_format_and_judges_at_chance() -> None:
    found = sampled_judgments(POCKET)
    assert found.figures.parse_rate >= 0.95
    # 204 judgments: three standard errors about the coin it was taught.
    assert found.figures.accuracy_parsed is not None
    assert abs(found.figures.accuracy_parsed - 0.5) < 0.105
    assert found.position_bias is not None
    assert abs(found.position_bias - pocket.A_SHARE) < 0.105


@pytest.mark.slow
def test_pretraining_makes_a_directory_that_loads_and_goes_on(tmp_path: Path) -> None:
    from rmr1.engine.weights import load_model

    losses: list[list[float]] = []
    for number in (0, 1):
        rows: list[float] = []
        directory = pocket.pretrain(
            tmp_path / "pocket",
            number=number,
            steps=20,
            learning_rate=1e-3,
            on_step=lambda step, total, row, rows=rows: rows.append(row["loss"]),
        )
        assert len(rows) == 20
        losses.append(rows)
    assert losses[0][-1] < losses[0][0] - 1
    assert losses[1][0] < losses[0][0] - 1  # round 1 starts where round 0 ended
    model = load_model(directory)
    assert model.config.vocab_size == pocket.VOCABULARY
    assert load_tokenizer(directory).eos_token == "<|end|>"
