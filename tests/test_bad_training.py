"""Runs that go wrong: gradients that are not finite, checkpoints of another model, other settings
on resuming, and batches that divide into nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from rmr1 import distill as sft_module
from rmr1.config import RlvrConfig, SftConfig, to_toml
from rmr1.distill import distill
from rmr1.engine.checkpoint import Progress, save_checkpoint
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import Batch, Counts, Responses, pack
from rmr1.engine.tensor_files import read_tensors
from rmr1.engine.trainer import Loss, StepStats, Trainer
from rmr1.engine.weights import load_model, read_config, save_model
from rmr1.reporting.report import write_report
from rmr1.rlvr import rlvr

Make = Callable[..., RlvrConfig]
MakeSft = Callable[..., SftConfig]
ROLLOUT = {"prompts": 3, "samples": 4, "max_new_tokens": 8, "kv_memory_gb": 0.1}


def metrics(config: RlvrConfig | SftConfig) -> list[dict[str, Any]]:
    """The rows of a run, without the figures of the clock."""
    text = (config.directory / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        {key: row[key] for key in row if not key.endswith(("_time", "_gb", "_per_second", "mfu"))}
        for row in rows
    ]


def tensors(checkpoint: Path, name: str = "model") -> dict[str, Tensor]:
    return dict(read_tensors(checkpoint / f"{name}.safetensors"))


def saved(config: RlvrConfig | SftConfig, step: int) -> Path:
    return config.directory / "checkpoints" / f"step-{step:06d}"


def interrupt_at(stop: int) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(step: int, total: int, figures: dict[str, float]) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    return on_step


def sentence(call: Callable[[], Any]) -> str:
    """What a run that cannot go on is refused with: one sentence for the user."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        call()
    told = str(caught.value)
    assert "\n" not in told
    assert ". " not in told
    return told


