"""Our rewards as TRL, verl and OpenRLHF call them; TRL really does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rmr1.data import Pair
from rmr1.models import POCKET
from rmr1.prompts import load_prompt
from rmr1.reward_adapters import compute_score, reward_func, trl_reward
from rmr1.tasks.catalog import draw_pairs

QUOTING = "<eval><quote_A>The Nile is long.</quote_A></eval><answer>[[A]]</answer>"
B = "<answer>[[B]]</answer>"


def test_trl_gives_texts_or_messages() -> None:
    reward = trl_reward()
    assert reward([QUOTING, B, "?"], label=["A", "A", "B"], prompts=["x"] * 3) == [1, -1, -1]
    turn = [{"role": "assistant", "content": B}]
    assert reward(completions=[turn], label=["B"]) == [1]


def test_trl_columns_of_other_parts() -> None:
    columns: dict[str, Any] = {"answer_a": ["The Nile is long."] * 2, "answer_b": ["No."] * 2}
    reward = trl_reward(grounding=0.5, length=1.0, max_completion_length=10)
    found = reward([QUOTING, B], label=["A", "B"], completion_ids=[[1] * 5, [1]], **columns)
    assert found == [1 + 0.5 - 0.5, 1 - 0.1]
    both = trl_reward(swap_consistency=1.0)
    assert both([QUOTING, B], label=["A", "B"], id=["p", "p"]) == [2, 2]
    with pytest.raises(ValueError, match="needs answer_a, answer_b with each judgment"):
        reward([B], label=["B"], completion_ids=[[1]])
    with pytest.raises(ValueError, match="length needs completion_ids"):
        reward([B], label=["B"], answer_a=["a"], answer_b=["b"])
    with pytest.raises(ValueError, match="needs id with each judgment"):
        both([B], label=["B"])


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"style": 1.0}, "reward weight 'style': Extra inputs .*known are correctness, swap"),
        ({"grounding": -1.0}, "reward weight 'grounding'"),
        ({"length": 1.0}, "needs the cap"),
    ],
)
def test_weights_that_cannot_be_meant(weights: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        trl_reward(**weights)


def test_labels_that_are_none() -> None:
    with pytest.raises(ValueError, match='must be "A" or "B", got \'model_a\''):
        trl_reward()([B], label=["model_a"])


def test_verl_scores_one_judgment() -> None:
    assert compute_score("rm-r1", QUOTING, "A") == {"score": 1.0, "correctness": 1.0}
    info = {"answer_a": "The Nile is long.", "answer_b": "No."}
    found = compute_score("rm-r1", QUOTING, "B", info, grounding=0.25, format=0.1)
    assert found == {"score": -0.75, "correctness": -1, "grounding": 0.25, "format": 0}
    with pytest.raises(ValueError, match="one judgment at a time"):
        compute_score("rm-r1", QUOTING, "A", info, swap_consistency=1.0)
    with pytest.raises(ValueError, match="needs answer_a"):
        compute_score("rm-r1", QUOTING, "A", grounding=1.0)


def test_openrlhf_reads_the_judgment_behind_the_prompt() -> None:
    prompt = f"End with {B}: "
    found = reward_func([prompt + QUOTING, prompt + "?"], [prompt] * 2, ["A", "B"])
    assert found["rewards"].tolist() == [1, -1]
    assert found["scores"].tolist() == found["extra_logs"]["correct"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        reward_func(["x"], ["y"], ["A"])


def test_a_run_of_trl(tmp_path: Path) -> None:
    """GRPOTrainer on the CPU, on the pocket model, with two of our parts as its reward."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    prompt = load_prompt("compact")

    def row(pair: Pair) -> dict[str, Any]:
        answers = {"answer_a": pair.answer_a, "answer_b": pair.answer_b}
        return {"prompt": prompt.render(pair), "label": pair.label, **answers}

    pairs = draw_pairs(8, seed=0, split="train")
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=160,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    trainer = trl.GRPOTrainer(
        model=str(POCKET),
        reward_funcs=trl_reward(grounding=0.5),
        args=config,
        train_dataset=datasets.Dataset.from_list([row(p) for p in pairs]),
    )
    trainer.train()
    logs = trainer.state.log_history
    rewards = [log["rewards/rmr1_reward/mean"] for log in logs if "reward" in log]
    assert len(rewards) == 2
    assert all(-1 <= reward <= 1.5 for reward in rewards)
    assert any(reward > -1 for reward in rewards)  # some verdict was right, or some quote true
