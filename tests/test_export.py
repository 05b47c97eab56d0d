"""`rmr1 export`: a checkpoint becomes a directory that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmr1.cli import main
from rmr1.config import SftConfig
from rmr1.distill import distill
from rmr1.engine.weights import load_model


@pytest.fixture
def run(sft_config: Callable[..., SftConfig]) -> Path:
    return distill(sft_config(checkpoint_every=2)).parent.parent


def test_a_run_and_a_checkpoint(run: Path, tmp_path: Path) -> None:
    newest, older = tmp_path / "newest", tmp_path / "older"
    assert main(["export", str(run), str(newest)]) == 0
    assert main(["export", str(run / "checkpoints/step-000002"), str(older)]) == 0
    expected = load_model(run / "checkpoints/step-000004")
    names = {path.name for path in newest.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"optimizer.safetensors", "trainer.json", "checksums.json"}
    theirs = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32)
    for name, value in expected.named_parameters():
        assert torch.equal(theirs.get_parameter(name), value), name
    assert AutoTokenizer.from_pretrained(newest).eos_token_id == 1
    assert not torch.equal(load_model(older).lm_head_weight, expected.lm_head_weight)


def test_another_dtype(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    expected = load_model(run / "checkpoints/step-000004").lm_head_weight
    assert torch.equal(theirs.lm_head.weight, expected.to(torch.bfloat16))


def test_what_cannot_be_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["export", str(run), str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    weights = run / "checkpoints/step-000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert main(["export", str(weights.parent), str(tmp_path / "out")]) == 2
    assert "is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
