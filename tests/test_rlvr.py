"""Stage 2 end to end on a tiny model: one step taken apart, resuming, Ctrl-C, learning."""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmr1.config import RlvrConfig
from rmr1.data import Pair, read_pairs, write_pairs
from rmr1.engine.packing import Batch
from rmr1.engine.trainer import Loss, StepStats, Trainer, score
from rmr1.engine.weights import load_model
from rmr1.group_sampling import Samples
from rmr1.grpo import _reward_figures
from rmr1.models import load_tokenizer
from rmr1.prompts import encode, load_prompt
from rmr1.rewards import correctness
from rmr1.rlvr import rlvr
from rmr1.terminal import Phase
from rmr1.verdict import parse_verdict, parse_verdicts

CLOCKED = ("_time", "_gb", "_per_second", "mfu")  # figures of the clock and the machine
Make = Callable[..., RlvrConfig]
ROLLOUT = {"prompts": 3, "samples": 4, "max_new_tokens": 8, "kv_memory_gb": 0.1}


def metrics(config: RlvrConfig) -> list[dict[str, Any]]:
    """The rows of a run, without the figures of the clock."""
    text = (config.directory / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: row[key] for key in row if not key.endswith(CLOCKED)} for row in rows]


def weights(directory: Path) -> tuple[bytes, bytes]:
    names = ("model.safetensors", "optimizer.safetensors")
    first, second = ((directory / name).read_bytes() for name in names)
    return first, second


