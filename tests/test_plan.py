"""`rmr1 plan`: the paper's placements, what to change, and times that behave as they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmr1.cli import main
from rmr1.config import RlvrConfig, SftConfig, load_config
from rmr1.engine.model_config import ModelConfig
from rmr1.gpus import GPUS
from rmr1.step_estimate import Lengths, rlvr_estimate, sft_estimate

RECIPES = Path(__file__).parent.parent / "recipes"
LENGTHS = Lengths(1200, 800)
H100 = GPUS["h100"]
MODELS = ["qwen2.5-{}b", "deepseek-r1-distill-qwen-{}b"]


def model_of(name: str) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((RECIPES / f"models/{name}.json").read_text()))


def planned(capsys: pytest.CaptureFixture[str], recipe: str, *more: str) -> list[dict[str, Any]]:
    name = recipe.partition("-")[2]
    args = ["plan", str(RECIPES / f"{recipe}.toml"), "--json"]
    main([*args, "--model_config", str(RECIPES / f"models/{name}.json"), *more])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("size", "gpus"), [(7, 8), (14, 16), (32, 32)])
def test_the_papers_placement_fits(
    family: str, size: int, gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """7B on one node of H100, 14B on two, 32B on four; the larger two on no node less."""
    recipe = f"rlvr-{family.format(size)}"
    counts = {one["gpus"]: one["fits"] for one in planned(capsys, recipe)}
    assert counts[gpus]
    if size > 7:
        assert not counts[gpus // 2]
    assert planned(capsys, recipe, "--gpus", str(gpus))[0]["change"] == ""


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "qwen3-8b"])
def test_distillation_fits_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = planned(capsys, f"sft-{name}", "--gpus", "8")
    assert one["fits"]
    assert one["steps"] == 69  # 8,753 traces by 128
    assert set(one["phases_gb"]) == {"load", "update"}


def test_shapes_are_those_of_the_published_models() -> None:
    """By their numbers of parameters, in billions, as the models' cards say."""
    from rmr1.engine.memory_plan import parameters

    sizes = {"qwen2.5-7b": 7.62, "qwen2.5-14b": 14.8, "qwen2.5-32b": 32.8, "qwen3-8b": 8.19}
    for name, size in sizes.items():
        assert parameters(model_of(name)) / 1e9 == pytest.approx(size, rel=0.01), name


def test_what_does_not_fit_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", str(RECIPES / "rlvr-qwen2.5-32b.toml"), "--gpus", "8"]
    args += ["--model_config", str(RECIPES / "models/qwen2.5-32b.json")]
    assert main(args) == 1
    out = capsys.readouterr().out
    assert "It does not fit: the rollout takes 85.9 GB; lower rollout.kv_memory_gb (now 8)" in out
    assert "roofline estimate, no measurement" in out
    assert main([*args[:2], "--gpus", "32", *args[4:]]) == 0
    assert "It does not fit" not in capsys.readouterr().out


