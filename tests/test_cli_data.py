"""The verb `rmr1 data build`: its settings, its table, and what it says of wrong use."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmr1.cli import main
from rmr1.config import RlvrConfig, load_config
from rmr1.data import read_pairs
from rmr1.datasets.build_config import BuildConfig

RECIPES = Path(__file__).parent.parent / "recipes"
Told = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def write_rows(count: int) -> None:
    """Skywork's rows from five sources in turn."""
    with Path("rows.jsonl").open("w") as stream:
        for n in range(count):
            turns = [{"role": "user", "content": f"Question {n}?"}]
            row: dict[str, Any] = {
                side: [*turns, {"role": "assistant", "content": f"{side} {n}"}]
                for side in ("chosen", "rejected")
            }
            stream.write(json.dumps(row | {"source": f"source-{n % 5}"}) + "\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sources": {}}, "there is no source"),
        (
            {"sources": {"a": {"path": "x"}}, "split": {"distill": 1}},
            "output.distill does not name",
        ),
        ({"sources": {"a": {}}}, "exactly one of path, hub and tasks"),
        ({"sources": {"a": {"path": "x", "hub": "y"}}}, "exactly one of path, hub and tasks"),
        ({"sources": {"a": {"path": "x", "split": "y"}}}, "belong to hub"),
        ({"sources": {"a": {"path": "x", "format": "trl"}}}, "do not say their kind"),
        ({"sources": {"a": {"tasks": 3, "kind": "chat"}}}, "have a kind; remove the key"),
        ({"sources": {"a": {"tasks": 3, "keep": ["a"], "drop": ["b"]}}}, "keep or drop"),
        ({"sources": {"a.b": {"tasks": 3}}}, "match pattern"),
        ({"filters": {"max_prompt_tokens": 5}}, "filters.model together"),
        ({"filters": {"stray_tokens": [""]}}, "an empty text"),
        ({"filters": {"near_duplicates": 0}}, "greater than 0"),
        ({"output": {"rl": "x.csv"}}, "must end in .jsonl or .parquet"),
        ({"output": {"rl": "x.jsonl", "distill": "./x.jsonl"}}, "name the same file"),
        ({"sources": {"a": {"path": "."}}, "output": {"rl": "x.jsonl"}}, "lies in a source"),
    ],
)
def test_settings_that_do_not_go_together(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked here
        load_config(BuildConfig, None, {"sources": {"a": {"tasks": 3}}, **change})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["data", "build", *args])
        return code, *capsys.readouterr()

    return call


TOML = """
[sources.sky]
path = "rows.jsonl"
format = "skywork"
kind = "chat"
drop = ["source-0"]
[sources.sky.expect]
source-1 = 10
"""


def test_the_table_and_its_json(told: Told) -> None:
    write_rows(50)
    Path("x.toml").write_text(TOML)
    code, out, err = told("x.toml", "--output.report", "made/r.json")
    assert code == 0
    assert re.search(r"source-0 +10 +- +10 +0 +-", out)
    assert re.search(r"source-1 +10 +10 +0 +10 +50.0%", out)
    assert re.search(r"rl +rl.jsonl +40 +20 +20", out)
    assert "not as expected" not in err
    code, out, err = told("x.toml", "--json", "--sources.sky.limit", "20", "--name=small")
    assert code == 0
    report = json.loads(out)
    assert report["name"] == "small"
    assert report["config"]["sources"]["sky"]["limit"] == 20
    assert sum(report["sets"]["rl"].values()) == 20
    assert json.loads(Path("made/r.json").read_text())["sets"]["rl"]["source-1"] == 10
    write_rows(40)
    assert "not as expected: source source-1 has 8 rows, expected 10" in told("x.toml")[2]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--sources.sky.path", "gone.jsonl"], "gone.jsonl: no such file"),
        (
            ["--sources.sky.pth=x"],
            "command line: unknown key 'sources.sky.pth'; known here are path",
        ),
        (
            ["--sources.sky.limit", "many"],
            "key 'sources.sky.limit': Input should be a valid integer",
        ),
        (["--sources.sky.drop", '["a"'], "argument --sources.sky.drop: no JSON"),
        (["--sources.sky.drop", "[1]"], "key 'sources.sky.drop.0': Input should be a valid string"),
        (["--sources.sky.expect", "a"], "argument --sources.sky.expect: write NAME=VALUE"),
        (["--sources.sky.limit"], "argument --sources.sky.limit: expected one argument"),
        (["--strict"], "source source-1 has 1 rows, expected 10"),
    ],
)
def test_wrong_use(told: Told, args: list[str], sentence: str) -> None:
    write_rows(4)
    Path("x.toml").write_text(TOML)
    code, out, err = told("x.toml", *args)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("rmr1: ")
    assert sentence in last


@pytest.mark.parametrize(
    "args",
    [
        ["--sources.sky.drop", "source-1,source-2"],
        ['--sources.sky.drop=["source-1", "source-2"]'],
        ["--sources.sky.drop", "source-1", "--sources.sky.drop", "source-2"],
    ],
)
def test_a_list_in_a_named_section(told: Told, args: list[str]) -> None:
    write_rows(50)
    Path("x.toml").write_text(TOML)
    code, out, _ = told("x.toml", "--json", "--sources.sky.expect", "source-3=10", *args)
    assert code == 0
    report = json.loads(out)
    assert report["config"]["sources"]["sky"]["drop"] == ["source-1", "source-2"]
    assert report["config"]["sources"]["sky"]["expect"] == {"source-3": 10}
    assert set(report["sets"]["rl"]) == {"source-0", "source-3", "source-4"}


