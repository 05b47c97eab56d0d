"""Stage 1 end to end on a tiny model: what is learnt from, resuming, Ctrl-C, a full disk."""

from __future__ import annotations

import errno
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, tokenization_utils_base

from rmr1.cli import main
from rmr1.config import SftConfig, to_toml
from rmr1.data import Pair, read_pairs, write_pairs
from rmr1.distill import distill, tokenize_traces
from rmr1.engine import tensor_files
from rmr1.engine import trainer as trainer_module
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.weights import load_model
from rmr1.models import load_tokenizer
from rmr1.prompts import encode, load_prompt
from rmr1.terminal import Phase

CLOCKED = ("_time", "_gb", "_per_second", "mfu")  # figures of the clock and the machine
Make = Callable[..., SftConfig]
POSITIONS = 64  # of the tiny model


def metrics(config: SftConfig) -> list[dict[str, Any]]:
    """The rows of a run, without the figures of the clock."""
    text = (config.directory / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: row[key] for key in row if not key.endswith(CLOCKED)} for row in rows]


def weights(directory: Path) -> tuple[bytes, bytes]:
    names = ("model.safetensors", "optimizer.safetensors")
    first, second = ((directory / name).read_bytes() for name in names)
    return first, second


def interrupt_at(stop: int) -> Callable[[int, int, dict[str, float]], None]:
    """An `on_step` that presses Ctrl-C when it is told of step `stop`."""

    def on_step(step: int, total: int, figures: dict[str, float]) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    return on_step


