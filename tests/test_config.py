"""Configuration: types and limits, whose fault an error is, and TOML that reads back the same."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rmr1.config import RlvrConfig, SftConfig, load_config, to_toml
from rmr1.datasets.build_config import BuildConfig
from rmr1.demo_config import DemoConfig, rlvr_config, sft_config
from rmr1.grpo_config import GrpoConfig
from rmr1.traces.trace import TraceConfig

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
KINDS = {
    "sft": SftConfig,
    "rlvr": RlvrConfig,
    "demo": DemoConfig,
    "data": BuildConfig,
    "trace": TraceConfig,
}
STAGE = {"model": "pocket", "data.tasks": 8}


def toml(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


def told(kind: type[BaseModel], path: Path | None, overrides: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked by the caller
        load_config(kind, path, overrides)
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(recipe: Path) -> None:
    config = load_config(KINDS[recipe.name.split("-")[0]], recipe)
    # Training runs write into a folder of that name.
    assert config.model_dump().get("name", recipe.stem) == recipe.stem


def test_there_are_recipes_for_each_stage() -> None:
    assert {path.name.split("-")[0] for path in RECIPES} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "key", "reason", "got"),
    [
        ('steps = "3"', "steps", "valid integer", "'3'"),
        ("steps = 3.0", "steps", "valid integer", "3.0"),
        ("steps = true", "steps", "valid integer", "True"),
        ("name = 7", "name", "valid string", "7"),
        ("seed = 2024-01-01", "seed", "valid integer", "datetime.date(2024, 1, 1)"),
        ('[grpo]\nbeta = "0"', "grpo.beta", "valid number", "'0'"),
        ("[grpo]\nbeta = false", "grpo.beta", "valid number", "False"),
        ("[rollout]\nsamples = [8]", "rollout.samples", "valid integer", "[8]"),
        ("[rollout]\nkv_memory_gb = '1'", "rollout.kv_memory_gb", "valid number", "'1'"),
        ("[optim]\nschedule = 1", "optim.schedule", "'constant', 'linear' or 'cosine'", "1"),
        ("grpo = 3", "grpo", "is a section", "3"),
        ("data = 'pairs.jsonl'", "data", "is a section", "'pairs.jsonl'"),
    ],
)
def test_a_value_of_another_type_names_key_file_and_reason(
    tmp_path: Path, text: str, key: str, reason: str, got: str
) -> None:
    path = toml(tmp_path, text)
    sentence = told(RlvrConfig, path, STAGE if not text.startswith("data") else {"model": "x"})
    assert sentence.startswith(f"{path}: key '{key}'")
    assert reason in sentence
    assert sentence.endswith(f"got {got}")


def test_texts_are_fine_on_the_command_line_and_whole_numbers_as_shares(tmp_path: Path) -> None:
    path = toml(tmp_path, "model = 'pocket'\nsteps = 5\n[grpo]\nbeta = 0\n[data]\ntasks = 8")
    config = load_config(RlvrConfig, path, {"steps": "3", "rollout.top_p": "0.5"})
    assert (config.steps, config.rollout.top_p, config.grpo.beta) == (3, 0.5, 0.0)
    # A bad value in the file is wrong even where the command line has another.
    path = toml(tmp_path, "steps = 'many'")
    assert "valid integer" in told(RlvrConfig, path, {**STAGE, "steps": "3"})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("steps", "0", "greater than or equal to 1"),
        ("seed", "-1", "greater than or equal to 0"),
        ("steps", "many", "valid integer"),
        ("rollout.samples", "1", "greater than or equal to 2"),
        ("rollout.temperature", "0", "greater than 0"),
        ("rollout.top_p", "1.5", "less than or equal to 1"),
        ("optim.learning_rate", "inf", "finite"),
        ("grpo.beta", "nan", "finite"),
        ("grpo.scale", "mean", "'std' or 'none'"),
        ("dtype", "float16", "'float32' or 'bfloat16'"),
        ("name", "", "at least 1 character"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_an_impossible_value_says_where_it_stands(
    tmp_path: Path, key: str, value: str, reason: str, in_file: bool
) -> None:
    path = None
    overrides: dict[str, Any] = {**STAGE, key: value}
    if in_file:
        *section, name = key.split(".")
        plain = value.lstrip("-").replace(".", "").isdigit() or value in ("inf", "nan")
        shown = value if plain else f"'{value}'"
        path = toml(tmp_path, "".join(f"[{part}]\n" for part in section) + f"{name} = {shown}")
        overrides = dict(STAGE)
    sentence = told(RlvrConfig, path, overrides)
    assert sentence.startswith(f"{path or 'command line'}: key '{key}': ")
    assert reason in sentence


def test_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "steps = 5")
    assert told(RlvrConfig, path, {**STAGE, "steps": "0"}).startswith("command line: key 'steps'")


@pytest.mark.parametrize(
    ("text", "overrides", "where", "key", "known"),
    [
        ("stepz = 3", {}, "file", "stepz", "steps"),
        ("[grpo]\nbetta = 3", {}, "file", "grpo.betta", "variant, beta"),
        ("[optimizer]\nlearning_rate = 3", {}, "file", "optimizer", "optim"),
        ("steps = 3", {"grpo.betta": "1"}, "command line", "grpo.betta", "variant, beta"),
        ("steps = 3", {"stepz": "1"}, "command line", "stepz", "steps"),
        ("config_file = 'y.toml'", {}, "file", "config_file", "steps"),
    ],
)
def test_an_unknown_key_is_an_error_that_lists_the_known_ones(
    tmp_path: Path, text: str, overrides: dict[str, str], where: str, key: str, known: str
) -> None:
    path = toml(tmp_path, text)
    sentence = told(RlvrConfig, path, STAGE | overrides)
    start = str(path) if where == "file" else where
    assert sentence.startswith(f"{start}: unknown key '{key}'; known here are ")
    listed = sentence.split("known here are ")[1]
    assert known in listed
    assert "config_file" not in listed


def test_the_keys_of_a_verb_do_not_include_its_own_arguments(tmp_path: Path) -> None:
    from rmr1.verbs.training import Demo, Rlvr

    for kind in (Demo, Rlvr):
        sentence = told(kind, toml(tmp_path, "stepz = 3"), STAGE if kind is Rlvr else {})
        assert "model" in sentence
        assert "config_file" not in sentence
        assert "json_output" not in sentence


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"data.tasks": 1},
            "command line: key 'model' is missing; set it in the file or as --model",
        ),
        (
            {"model": "x"},
            "command line: key 'data' is missing; set it in the file or as --data.path or"
            " --data.tasks or --data.seed",
        ),
        (
            {"model": "x", "data.seed": 1},
            "command line: set exactly one of data.path (a JSONL file) and data.tasks (a count)",
        ),
        (
            {"model": "x", "data.tasks": 1, "data.path": "y"},
            "command line: set exactly one of data.path (a JSONL file) and data.tasks (a count)",
        ),
        (
            {**STAGE, "rollout.prompts": 2, "rollout.samples": 2, "grpo.minibatches": 5},
            "command line: grpo.minibatches = 5 is more than the 4 judgments of a step"
            " (rollout.prompts x rollout.samples)",
        ),
        ({**STAGE, "steps.more": 1}, "command line: key 'steps'"),
        ({**STAGE, "model.x": 1}, "--model.x: model is a value, not a section"),
    ],
)
def test_what_is_missing_or_does_not_go_together(overrides: dict[str, Any], sentence: str) -> None:
    told_ = told(RlvrConfig, None, overrides)
    assert told_.startswith(sentence)


def test_the_demo_refuses_an_impossible_last_stage_at_once() -> None:
    overrides = {"rl.grpo.minibatches": 9, "rl.rollout.prompts": 2, "rl.rollout.samples": 4}
    assert "9 is more than the 8 judgments" in told(DemoConfig, None, overrides)


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    assert "No such file" in told(SftConfig, tmp_path / "absent.toml", {})
    assert "cannot be read" in told(SftConfig, tmp_path, {})
    path = toml(tmp_path, "steps = = 3")
    assert told(SftConfig, path, {}).startswith(f"{path}: no valid TOML (")
    path.write_bytes(b"name = 'caf\xe9'")
    assert told(SftConfig, path, {}).startswith(f"{path}: no valid TOML (")


@pytest.mark.parametrize(
    "text",
    [
        "steps = " + "[" * 5000 + "]" * 5000,
        "steps = " + "{a = " * 5000 + "1" + "}" * 5000,
        "steps" + ".a" * 5000 + " = 1",
        "[grpo.beta" + ".a" * 5000 + "]",
        "grpo" + ".a" * 5000 + " = 1",
        "seed = " + "1" * 5000,
        *("steps = " + "[" * depth + "]" * depth for depth in range(300, 1000, 50)),
    ],
    ids=lambda text: f"{text[:9].strip()} of {len(text)}",
)
def test_toml_without_an_end_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = toml(tmp_path, text)
    assert told(RlvrConfig, path, STAGE).startswith(f"{path}: ")


@pytest.mark.parametrize("from_file", [False, True])
def test_a_section_in_part_keeps_the_other_defaults_of_its_stage(
    tmp_path: Path, from_file: bool
) -> None:
    """The demo's rollout differs from RLVR's; one changed key does not bring the latter back."""
    before = DemoConfig()
    assert before.rl.rollout.samples != RlvrConfig.model_fields["rollout"].default.samples
    text = "[rl.rollout]\nprompts = 3\n[rl.grpo]\nbeta = 0.5\n"
    config = (
        load_config(DemoConfig, toml(tmp_path, text))
        if from_file
        else load_config(DemoConfig, None, {"rl.rollout.prompts": "3", "rl.grpo.beta": "0.5"})
    )
    changed = config.model_dump()
    assert (changed["rl"]["rollout"].pop("prompts"), changed["rl"]["grpo"].pop("beta")) == (3, 0.5)
    expected = before.model_dump()
    del expected["rl"]["rollout"]["prompts"], expected["rl"]["grpo"]["beta"]
    assert changed == expected


@pytest.mark.parametrize("from_file", [False, True])
def test_a_variant_fills_what_is_not_given(tmp_path: Path, from_file: bool) -> None:
    """It once lost to the stage's own defaults, so that every variant was RM-R1's objective."""
    text = "[grpo]\nvariant = 'gspo'\nclip_low = 0.1\n"
    config = (
        load_config(RlvrConfig, toml(tmp_path, text), STAGE)
        if from_file
        else load_config(
            RlvrConfig, None, {**STAGE, "grpo.variant": "gspo", "grpo.clip_low": "0.1"}
        )
    )
    assert config.grpo == GrpoConfig(variant="gspo", clip_low=0.1)
    assert (config.grpo.ratio, config.grpo.clip_low) == ("sequence", 0.1)
    demo = load_config(DemoConfig, None, {"rl.grpo.variant": "dapo"})
    assert demo.rl.grpo.resample_rounds == GrpoConfig(variant="dapo").resample_rounds > 0
    assert demo.rl.grpo.minibatches == DemoConfig().rl.grpo.minibatches


def test_nothing_can_be_changed_afterwards() -> None:
    config = load_config(RlvrConfig, None, STAGE)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.grpo.beta = 3.0
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.learning_rate = 3.0


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(min_size=1),
    path=st.text(min_size=1),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    memory=st.none() | st.floats(min_value=0.1, max_value=1e6),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_resolved_configuration_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    path: str,
    rate: float,
    memory: float | None,
    seed: int,
) -> None:
    config = load_config(
        RlvrConfig,
        None,
        {
            "name": name,
            "model": "m",
            "data.path": path,
            "optim.learning_rate": rate,
            "rollout.kv_memory_gb": memory,
            "seed": seed,
        },
    )
    text = to_toml(config)
    assert RlvrConfig.model_validate(tomllib.loads(text)) == config
    file = tmp_path_factory.getbasetemp() / "resolved.toml"
    file.write_text(text, encoding="utf-8", newline="")
    assert load_config(RlvrConfig, file) == config


def test_the_stages_of_a_demo_are_valid_runs() -> None:
    config = DemoConfig(seed=3)
    first, second = sft_config(config), rlvr_config(config, Path("distilled"))
    assert first.directory == config.directory / "sft"
    assert second.directory == config.directory / "rlvr"
    assert second.model == "distilled"
    assert (first.seed, second.seed) == (3, 3)
    # RL sees other pairs than the traces, and enough of them for every step.
    assert first.data.seed != second.data.seed
    assert second.data.tasks >= second.steps * second.rollout.prompts
    for stage in (first, second):
        assert load_config(type(stage), None, flat(stage.model_dump())) == stage


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        more = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        found |= more
    return found