def test_every_key_of_a_named_section_can_be_given(told: Told) -> None:
    """Each as the file would have it, none with its default."""
    Path("x.toml").write_text(TOML.replace('drop = ["source-0"]', "limit = 20"))
    write_rows(50)
    given: dict[str, Any] = {
        "keep": ["source-1", "magpie_pro_llama3.1"],
        "expect": {"magpie_pro_llama3.1": 3, "source-1": 4},
        "traces": False,
        "sample": 3,
        "limit": None,
        "format": "skywork",
        "kind": "chat",
    }
    texts = {key: "unset" if value is None else str(value) for key, value in given.items()}
    texts["keep"], texts["expect"] = ",".join(given["keep"]), json.dumps(given["expect"])
    args = [word for key, text in texts.items() for word in (f"--sources.sky.{key}", text)]
    code, out, _ = told("x.toml", "--json", *args)
    assert code == 0
    found = json.loads(out)["config"]["sources"]["sky"]
    assert {key: found[key] for key in given} == given
    code, out, _ = told("x.toml", "--json", "--sources.sky.drop", "")
    assert (code, json.loads(out)["config"]["sources"]["sky"]["drop"]) == (0, [])


@pytest.mark.parametrize("name", ["new/pairs.parquet", "new/pairs.jsonl"])
def test_tasks_can_be_checked_by_their_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "tasks", "--output", name, "--count", "3"]) == 0
    assert main(["data", "check", "--input", name]) == 0
    assert "3 pairs, all readable" in capsys.readouterr().out


def test_options_before_the_word_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--seed", "1", "build"]) == 2
    assert "write `rmr1 data build CONFIG.toml` first" in capsys.readouterr().err


def test_a_wrong_type_in_a_named_section_names_its_key(
    told: Told,
) -> None:
    for text, sentence in (
        ("[sources.a]\ntasks = '3'", "key 'sources.a.tasks': Input should be a valid integer"),
        ("[sources]\na = 3", "key 'sources.a' is a section, got 3"),
        ("sources = 3", "key 'sources' is a section, got 3"),
        ("[sources.a]\ntask = 3", "unknown key 'sources.a.task'; known here are path, hub, tasks"),
        ("seed = 1", "key 'sources' is missing"),
    ):
        Path("x.toml").write_text(text)
        assert f"x.toml: {sentence}" in told("x.toml")[2]


def test_the_laptop_recipe(told: Told) -> None:
    args = ("--sources.tasks.tasks", "68", "--sources.traced.tasks", "17", "--json")
    code, out, _ = told(str(RECIPES / "data-laptop.toml"), *args)
    assert code == 0
    report = json.loads(out)
    assert report["mismatches"] == []
    assert sum(report["sets"]["distill"].values()) == 17
    assert sum(report["sets"]["rl"].values()) == 51


def test_the_counts_of_the_papers_recipe_add_up() -> None:
    recipe = load_config(BuildConfig, RECIPES / "data-rm-r1.toml")
    rows = sum(sum(source.expect.values()) for source in recipe.sources.values())
    rows += sum(source.sample or 0 for source in recipe.sources.values())
    assert rows == 72_983  # the published RL set
    assert rows - recipe.split.distill == recipe.split.expect_rl == 64_226
    # The recipe's sets are called as the stages that read them call them.
    reads = load_config(RlvrConfig, RECIPES / "rlvr-qwen2.5-7b.toml").data.path
    assert Path(recipe.output.rl).name == Path(reads).name
    assert Path(recipe.output.distill) == Path(recipe.output.rl).with_name("distill.jsonl")


DISTILLED = sorted(RECIPES.glob("rlvr-deepseek-*.toml"))


def commands(recipe: Path) -> list[str]:
    """The builds in the comments of a file."""
    lines = recipe.read_text().splitlines()
    return [line.removeprefix("#   ") for line in lines if line.startswith("#   rmr1 data build")]


@pytest.mark.parametrize("recipe", DISTILLED, ids=lambda path: path.stem)
def test_recipes_without_distillation_say_how_their_data_is_built(recipe: Path, told: Told) -> None:
    """By the very command in their comments, beside the others' data and without touching it."""
    (command,) = commands(recipe)
    assert command in commands(RECIPES / "data-rm-r1.toml")
    write_rows(30)
    code = [{"input": f"i{n}", "accepted": "a", "rejected": "b"} for n in range(20)]
    maths = [{"prompt": f"p{n}", "initial_reason_steps": "", "full_chosen": "a",
              "full_rejected": "b"} for n in range(10)]  # fmt: skip
    for name, rows in (("code", code), ("math", maths)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    here = []
    for name, file in (("skywork", "rows"), ("code", "code"), ("math", "math")):
        here += [f"--sources.{name}.hub", "", f"--sources.{name}.path", f"{file}.jsonl"]
    plain = str(RECIPES / "data-rm-r1.toml")
    assert told(plain, *here, "--split.distill", "8")[0] == 0
    others = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    assert len(others) == 4
    words = shlex.split(command)
    assert words[:4] == ["rmr1", "data", "build", "recipes/data-rm-r1.toml"]
    assert told(plain, *words[4:], *here)[0] == 0
    config = load_config(RlvrConfig, recipe)
    assert config.data.path not in map(str, others)
    assert len(read_pairs(config.data.path)) == 60
    assert {path: path.read_bytes() for path in others} == others
    wanted = int(words[words.index("--split.expect_rl") + 1])
    assert config.steps == wanted // config.rollout.prompts