class Clock:
    """A clock that goes on by 12 seconds with every update, and stands still otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        update = trainer_module.Trainer.update

        def slow(*args: Any, **options: Any) -> Any:
            self.now += 12
            return update(*args, **options)

        monkeypatch.setattr(trainer_module.Trainer, "update", slow)

    def __call__(self) -> float:
        return self.now


def test_the_time_left_of_a_resumed_run_leaves_out_what_was_done(
    sft_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(sft_config(), on_step=interrupt_at(1))
    bar = Phase("Distil", 1, "steps", clock=Clock(monkeypatch))
    told: list[str] = []

    def follow(step: int, total: int, _: dict[str, float]) -> None:
        bar.reach(step, total)
        told.append(bar.status())

    def begin(done: int, total: int) -> None:
        bar.begin(done, total)
        told.append(f"{done} of {total}: {bar.status()}")

    distill(sft_config(), on_start=begin, on_step=follow)
    assert told == [
        "1 of 4: time left unknown",
        "0:24 left, 12 s/step",
        "0:12 left, 12 s/step",
        "12 s/step",
    ]


def test_the_command_shows_from_where_it_goes_on(
    sft_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sft_config()
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    with pytest.raises(KeyboardInterrupt):
        distill(config, on_step=interrupt_at(3))
    assert main(["sft", str(file)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("Distil: 3/4 steps (75%)") for line in lines)
    assert main(["sft", str(file)]) == 0  # complete: nothing is left
    assert "Distil: 4/4 steps (100%)" in capsys.readouterr().err


def test_two_steps_resumed_are_four_steps(sft_config: Make) -> None:
    whole, parts = sft_config(name="whole"), sft_config(name="parts")
    told: list[tuple[int, int, float]] = []
    final = distill(whole, on_step=lambda step, n, row: told.append((step, n, row["loss"])))
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert told == [(row["step"], 4, row["loss"]) for row in rows]

    with pytest.raises(KeyboardInterrupt, match=r"saved .*step-000002; run the same command again"):
        distill(parts, on_step=interrupt_at(2))
    assert metrics(parts) == rows[:2]
    assert json.loads((parts.directory / "checkpoints/step-000002/trainer.json").read_text()) == {
        "step": 2,
        "updates": 2,
        "drawn": 8,
        "score": None,
        "skipped": 0,
    }
    resumed = distill(parts)
    assert metrics(parts) == rows
    assert weights(resumed) == weights(final)
    assert resumed.name == final.name == "step-000004"

    # The four steps did something, and the order of the second epoch is another one.
    start = load_model(whole.model).lm_head_weight
    assert (load_model(final).lm_head_weight - start).abs().max() > 1e-2
    assert rows[3]["loss"] < rows[0]["loss"]
    assert rows[0]["num_tokens"] != rows[2]["num_tokens"]
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3]
    )


def test_a_crash_goes_back_to_the_last_checkpoint(sft_config: Make) -> None:
    whole = sft_config(name="whole")
    final = distill(whole)
    config = sft_config(checkpoint_every=2)

    def crash(step: int, total: int, figures: dict[str, float]) -> None:
        if step == 3:
            raise RuntimeError("lost power")

    with pytest.raises(RuntimeError, match="lost power"):
        distill(config, on_step=crash)
    assert len(metrics(config)) == 3  # step 3 was logged but not saved
    assert weights(distill(config)) == weights(final)
    assert metrics(config) == metrics(whole)


def test_a_full_disk_keeps_the_last_checkpoint(
    sft_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = sft_config(checkpoint_every=2)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    save_file, saves = tensor_files.save_file, []

    def fills_up(tensors: Any, path: Path, **options: Any) -> None:
        saves.append(path)
        if len(saves) == 4:  # the optimiser's state of the second save
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", fills_up)
        assert main(["sft", str(file)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in message
    assert "Traceback" not in message
    checkpoints = config.directory / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    whole = sft_config(name="whole")
    assert weights(distill(config)) == weights(distill(whole))
    assert metrics(config) == metrics(whole)


def test_ctrl_c_during_a_save_stops_after_it(
    sft_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = tensor_files.save_file

    def presses(tensors: Any, path: Path, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save_file(tensors, path, **options)

    monkeypatch.setattr(tensor_files, "save_file", presses)
    with pytest.raises(KeyboardInterrupt, match=r"saved .*step-000002;"):
        distill(sft_config(checkpoint_every=2))


def test_ctrl_c_in_the_last_step_is_heard_and_nothing_is_left_to_do(sft_config: Make) -> None:
    config = sft_config()
    with pytest.raises(KeyboardInterrupt, match="step-000004"):
        distill(config, on_step=interrupt_at(4))
    rows = metrics(config)
    assert distill(config).name == "step-000004"
    assert metrics(config) == rows


def test_another_configuration_is_refused(sft_config: Make) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(sft_config(), on_step=interrupt_at(1))
    with pytest.raises(ValueError, match="epochs was 2, is 3"):
        distill(sft_config(epochs=3))


def test_epochs_do_not_run_into_each_other(sft_config: Make) -> None:
    config = sft_config(batch_size=3, epochs=2)  # 8 traces: 3 + 3 + 2, twice
    tokenizer = load_tokenizer(Path(config.model))
    rows, _ = tokenize_traces(config, read_pairs(config.data.path), tokenizer, POSITIONS)
    every = sum(len(trace) for _, trace in rows)
    distill(config)
    found = [row["num_tokens"] for row in metrics(config)]
    assert len(found) == 6
    assert sum(found[:3]) == sum(found[3:]) == every


def test_micro_batches_and_resuming_do_not_change_the_loss(sft_config: Make) -> None:
    one, many = sft_config(name="one"), sft_config(name="many", max_micro_tokens=1)
    distill(one)
    distill(many)
    for left, right in zip(metrics(one), metrics(many), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-2)


def test_traces_end_their_turn_and_long_ones_are_counted(sft_config: Make) -> None:
    config = sft_config()
    pairs = read_pairs(config.data.path)
    tokenizer = load_tokenizer(Path(config.model))
    rows, dropped = tokenize_traces(config, pairs, tokenizer, POSITIONS)
    assert dropped == 1  # the long prompt
    assert len(rows) == 8
    for pair, (prompt, trace) in zip(pairs, rows, strict=False):
        assert prompt == encode(tokenizer, load_prompt("compact").render(pair))
        assert trace[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trace[:-1]) == pair.trace.replace(" ", "")
    longest = max(len(prompt) + len(trace) for prompt, trace in rows)
    exact = sft_config(max_length=longest)
    fits, dropped = tokenize_traces(exact, pairs, tokenizer, POSITIONS)
    assert (len(fits), dropped) == (8, 1)
    short = sft_config(max_length=longest - 1)
    fits, dropped = tokenize_traces(short, pairs, tokenizer, POSITIONS)
    assert len(fits) < 8
    assert len(fits) + dropped == 9
    # The model's positions are a limit like max_length; the smaller of the two counts.
    assert tokenize_traces(config, pairs, tokenizer, longest) == (rows, 1)
    assert tokenize_traces(config, pairs, tokenizer, longest - 1) == (fits, dropped)
    assert tokenize_traces(short, pairs, tokenizer, longest) == (fits, dropped)
    config = sft_config(name="counted")
    distill(config)
    assert {row["dropped_prompts"] for row in metrics(config)} == {1}


def test_traces_past_the_models_positions_are_dropped_and_counted(
    sft_config: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default max_length is 12,288; this model has 30 positions."""
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    values = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 30}))
    seen: list[int] = []
    update = trainer_module.Trainer.update

    def look(self: Any, batch: Any, loss: Any, *, per_token: bool) -> Any:
        seen.extend(group.tokens for group in batch.groups)
        return update(self, batch, loss, per_token=per_token)

    monkeypatch.setattr(trainer_module.Trainer, "update", look)
    config = sft_config(model=str(small))
    assert config.max_length > 30
    distill(config)
    (dropped,) = {row["dropped_prompts"] for row in metrics(config)}
    assert 1 < dropped < 9
    assert max(seen) <= 30
    assert len(seen) == 2 * (9 - dropped)  # epochs
    (small / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 5}))
    with pytest.raises(ValueError, match=r"of 9 pairs, 9 were over .* the model's 5 positions\)"):
        distill(sft_config(model=str(small), name="none"))