def edited(path: Path, recipe: str, old: str, new: str) -> str:
    """A recipe with one line changed, as a file of its own."""
    text = (RECIPES / f"{recipe}.toml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return str(path)


def test_a_cache_for_less_than_one_sample_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the run would end at the first prompt of full length."""
    shape = ("--model_config", str(RECIPES / "models/qwen2.5-32b.json"), "--gpus", "32", "--json")
    for size, code in (("0.05", 1), ("3.2", 1), ("3.3", 0)):
        recipe = edited(
            tmp_path / "kv.toml", "rlvr-qwen2.5-32b", "kv_memory_gb = 8.0", f"kv_memory_gb = {size}"
        )
        assert main(["plan", recipe, *shape]) == code
        (one,) = json.loads(capsys.readouterr().out)
        assert one["fits"] == (not code)
        assert ("need 3.22 GB of KV cache" in one["change"]) == bool(code)


def test_what_the_guide_says_fits_on_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/judging.md: with one more setting each of the larger two needs half as many."""
    changes = [
        ("14b", 8, "[zero]", "[zero]\noffload_optimizer = true", 60.3),
        ("32b", 16, "kv_memory_gb = 8.0", "kv_memory_gb = 6.0", 79.8),
    ]
    for size, gpus, old, new, needed in changes:
        recipe = edited(tmp_path / "x.toml", f"rlvr-qwen2.5-{size}", old, new)
        shape = str(RECIPES / f"models/qwen2.5-{size}.json")
        assert main(["plan", recipe, "--model_config", shape, "--gpus", str(gpus), "--json"]) == 0
        (one,) = json.loads(capsys.readouterr().out)
        assert one["needed_gb"] == pytest.approx(needed, abs=0.05)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["none.toml"], "none.toml: cannot be read"),
        ([str(RECIPES / "rlvr-qwen2.5-7b.toml")], "config.json: cannot be read"),
        ([str(RECIPES / "rlvr-qwen2.5-7b.toml"), "--gpu", "gtx"], "gpu"),
        ([str(RECIPES / "torchrun.sh")], "no valid TOML"),
        ([str(RECIPES / "data-rm-r1.toml")], "no training recipe"),
        ([str(RECIPES / "trace-rm-r1.toml")], "no training recipe"),
        ([str(RECIPES / "demo-smollm2.toml")], "no training recipe"),
        ([str(RECIPES / "rlvr-qwen2.5-7b.toml"), "--model_config", "list.json"], "no JSON object"),
        ([str(RECIPES / "rlvr-qwen2.5-7b.toml"), "--model_config", "bytes.json"], "bytes.json: no"),
    ],
)
def test_wrong_use(
    args: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("bytes.json").write_bytes(b"\xff\xfe\x00")
    assert main(["plan", *args]) == 2
    assert told in capsys.readouterr().err


def test_the_laptops_recipes_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """By their own number of tasks, and no longer than their caps."""
    args = ["plan", str(RECIPES / "sft-laptop.toml"), "--gpus", "1", "--json"]
    assert main(args) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["fits"]
    assert one["steps"] == 22  # 352 by 16, which rlvr-laptop.toml starts from
    assert (one["prompt_tokens"], one["judgment_tokens"]) == (768, 256)  # of 1,024 positions
    assert main([*args, "--traces", "33"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["steps"] == 3


@pytest.mark.parametrize(
    ("recipe", "key", "most"),
    [
        ("rlvr-qwen2.5-7b", "--judgment_tokens", 8192),
        ("rlvr-qwen2.5-7b", "--prompt_tokens", 4096),
        ("sft-qwen2.5-7b", "--prompt_tokens", 12287),  # one token is left to learn from
        ("sft-qwen2.5-7b", "--judgment_tokens", 11088),  # after a prompt of 1,200
    ],
)
def test_lengths_above_the_recipes_caps_are_refused(
    recipe: str, key: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = str(RECIPES / "models/qwen2.5-7b.json")
    args = ["plan", str(RECIPES / f"{recipe}.toml"), "--model_config", shape, "--gpus", "8"]
    assert main([*args, key, str(most)]) == 0
    capsys.readouterr()
    assert main([*args, key, str(most + 1)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{key} {most + 1} is more than the {most} that the recipe and the model allow" in err


def test_a_recipe_without_room_for_a_prompt_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = json.loads((RECIPES / "models/qwen2.5-7b.json").read_text())
    (tmp_path / "short.json").write_text(json.dumps(shape | {"max_position_embeddings": 8192}))
    args = ["--model_config", str(tmp_path / "short.json")]
    assert main(["plan", str(RECIPES / "rlvr-qwen2.5-7b.toml"), *args]) == 2
    assert "rollout.max_new_tokens (8192) leaves a prompt none" in capsys.readouterr().err


def test_fp32_takes_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of twice the bytes, and products at the rate that the data sheet has for them."""
    (half,) = planned(capsys, "rlvr-qwen2.5-7b", "--gpus", "8")
    recipe = edited(tmp_path / "fp32.toml", "rlvr-qwen2.5-7b", '"bfloat16"', '"float32"')
    shape = ["--model_config", str(RECIPES / "models/qwen2.5-7b.json"), "--gpus", "8"]
    main(["plan", recipe, *shape, "--json"])
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["host_gb_a_node"] == 2 * half["host_gb_a_node"]
    name = "forward and backward"
    slower = H100.flops / H100.flops32
    assert whole["step_seconds"][name] == pytest.approx(slower * half["step_seconds"][name])
    for name in ("rollout", "reference"):
        assert whole["step_seconds"][name] > 2 * half["step_seconds"][name]
    assert whole["step_seconds"]["exchange"] > half["step_seconds"]["exchange"]
    main(["plan", recipe, *shape])
    assert "45% of the data sheet's fp32 FLOP/s, without TF32" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_model_has_to_be_loaded_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """72B: sharded over eight GPUs it would fit, but each loads it whole."""
    shape = json.loads((RECIPES / "models/qwen2.5-32b.json").read_text())
    shape |= {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80,
              "intermediate_size": 29568}  # fmt: skip
    path = tmp_path / "72b.json"
    path.write_text(json.dumps(shape))
    args = ["plan", str(RECIPES / "sft-qwen2.5-32b.toml"), "--model_config", str(path), "--json"]
    assert main([*args, "--gpus", "16"]) == 1
    (one,) = json.loads(capsys.readouterr().out)
    assert one["phases_gb"]["load"]["weights"] == pytest.approx(145, rel=0.02)
    assert one["change"].startswith("take a larger GPU")


def test_what_is_offloaded_has_to_fit_the_node(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--gpus", "32", "--host_memory_gb")
    (large,) = planned(capsys, "rlvr-qwen2.5-32b", *args, "1000")
    (small,) = planned(capsys, "rlvr-qwen2.5-32b", *args, "500")
    assert large["fits"]
    assert not small["fits"]
    assert small["change"].startswith("take more GPUs, or unset what is offloaded")


def rlvr(**dotted: Any) -> RlvrConfig:
    return load_config(RlvrConfig, RECIPES / "rlvr-qwen2.5-7b.toml", dotted)


def step(config: RlvrConfig, gpus: int = 8, lengths: Lengths = LENGTHS, gpu: Any = H100) -> Any:
    return rlvr_estimate(config, model_of("qwen2.5-7b"), gpu, gpus, lengths, int(20e9)).parts


def test_products_are_those_of_the_update() -> None:
    """By hand: 6 N a token of a group with its prompt once, a third more for the recomputation."""
    model = model_of("qwen2.5-7b")
    size = 6.53e9  # of the layers' matrices
    tokens = 1024 * (1200 + 7 * 800)
    head = 1024 * 7 * 800 * model.vocab_size * model.hidden_size
    seconds = 8 * (size * tokens + head) / (H100.flops * 0.45 * 8)
    found = step(rlvr())["forward and backward"]
    assert seconds < found < 1.25 * seconds  # and attention


def test_times_behave() -> None:
    whole = step(rlvr())
    assert step(rlvr(), gpus=4)["forward and backward"] == 2 * whole["forward and backward"]
    assert "reference" not in step(rlvr(**{"grpo.beta": 0}))
    assert "old log-probabilities" in step(rlvr(**{"grpo.old_logprobs": "recompute"}))
    assert "exchange" not in step(rlvr(), gpus=1)
    assert step(rlvr(), gpus=16)["exchange"] > whole["exchange"]  # between nodes
    longer = step(rlvr(), lengths=Lengths(1200, 1600))
    assert longer["rollout"] > 1.9 * whole["rollout"]
    faster = replace(H100, bandwidth=2 * H100.bandwidth)
    assert step(rlvr(), gpu=faster)["rollout"] < whole["rollout"]
    assert step(rlvr(recompute="none"))["forward and backward"] == pytest.approx(
        0.75 * whole["forward and backward"]
    )


def test_an_epoch_of_distillation() -> None:
    config = load_config(SftConfig, RECIPES / "sft-qwen2.5-7b.toml")
    found = sft_estimate(config, model_of("qwen2.5-7b"), H100, 8, LENGTHS, 8753)
    assert found.steps == 69
    assert found.hours == pytest.approx(69 * sum(found.parts.values()) / 3600)
    assert "optimiser on the host" in found.parts


STAGES = sorted(path for kind in ("sft", "rlvr") for path in RECIPES.glob(f"{kind}-*.toml"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the whole configuration, which is one that resolves to itself."""
    monkeypatch.chdir(tmp_path)
    verb = path.stem.partition("-")[0]
    assert main([verb, str(path), "--dry-run"]) == 0
    out, told = capsys.readouterr()
    kind = SftConfig if verb == "sft" else RlvrConfig
    (tmp_path / "printed.toml").write_text(out)
    assert load_config(kind, tmp_path / "printed.toml") == load_config(kind, path)
    assert "runs" not in [entry.name for entry in tmp_path.iterdir()]  # nothing was begun
    if "laptop" not in path.stem:
        assert "config.json here" in told
        assert "data.path: no " in told


def test_a_dry_run_refuses_what_a_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["rlvr", str(RECIPES / "rlvr-laptop.toml"), "--dry-run"]
    assert main([*args, "--grpo.beta", "-1"]) == 2
    assert "grpo.beta" in capsys.readouterr().err
    run = tmp_path / "runs" / "rlvr-laptop"
    run.mkdir(parents=True)
    assert main(args) == 0
    (run / "config.toml").write_text(capsys.readouterr().out)
    assert main(args) == 0
    assert "would be resumed" in capsys.readouterr().err
    assert main([*args, "--grpo.beta", "0.5"]) == 2
    assert "grpo.beta was 0.001, is 0.5" in capsys.readouterr().err