def interrupt_at(stop: int) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(step: int, total: int, figures: dict[str, float]) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    return on_step


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that a policy is updated with."""
    seen: list[Batch] = []
    update = Trainer.update

    def look(self: Trainer, batch: Batch, loss: Loss, *, per_token: bool) -> StepStats:
        seen.append(batch)
        return update(self, batch, loss, per_token=per_token)

    monkeypatch.setattr(Trainer, "update", look)
    return seen


def test_two_steps_resumed_are_four_steps(rlvr_config: Make) -> None:
    whole, parts = rlvr_config(name="whole"), rlvr_config(name="parts")
    final = rlvr(whole)
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]

    with pytest.raises(KeyboardInterrupt, match=r"saved .*step-000002; run the same command again"):
        rlvr(parts, on_step=interrupt_at(2))
    assert metrics(parts) == rows[:2]
    saved = json.loads((parts.directory / "checkpoints/step-000002/trainer.json").read_text())
    mean = statistics.fmean(row["reward"] for row in rows[:2])
    assert saved == {"step": 2, "updates": 4, "drawn": 6, "score": mean, "skipped": 0}
    resumed = rlvr(parts)
    assert metrics(parts) == rows
    assert weights(resumed) == weights(final)
    samples = [
        [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
        for run in (whole, parts)
    ]
    assert samples[0] == samples[1]
    assert [row["step"] for row in samples[0]] == [1, 2, 3, 4]

    # It was a run worth repeating: rewards differ, weights moved, the KL to the start shows it.
    assert any(row["reward_std"] > 0 for row in rows)
    assert (load_model(final).lm_head_weight - load_model(whole.model).lm_head_weight).any()
    assert rows[0]["kl"] < rows[3]["kl"]
    assert rows[3]["kl"] > 1e-4
    assert len({sample["text"] for sample in samples[0]}) > 1


def test_the_time_left_of_a_resumed_run_leaves_out_what_was_done(
    rlvr_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        rlvr(rlvr_config(), on_step=interrupt_at(2))
    now, update = 0.0, Trainer.update

    def slow(self: Trainer, batch: Batch, loss: Loss, *, per_token: bool) -> StepStats:
        nonlocal now
        now += 6  # two updates a step
        return update(self, batch, loss, per_token=per_token)

    monkeypatch.setattr(Trainer, "update", slow)
    bar = Phase("RL", 4, "steps", clock=lambda: now)
    told: list[str] = []

    def follow(step: int, total: int, _: dict[str, float]) -> None:
        bar.reach(step, total)
        told.append(f"{step}: {bar.status()}")

    rlvr(rlvr_config(), on_start=bar.begin, on_step=follow)
    assert told == ["3: 0:12 left, 12 s/step", "4: 12 s/step"]


def test_ctrl_c_in_the_middle_of_a_step_finishes_and_saves_it(
    rlvr_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def presses(self: Trainer, batch: Batch, loss: Loss, *, per_token: bool) -> StepStats:
        if self.updates == 2:  # the first of the two updates of step 2
            signal.raise_signal(signal.SIGINT)
        return update(self, batch, loss, per_token=per_token)

    config = rlvr_config()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", presses)
        with pytest.raises(KeyboardInterrupt, match=r"saved .*step-000002;") as caught:
            rlvr(config)
    saved = config.directory / "checkpoints" / "step-000002"
    assert str(saved) in str(caught.value)
    assert json.loads((saved / "trainer.json").read_text())["updates"] == 4
    whole = rlvr_config(name="whole")
    assert weights(rlvr(config)) == weights(rlvr(whole))


def test_another_configuration_is_refused(rlvr_config: Make) -> None:
    with pytest.raises(KeyboardInterrupt):
        rlvr(rlvr_config(), on_step=interrupt_at(1))
    with pytest.raises(ValueError, match=r"grpo\.clip_high was 0\.2, is 0\.28"):
        rlvr(rlvr_config(grpo={"minibatches": 2, "clip_high": 0.28}))


def test_one_step_taken_apart(rlvr_config: Make, updates: list[Batch]) -> None:
    """Prompts, responses, rewards and advantages belong to each other."""
    config = rlvr_config(steps=2, rollout={**ROLLOUT, "max_new_tokens": 12})
    rlvr(config)
    tokenizer = load_tokenizer(Path(config.model))
    pairs = read_pairs(config.data.path)
    by_prompt = {
        tuple(encode(tokenizer, load_prompt("compact").render(pair))): pair for pair in pairs
    }
    assert len(by_prompt) == 9
    assert [len(batch.response_lengths) for batch in updates] == [6, 6, 6, 6]
    nonzero = 0
    for number, row in enumerate(metrics(config)):
        drawn: list[Pair] = []
        rewards: list[float] = []
        lengths: list[int] = []
        advantages: list[float] = []
        clipped = 0
        for batch in updates[2 * number : 2 * number + 2]:
            ids, start = batch.token_ids.tolist(), 0
            for group in batch.groups:
                pair = by_prompt[tuple(ids[start : start + group.prompt])]
                start += group.prompt
                for length in group.responses:
                    response = ids[start : start + length]
                    start += length
                    answer = parse_verdict(tokenizer.decode(response)).answer
                    drawn.append(pair)
                    rewards.append(1.0 if answer == pair.label else -1.0)
                    lengths.append(length)
                    clipped += response[-1] != tokenizer.eos_token_id
            advantages.extend(batch.advantages.tolist())
        for first in range(0, 12, 4):
            assert len({pair.id for pair in drawn[first : first + 4]}) == 1
            group = rewards[first : first + 4]
            spread = statistics.stdev(group)
            for reward, found in zip(group, advantages[first : first + 4], strict=True):
                expected = (reward - statistics.fmean(group)) / (spread + 1e-4)
                assert found == pytest.approx(expected, abs=1e-5)
                nonzero += found != 0
        assert len({pair.id for pair in drawn}) == 3
        assert row["reward"] == pytest.approx(statistics.fmean(rewards))
        assert row["completions/mean_length"] == pytest.approx(statistics.fmean(lengths))
        assert row["completions/max_length"] == max(lengths)
        assert row["completions/clipped_ratio"] == pytest.approx(clipped / 12)
        assert row["num_tokens"] == sum(lengths)
    assert nonzero > 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recomputed_and_sampled_logprobs_agree_before_the_update(
    rlvr_config: Make, updates: list[Batch], temperature: float
) -> None:
    rows = []
    for old in ("rollout", "recompute"):
        config = rlvr_config(
            name=old,
            steps=1,
            rollout={**ROLLOUT, "temperature": temperature},
            grpo={"minibatches": 1, "old_logprobs": old},
            max_micro_tokens=40,
        )
        rlvr(config)
        rows.append(metrics(config)[0])
    sampled, again = updates
    assert torch.equal(sampled.token_ids, again.token_ids)
    for batch in updates:
        assert batch.old_logprobs is not None
        assert batch.ref_logprobs is not None
        assert batch.rollout_logprobs is not None
        assert (batch.old_logprobs - batch.rollout_logprobs).abs().max() < 1e-4
        # Before the first update the reference is the policy.
        assert (batch.ref_logprobs - batch.rollout_logprobs).abs().max() < 1e-4
        assert batch.rollout_logprobs.std() > 0.1
    assert again.old_logprobs is not again.rollout_logprobs
    for row in rows:
        assert row["logprob_mismatch"] <= row["logprob_mismatch_max"] < 1e-4
        assert row["ratio_max"] == pytest.approx(1, abs=1e-4)
        assert row["kl"] < 1e-6
        assert row["clip_ratio/low_mean"] == row["clip_ratio/high_mean"] == 0
    apart = (again.old_logprobs - again.rollout_logprobs).abs()
    for row in rows:  # measured in the update's own forward, and in a pass of its own
        assert row["logprob_mismatch"] == pytest.approx(apart.mean().item(), rel=0.1)
        assert row["logprob_mismatch_max"] == pytest.approx(apart.max().item(), rel=0.5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)
    assert rows[0]["grad_norm"] > 1e-3


def test_the_reference_stays_the_start(rlvr_config: Make, updates: list[Batch]) -> None:
    """Also after a resume the KL is measured against the model before RL."""
    config = rlvr_config(steps=3, grpo={"minibatches": 1, "beta": 0.1})
    with pytest.raises(KeyboardInterrupt):
        rlvr(config, on_step=interrupt_at(2))
    rlvr(config)
    start = load_model(config.model)
    batch = updates[-1]
    assert batch.ref_logprobs is not None
    assert batch.old_logprobs is not None
    assert (score(start, batch) - batch.ref_logprobs).abs().max() < 1e-5
    assert (batch.old_logprobs - batch.ref_logprobs).abs().max() > 1e-2


def test_without_beta_there_is_no_reference(rlvr_config: Make, updates: list[Batch]) -> None:
    config = rlvr_config(steps=1, grpo={"minibatches": 2, "beta": 0})
    rlvr(config)
    assert all(batch.ref_logprobs is None for batch in updates)
    assert "kl" not in metrics(config)[0]


def test_long_prompts_are_dropped_and_counted(rlvr_config: Make, updates: list[Batch]) -> None:
    config = rlvr_config(steps=4)
    rlvr(config)
    assert {row["dropped_prompts"] for row in metrics(config)} == {1}
    assert max(max(batch.prompt_lengths) for batch in updates) <= 24


def test_all_prompts_over_the_limit_is_an_error(rlvr_config: Make) -> None:
    words = r"all 9 prompts are longer than max_prompt_tokens \(5\)"
    with pytest.raises(ValueError, match=words):
        rlvr(rlvr_config(max_prompt_tokens=5))


def test_prompts_past_the_models_positions_are_refused_before_the_first_step(
    rlvr_config: Make, updates: list[Batch]
) -> None:
    words = r"longest prompt \(40 tokens\) with rollout.max_new_tokens \(30\) .* 64 positions"
    with pytest.raises(ValueError, match=words):
        rlvr(rlvr_config(max_prompt_tokens=100, rollout={**ROLLOUT, "max_new_tokens": 30}))
    assert updates == []


def test_every_step_draws_afresh(rlvr_config: Make, tmp_path: Path, updates: list[Batch]) -> None:
    """One pair, and a policy that all but stands still: the steps differ by their draws alone."""
    path = tmp_path / "one.jsonl"
    write_pairs(path, read_pairs(rlvr_config().data.path)[:1])
    config = rlvr_config(
        data={"path": str(path)},
        steps=3,
        rollout={**ROLLOUT, "prompts": 1},
        grpo={"minibatches": 1},
        optim={"learning_rate": 1e-12},
    )
    rlvr(config)
    drawn = {tuple(batch.targets.tolist()) for batch in updates}
    assert len(drawn) == len(updates) == 3


def test_minibatches_are_updates(rlvr_config: Make, updates: list[Batch]) -> None:
    config = rlvr_config(steps=1, grpo={"minibatches": 5})
    final = rlvr(config)
    assert [len(batch.response_lengths) for batch in updates] == [2, 2, 3, 2, 3]
    assert json.loads((final / "trainer.json").read_text())["updates"] == 5


def test_it_learns_what_is_rewarded(rlvr_config: Make, tmp_path: Path) -> None:
    """Pairs whose better answer is always A: the reward rises and the judge says A."""
    pairs = read_pairs(rlvr_config().data.path)
    path = tmp_path / "a.jsonl"
    write_pairs(path, [pair if pair.label == "A" else pair.swapped() for pair in pairs])
    config = rlvr_config(
        data={"path": str(path)},
        steps=9,
        rollout={**ROLLOUT, "prompts": 6, "samples": 8},
        optim={"learning_rate": 1e-2},
    )
    rlvr(config)
    rewards = [row["reward"] for row in metrics(config)]
    assert statistics.fmean(rewards[:2]) < 0
    assert statistics.fmean(rewards[-2:]) > 0.6
    assert metrics(config)[-1]["parse_rate"] > 0.8


A, B, NONE = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>", "A is better"


def pair(label: Any) -> Pair:
    return Pair("1", "tests", ({"role": "user", "content": "?"},), "a", "b", label, "chat")


def test_the_reward_is_plus_or_minus_one() -> None:
    texts = [A, B, NONE, "", A, B, "<answer>[[tie]]</answer>", f"{A} no: {B}"]
    labels = ["A", "A", "A", "A", "B", "B", "B", "B"]
    found = correctness(parse_verdicts(texts), [pair(label) for label in labels])
    assert found == [1, -1, -1, -1, -1, 1, -1, 1]
    with pytest.raises(ValueError, match="shorter"):
        correctness(parse_verdicts(texts), [pair("A")])


def test_reward_figures() -> None:
    rewards = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1, 1, -1, -1, -1])
    samples = Samples(
        [[1]] * 3, [[2]] * 12, [[-1.0]] * 12, {"right": rewards}, torch.zeros(12).bool()
    )
    figures = _reward_figures(samples)
    assert figures == pytest.approx(
        {
            "reward": -2 / 12,
            "reward_std": 1 / 3,  # stds 0, 0 and sqrt((1.5^2 + 3 * 0.5^2) / 3) = 1
            "frac_reward_zero_std": 2 / 3,
            "rewards/right/mean": -2 / 12,
            "prompts": 3,
        }
    )