def test_a_long_text_is_tokenised_without_a_word(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning of transformers would stand in the middle of the bar."""
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", warned.append)
    for tokenizer in (load_tokenizer(tiny_model), AutoTokenizer.from_pretrained(tiny_model)):
        assert warned == []
        tokenizer.model_max_length = 4
        tokenizer("1 2 3 4 5 6", add_special_tokens=False)
    assert len(warned) == 1  # the second one, which is as transformers makes it


def test_pairs_without_a_trace_are_passed_over(sft_config: Make, tmp_path: Path) -> None:
    config = sft_config()
    pairs = read_pairs(config.data.path)
    mixed = [pairs[0], pairs[1].swapped(), pairs[2]]
    tokenizer = load_tokenizer(Path(config.model))
    rows, dropped = tokenize_traces(config, mixed, tokenizer, POSITIONS)
    assert (len(rows), dropped) == (2, 0)
    path = tmp_path / "bare.jsonl"
    write_pairs(path, [pair.swapped() for pair in pairs])
    with pytest.raises(ValueError, match="no trace to learn from: of 9 pairs, 0 were over"):
        distill(sft_config(data={"path": str(path)}))


def test_all_over_the_limit_is_an_error(
    sft_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(sft_config(max_prompt_tokens=5)))
    assert main(["sft", str(file)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "of 9 pairs, 9 were over the limits (max_prompt_tokens 5" in message
    assert "Traceback" not in message


def test_it_learns_the_traces(sft_config: Make) -> None:
    config = sft_config(epochs=15, optim={"learning_rate": 1e-2})
    final = distill(config)
    losses = [row["loss"] for row in metrics(config)]
    assert losses[0] == pytest.approx(math.log(28), abs=0.5)
    assert losses[-1] < 0.7
    # The saved model writes the format: after "=" and a sum come more work or a verdict.
    tokenizer = load_tokenizer(final)
    pair: Pair = read_pairs(config.data.path)[0]
    prompt = encode(tokenizer, load_prompt("compact").render(pair))
    with torch.no_grad():
        params = SamplingParams(temperature=0, max_new_tokens=20)
        text = Generator(load_model(final), tokenizer).generate([prompt], params)[0][0].text
    assert "<answer>[[" in text
    assert text.startswith(f"{pair.conversation[0]['content'].replace(' ', '')}=")