# --- Gradients that are not finite ---------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the gradient of an update NaN wherever its number, from 0, is `bad`."""
    update = Trainer.update

    def poisoned(self: Trainer, batch: Batch, loss: Loss, *, per_token: bool = False) -> StepStats:
        def spoilt(
            logprobs: Tensor, tokens: Responses, counts: Counts
        ) -> tuple[Tensor, dict[str, Tensor]]:
            value, stats = loss(logprobs, tokens, counts)
            return value * math.nan, stats

        return update(self, batch, spoilt if bad(self.updates) else loss, per_token=per_token)

    monkeypatch.setattr(Trainer, "update", poisoned)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_updates_that_are_skipped_are_counted(
    rlvr_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update of step 2, and both of step 3: five in a row there are not."""
    poison(monkeypatch, lambda update: update in (2, 4, 5))
    config = rlvr_config(checkpoint_every=1, keep_checkpoints=9)
    rlvr(config)
    rows = metrics(config)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 0]
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False]
    assert all(math.isfinite(row["reward"]) and math.isfinite(row["kl"]) for row in rows)
    counts = [json.loads((saved(config, n) / "trainer.json").read_text()) for n in range(1, 5)]
    assert [one["skipped"] for one in counts] == [0, 0, 2, 0]
    assert [one["updates"] for one in counts] == [2, 4, 6, 8]
    assert same(tensors(saved(config, 2)), tensors(saved(config, 3)))
    assert same(tensors(saved(config, 2), "optimizer"), tensors(saved(config, 3), "optimizer"))
    assert not same(tensors(saved(config, 1)), tensors(saved(config, 2)))
    assert not same(tensors(saved(config, 3)), tensors(saved(config, 4)))
    assert write_report(config.directory).is_file()  # with numbers in it that are none


def unpacked(file: dict[str, Tensor]) -> list[list[int]]:
    """The prompts and responses of a batch's file, by its own account of their lengths."""
    samples, lengths = file["samples"].tolist(), file["response_lengths"].tolist()
    sizes = []
    for prompt, count in zip(file["prompt_lengths"].tolist(), samples, strict=True):
        sizes += [prompt, *lengths[:count]]
        lengths = lengths[count:]
    assert lengths == []
    assert sum(sizes) == len(file["token_ids"])
    return [run.tolist() for run in file["token_ids"].split(sizes)]


def test_too_many_in_a_row_stop_a_run_and_leave_their_batch(
    rlvr_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update 3 is the first bad one; the count of it goes over a resume in the middle."""
    whole = rlvr_config(name="whole", checkpoint_every=1, keep_checkpoints=9, steps=5)
    poison(monkeypatch, lambda update: update >= 3)
    told = sentence(lambda: rlvr(whole))
    assert told.startswith("step 4: the gradients of 5 updates in a row were not finite")
    path = whole.directory / "not-finite-000004.safetensors"
    assert str(path) in told
    assert "optim.learning_rate" in told
    assert [row["skipped_updates"] for row in metrics(whole)] == [0, 1, 2]
    assert same(tensors(saved(whole, 2)), tensors(saved(whole, 3)))
    assert not saved(whole, 4).exists()

    file = dict(read_tensors(path))
    names = {"token_ids", "prompt_lengths", "samples", "response_lengths", "advantages"}
    assert file.keys() == names | {"rollout_logprobs", "old_logprobs", "ref_logprobs"}
    runs = unpacked(file)
    assert len(file["advantages"]) == sum(file["samples"].tolist()) == 6
    assert min(map(len, runs)) > 0
    count = sum(file["response_lengths"].tolist())
    assert all(len(file[f"{name}_logprobs"]) == count for name in ("rollout", "old", "ref"))
    assert all(value.isfinite().all() for value in file.values())

    # Once more from the last checkpoint: three are counted already, so the second one stops it.
    path.unlink()
    assert sentence(lambda: rlvr(whole)) == told
    assert path.is_file()
    assert same(dict(read_tensors(path)), file)


def test_a_count_that_is_broken_begins_anew(
    sft_config: MakeSft, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda update: update != 1)
    optim = {"learning_rate": 1e-2, "max_skipped": 2}
    config = sft_config(optim=optim, checkpoint_every=1, keep_checkpoints=9)
    told = sentence(lambda: distill(config))
    assert told.startswith("step 4: the gradients of 2 updates in a row were not finite")
    assert [row["skipped_updates"] for row in metrics(config)] == [1, 0, 1]
    path = config.directory / "not-finite-000004.safetensors"
    assert len(unpacked(dict(read_tensors(path)))) == 8
    assert same(tensors(saved(config, 2)), tensors(saved(config, 3)))
    # Nothing moved before the first good update, not even in the optimiser's count of its steps.
    state = tensors(saved(config, 2), "optimizer")
    assert {float(value) for name, value in state.items() if name.startswith("step.")} == {1.0}


def test_advantages_that_are_not_finite_are_skipped(
    rlvr_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the front to the back: no figure of a step but the loss's own is lost by them."""

    def advantages(rewards: Tensor, groups: Tensor, **_: Any) -> Tensor:
        return torch.full_like(rewards, math.inf)

    monkeypatch.setattr("rmr1.grpo.group_advantages", advantages)
    config = rlvr_config(steps=1)
    assert same(tensors(rlvr(config)), tensors(Path(config.model)))
    (row,) = metrics(config)
    assert row["skipped_updates"] == 2
    assert math.isfinite(row["reward"])
    assert row["learning_rate"] == 1e-2


# --- Checkpoints of another model ----------------------------------------------------------------


def another(directory: Path, like: Path, **changes: Any) -> Path:
    """A whole model directory of other sizes, with the tokenizer of `like`."""
    raw = json.loads((like / "config.json").read_text())
    directory.mkdir()
    for path in like.glob("*token*"):
        shutil.copy(path, directory)
    for path in like.glob("chat_template*"):
        shutil.copy(path, directory)
    model = CausalLM(ModelConfig.from_dict({**raw, **changes}))
    model.init_weights(torch.Generator().manual_seed(1))
    save_model(model, directory)
    return directory


OTHERS: dict[str, dict[str, Any]] = {
    "wider": {"intermediate_size": 64},
    "deeper": {"num_hidden_layers": 3},
    "of another family": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
}


def checkpoint_of(model: Path, into: Path) -> Path:
    """What a run of that model would have left after a step."""
    trainer = Trainer(load_model(model), OptimConfig(learning_rate=1e-2), total_updates=2)
    batch = pack([[3, 7, 8], [3, 9]], [[5, 1], [6, 7, 8, 1]])
    trainer.update(batch, sft_module.nll)
    return save_checkpoint(into, trainer, Progress(1, 1, 4), tokenizer_from=model)


@pytest.fixture(scope="module")
def half_done(
    tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SftConfig, Path]:
    """A run of 2 steps with the checkpoint after the first one, and a copy of its folder."""
    folder = tmp_path_factory.mktemp("half-done")
    settings = {"runs_dir": str(folder), "model": str(tiny_model)}
    more = {"prompt_style": "compact", "batch_size": 4, "max_prompt_tokens": 24}
    config = SftConfig.model_validate({**settings, **more, "data": {"path": str(tiny_pairs)}})
    with pytest.raises(KeyboardInterrupt):
        distill(config, on_step=interrupt_at(1))
    shutil.copytree(config.directory, folder / "copy")
    return config, folder / "copy"


@pytest.fixture
def begun(half_done: tuple[SftConfig, Path]) -> SftConfig:
    """A run whose second step is still to come."""
    config, copy = half_done
    shutil.rmtree(config.directory)
    shutil.copytree(copy, config.directory)
    return config


@pytest.mark.parametrize("kind", OTHERS)
def test_an_optimizer_file_of_another_model_is_refused(
    kind: str, begun: SftConfig, tmp_path: Path
) -> None:
    model = another(tmp_path / "other", Path(begun.model), **OTHERS[kind])
    theirs = checkpoint_of(model, tmp_path / "theirs")
    before = tensors(saved(begun, 1))
    replace_file(saved(begun, 1), theirs, "optimizer.safetensors")
    told = sentence(lambda: distill(begun))
    assert "resume with the model that the checkpoint was made from" in told
    assert same(tensors(saved(begun, 1)), before)


@pytest.mark.parametrize("kept", ["model.layers.0", "exp_avg.", "step."])
def test_half_an_optimizer_file_is_refused(kept: str, begun: SftConfig, tmp_path: Path) -> None:
    """As where a shard of it, or a later version's name for a state, is not there."""
    state = tensors(saved(begun, 1), "optimizer")
    some = {name: value for name, value in state.items() if kept in name}
    assert 0 < len(some) < len(state)
    save_file(some, tmp_path / "optimizer.safetensors")
    replace_file(saved(begun, 1), tmp_path, "optimizer.safetensors")
    told = sentence(lambda: distill(begun))
    assert "optimi" in told


def replace_file(checkpoint: Path, other: Path, name: str) -> None:
    """Put a file of another checkpoint in, as somebody would who fixes the checksums too."""
    shutil.copy(other / name, checkpoint / name)
    path = checkpoint / "checksums.json"
    sums = json.loads(path.read_text())
    sums[name] = hashlib.blake2b((checkpoint / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(sums))


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_another_model_are_refused(kind: str, begun: SftConfig, tmp_path: Path) -> None:
    """The file of the weights alone, beside the configuration of ours."""
    model = another(tmp_path / "other", Path(begun.model), **OTHERS[kind])
    replace_file(saved(begun, 1), model, "model.safetensors")
    told = sentence(lambda: distill(begun))
    assert str(saved(begun, 1)) in told


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_model_is_refused(
    kind: str, begun: SftConfig, tmp_path: Path
) -> None:
    """A whole directory of another run, in which everything fits together."""
    model = another(tmp_path / "other", Path(begun.model), **OTHERS[kind])
    theirs = checkpoint_of(model, tmp_path / "theirs")
    shutil.rmtree(saved(begun, 1))
    shutil.copytree(theirs, saved(begun, 1))
    told = sentence(lambda: distill(begun))
    assert str(saved(begun, 1)) in told
    assert read_config(saved(begun, 1)) != read_config(begun.model)


# --- Other settings ------------------------------------------------------------------------------


def test_settings_of_sections_are_refused_key_by_key(rlvr_config: Make) -> None:
    config = rlvr_config(steps=2)
    with pytest.raises(KeyboardInterrupt):
        rlvr(config, on_step=interrupt_at(1))
    before = (config.directory / "config.toml").read_text()
    told = sentence(
        lambda: rlvr(
            rlvr_config(
                steps=2,
                seed=3,
                dtype="bfloat16",
                rollout={**ROLLOUT, "samples": 5, "top_p": 0.5, "kv_memory_gb": 0.2},
                grpo={"minibatches": 2, "dual_clip": 2.0, "offload_reference": True},
                optim={"learning_rate": 1e-2, "max_skipped": 3},
                zero={"stage": 3, "offload_optimizer": True},
            )
        )
    )
    changed = told.partition("(")[2].partition(");")[0].split("; ")
    assert changed == [
        "dtype was 'float32', is 'bfloat16'",
        "grpo.dual_clip was None, is 2.0",
        "optim.max_skipped was 5, is 3",
        "rollout.samples was 4, is 5",
        "rollout.top_p was 1.0, is 0.5",
        "seed was 0, is 3",
    ]
    assert (config.directory / "config.toml").read_text() == before


def test_how_the_machine_is_used_may_change(rlvr_config: Make) -> None:
    """And what comes out stays the same, but for rounding."""
    settings = {"steps": 2, "optim": {"learning_rate": 1e-4}}
    grpo = {"minibatches": 2, "beta": 0.1}
    whole = rlvr_config(name="whole", grpo=grpo, **settings)
    rlvr(whole)
    parts = rlvr_config(name="parts", grpo=grpo, **settings)
    with pytest.raises(KeyboardInterrupt):
        rlvr(parts, on_step=interrupt_at(1))
    final = rlvr(
        rlvr_config(
            name="parts",
            grpo={**grpo, "offload_reference": True},
            zero={"stage": 3, "offload_optimizer": True},
            max_micro_tokens=30,
            recompute="layer",
            **settings,
        )
    )
    for row, expected in zip(metrics(parts), metrics(whole), strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, abs=1e-6, rel=1e-6)
    for name, value in tensors(saved(whole, 2)).items():
        assert (tensors(final)[name] - value).abs().max() < 1e-5, name


# --- Batches that do not divide ------------------------------------------------------------------


def test_minibatches_need_not_divide_the_samples(rlvr_config: Make) -> None:
    """At a standstill the updates of a step add up to what one update of it says."""
    rows = []
    for minibatches in (1, 5, 12):
        config = rlvr_config(
            name=f"in-{minibatches}",
            steps=1,
            grpo={"minibatches": minibatches, "beta": 0.0, "normalize": "sequence"},
            optim={"learning_rate": 1e-12},
        )
        final = rlvr(config)
        assert json.loads((final / "trainer.json").read_text())["updates"] == minibatches
        rows += metrics(config)
    totals = ("reward", "num_tokens", "completions/mean_length", "completions/max_length")
    for row in rows[1:]:
        assert {name: row[name] for name in totals} == {name: rows[0][name] for name in totals}
        assert row["skipped_updates"] == 0
        assert row["ratio_max"] == pytest.approx(1, abs=1e-5)
    # Twelve updates are of one sequence each, so their mean is that of the one update.
    assert rows[2]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-6)


def test_more_minibatches_than_samples_are_refused(rlvr_config: Make) -> None:
    with pytest.raises(ValidationError, match=r"grpo\.minibatches = 13 is more than the 12"):
        rlvr_config(grpo={"minibatches": 13})
    rlvr_config(grpo={"minibatches": 12})


@pytest.mark.slow
def test_fewer_prompts_than_ranks(rlvr_config: Make, tmp_path: Path, run_ranks: Any) -> None:
    """Rank 0 of 3 has no prompt of 2 to sample; what comes out is that of one process."""
    changes = {"steps": 2, "rollout": {**ROLLOUT, "prompts": 2}, "optim": {"learning_rate": 1e-3}}
    alone = rlvr_config(name="alone", **changes)
    rlvr(alone)
    config = rlvr_config(name="job", **changes)
    file = tmp_path / "job.toml"
    file.write_text(to_toml(config))
    ended = run_ranks([sys.executable, "-m", "rmr1.cli", "rlvr", str(file)], 3)
    assert [status for status, _, _ in ended] == [0, 0, 0], ended[0][2][-3000:]
    for row, expected in zip(metrics(config), metrics(alone), strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, abs=1e-4, rel=1e-4)
    for name, value in tensors(saved(alone, 2)).items():
        assert (tensors(saved(config, 2))[name] - value).abs().max() < 1e-4, name
    samples = [
        [json.loads(line)["text"] for line in (run.directory / "samples.jsonl").open()]
        for run in (alone, config)
    ]
    assert samples[1] == samples[0]
