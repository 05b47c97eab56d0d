"""RM-Bench: reading the files, balanced placement, resuming, and the score of the whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rmr1.answers import LocalModel
from rmr1.engine.generator import Rollout, SamplingParams
from rmr1.judgment_log import repair_tail
from rmr1.prompts import load_prompt
from rmr1.rm_bench import RmBenchRun, model_id, run_rm_bench
from rmr1.rm_bench_items import Item, load_items, plan
from rmr1.score import score_file

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "rm-bench"
real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the RM-Bench files (../shared/data/rm-bench) are not on this machine"
)


def item_row(name: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": f"Question {name}?",
        "chosen": [f"right {name} {style}" for style in "cdm"],
        "rejected": [f"wrong {name} {style}" for style in "cdm"],
        "error_key": None,
    } | fields


def folder(path: Path, **domains: int) -> Path:
    """A folder with so many items of each domain (`safety_refuse` for safety-refuse)."""
    path.mkdir(exist_ok=True)
    for domain, count in domains.items():
        rows = [item_row(name) for name in range(count)]
        name = f"{domain.replace('_', '-')}_filtered.json"
        (path / name).write_text(json.dumps(rows), encoding="utf-8")
    return path


class FakeTokenizer:
    """One token a character, none of them special."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: list[dict], **_options: Any) -> str:
        return "\n".join(message["content"] for message in messages)

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class FakeGenerator:
    """Right unless the right answer is concise and the wrong one is not; stops when told to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.prompts: list[str] = []
        self.stop_after = stop_after

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        assert (params.n, params.temperature) == (1, 0.0)
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        answers = []
        for ids in prompts:
            prompt = "".join(map(chr, ids))
            self.prompts.append(prompt)
            first, second = prompt.split("[Answer A]\n")[1].split("\n[Answer B]\n")
            second = second.removesuffix("\n[End]")
            good = "A" if first.startswith("right") else "B"
            right, wrong = (first, second) if good == "A" else (second, first)
            fooled = right.endswith(" c") and not wrong.endswith(" c")
            verdict = {"A": "B", "B": "A"}[good] if fooled else good
            text = f"Ω… <answer>[[{verdict}]]</answer>"
            answers.append([Rollout([0] * 4, [0.0] * 4, text, "stop")])
            if progress is not None:
                progress(1, 4)
        return answers


def run(data: Path, output: Path, **options: Any) -> RmBenchRun:
    options = {
        "generator": FakeGenerator(),
        "model": "m@1",
        "prompt": load_prompt("compact"),
    } | options
    generator = options.pop("generator")
    model = LocalModel(generator, FakeTokenizer(), options.get("max_prompt_tokens"))
    return run_rm_bench(model, data=data, output=output, **options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_nine_judgments_an_item_with_all_that_made_them(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", chat=3, safety_refuse=2)
    told: list[tuple[int, int]] = []
    result = run(
        data,
        tmp_path / "out" / "j.jsonl",
        batch_size=7,
        progress=lambda done, total: told.append((done, total)),
    )
    rows = rows_of(result.output)
    assert result.judgments == len(rows) == 5 * 9
    assert Counter((row["domain"], row["id"]) for row in rows)["safety-refuse", 1] == 9
    assert {(row["chosen_index"], row["rejected_index"]) for row in rows} == {
        (i, j) for i in range(3) for j in range(3)
    }
    assert rows[0].keys() >= {
        "benchmark", "id", "label", "verdict", "domain", "chosen_index", "rejected_index",
        "text", "prompt_hash", "model", "seed", "placement", "format_error",
    }  # fmt: skip
    assert all((row["placement"] == "ab") == (row["label"] == "A") for row in rows)
    assert told[0] == (0, 45)
    assert told[-1] == (45, 45)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    # The fake is fooled where a concise right answer meets a detailed or markdown wrong one:
    # (0,1) and (0,2), two of the three cells above the diagonal.
    assert result.score["hard"] == pytest.approx(1 / 3)
    assert result.score["normal"] == result.score["easy"] == 1.0
    assert result.score["overall"] == pytest.approx(7 / 9)
    assert result.score == score_file(result.output, "rm-bench")
    assert result.missing_domains == ("math", "code", "safety-response")
    assert result.to_json()["missing_files"] == ["math", "code", "safety-response"]


@pytest.mark.parametrize("seed", range(4))
def test_placement_is_balanced_in_every_cell(seed: int) -> None:
    answers = ("a", "b", "c")
    items = [Item(name, "chat", "?", answers, answers) for name in range(21)]
    cells = plan(items, seed=seed)
    first = Counter((c.chosen_index, c.rejected_index) for c in cells if c.label == "A")
    assert len(first) == 9
    assert set(first.values()) <= {10, 11}  # of 21
    by_item = Counter(c.item.id for c in cells if c.label == "A")
    assert set(by_item.values()) <= {4, 5}


def test_placement_depends_on_the_seed_and_not_on_the_limit() -> None:
    answers = ("a", "b", "c")
    items = [Item(name, "chat", "?", answers, answers) for name in range(40)]
    labels = {seed: [cell.label for cell in plan(items, seed=seed)] for seed in range(6)}
    for seed, mine in labels.items():
        assert mine == [cell.label for cell in plan(items, seed=seed)]
        assert mine[: 9 * 7] == [cell.label for cell in plan(items[:7], seed=seed)]
        for other in range(seed):
            # Two seeds agree on a cell half of the time: 180 of 360 +- 4 standard deviations
            # (pairs of items agree together, so sqrt(180 x 4 x 1/4) = 13).
            agree = sum(a == b for a, b in zip(mine, labels[other], strict=True))
            assert 180 - 54 < agree < 180 + 54
    # The label tells nothing about the cell: over seeds each cell is A half of the time.
    share = Counter()
    for seed in range(300):
        share.update(
            index for index, cell in enumerate(plan(items[:2], seed=seed)) if cell.label == "A"
        )
    assert all(150 - 40 < share[index] < 150 + 40 for index in range(18))


def test_both_orders(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", chat=2)
    result = run(data, tmp_path / "j.jsonl", both_orders=True)
    rows = rows_of(result.output)
    assert len(rows) == 36
    assert Counter(row["label"] for row in rows) == {"A": 18, "B": 18}
    assert result.score["duplicates"] == 0
    # A one-order run before it is kept and filled up.
    single = run(data, tmp_path / "k.jsonl")
    both = run(data, single.output, both_orders=True)
    assert (both.judgments, both.resumed) == (36, 18)
    assert both.score["overall"] == pytest.approx(result.score["overall"])


def test_limit_takes_items_of_each_file(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", chat=4, safety_response=3, safety_refuse=1)
    items = load_items(data, limit=2).items
    assert Counter(item.domain for item in items) == {
        "chat": 2, "safety-response": 2, "safety-refuse": 1,
    }  # fmt: skip
    output = tmp_path / "j.jsonl"
    assert run(data, output, limit=1).judgments == 27
    more = run(data, output, limit=2)
    assert (more.judgments, more.resumed) == (45, 27)
    assert more.to_json()["new"] == 18
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_items(data, limit=0)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", chat=3)
    whole = run(data, tmp_path / "whole.jsonl", batch_size=4)
    output = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(data, output, batch_size=4, generator=FakeGenerator(stop_after=8))
    assert len(rows_of(output)) == 8  # two batches are safe
    generator = FakeGenerator()
    rest = run(data, output, batch_size=4, generator=generator)
    assert (rest.resumed, len(generator.prompts)) == (8, 19)
    assert output.read_bytes() == whole.output.read_bytes()
    idle = FakeGenerator()
    assert run(data, output, generator=idle).score == whole.score
    assert idle.prompts == []


def test_a_torn_last_line_is_mended_at_any_byte(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", chat=1)
    whole = run(data, tmp_path / "whole.jsonl").output.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    output = tmp_path / "torn.jsonl"
    ends = [start + 1, start + 2, whole.index("Ω".encode(), start) + 1, len(whole) - 2]
    for end in [*ends, len(whole) - 1]:
        output.write_bytes(whole[:end])
        generator = FakeGenerator()
        run(data, output, generator=generator)
        assert output.read_bytes() == whole
        # Only a row that lacks nothing but its newline is kept.
        assert len(generator.prompts) == (0 if end == len(whole) - 1 else 1)
    output.write_bytes(whole)
    assert not repair_tail(output)


def test_a_bad_line_inside_is_an_error_and_the_file_stays(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", chat=1)
    output = run(data, tmp_path / "j.jsonl").output
    lines = output.read_bytes().splitlines(keepends=True)
    broken = b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]])
    output.write_bytes(broken)
    with pytest.raises(ValueError, match=r"j\.jsonl, line 2: no JSON"):
        run(data, output)
    assert output.read_bytes() == broken


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"domain": ["chat"]}, r'field "domain" must be one of chat, .* got \[\'chat\'\]'),
        ({"chosen_index": [1]}, r'field "chosen_index" must be one of 0, 1, 2, got \[1\]'),
        ({"chosen_index": 7}, r'field "chosen_index" must be one of 0, 1, 2, got 7'),
        ({"verdict": "Z"}, r'field "verdict" must be one of A, B, tie, null, got \'Z\''),
        ({"label": {}}, r'field "label" must be one of A, B'),
        ({"id": None}, r'field "id" is None'),
        ({"rejected_index": ...}, r'field "rejected_index" is missing'),
        (None, "a judgment must be a JSON object, got list"),
    ],
)
def test_a_bad_row_is_found_before_anything_is_judged(
    tmp_path: Path, change: dict[str, Any] | None, told: str
) -> None:
    data = folder(tmp_path / "data", chat=2)
    output = run(data, tmp_path / "j.jsonl", limit=1).output
    rows: list[Any] = rows_of(output)
    fields = {**rows[3], **(change or {})}
    rows[3] = [1] if change is None else {k: v for k, v in fields.items() if v is not ...}
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = output.read_bytes()
    generator = FakeGenerator()
    with pytest.raises(ValueError, match=rf"j\.jsonl, line 4: {told}"):
        run(data, output, generator=generator)
    assert generator.prompts == []
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ({"model": "m@2"}, "model"),
        ({"prompt": load_prompt("rubric")}, "prompt_hash"),
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
    ],
)
def test_runs_are_not_mixed(tmp_path: Path, option: dict[str, Any], field: str) -> None:
    data = folder(tmp_path / "data", chat=1)
    output = run(data, tmp_path / "j.jsonl").output
    before = output.read_bytes()
    with pytest.raises(ValueError, match=rf'j\.jsonl, line 1: field "{field}" is .*another output'):
        run(data, output, **option)
    assert output.read_bytes() == before


def test_a_long_prompt_is_a_row_without_a_verdict(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    long = item_row(1, chosen=["right c", "right d", "right " + "x" * 3000 + " m"])
    (data / "code_filtered.json").write_text(json.dumps([long]), encoding="utf-8")
    result = run(data, tmp_path / "j.jsonl", max_prompt_tokens=1000)
    assert result.prompts_too_long == 3
    assert result.score["parse_failure_rate"] == pytest.approx(3 / 9)
    skipped = [row for row in rows_of(result.output) if row["skipped"]]
    assert all(row["verdict"] is None and row["chosen_index"] == 2 for row in skipped)
    assert all(row["prompt_tokens"] > 3000 for row in skipped)


def test_total_dataset_names_its_domains(tmp_path: Path) -> None:
    rows = [item_row(1, domain="math"), item_row(1, domain="safety-refuse")]
    (tmp_path / "total_dataset.json").write_text(json.dumps(rows), encoding="utf-8")
    found = load_items(tmp_path)
    assert [item.domain for item in found.items] == ["math", "safety-refuse"]
    assert found.missing == ("chat", "code", "safety-response")
    kinds = {cell.item.domain: cell.pair().kind for cell in plan(found.items, seed=0)}
    assert kinds == {"math": "reasoning", "safety-refuse": "chat"}


def test_a_repeated_id_stays_two_items(tmp_path: Path) -> None:
    rows = [item_row(5), item_row(5, prompt="Another?")]
    (tmp_path / "math_filtered.json").write_text(json.dumps(rows), encoding="utf-8")
    assert [item.id for item in load_items(tmp_path).items] == [5, "5#2"]
    assert run(tmp_path, tmp_path / "j.jsonl").score["n"] == 18


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (item_row(1, chosen=["a", "b"]), r'item 1: field "chosen" .* got 2 entries'),
        (item_row(1, rejected=["a", "b", None]), r'item 1: field "rejected"'),
        (item_row(1, rejected="abc"), r'item 1: field "rejected"'),
        (item_row(1, prompt=" "), r'item 1: field "prompt"'),
        (item_row(1, id=None), r'item 1: field "id"'),
        (["x"], r"item 1: an item must be a JSON object"),
        (item_row(1, prompt="half \ud83d"), r'item 1: field "prompt" holds half a surrogate pair'),
        (item_row(1, chosen=["a", "b", "\ud83d"]), r'item 1: field "chosen\[2\]" holds half a sur'),
        (item_row(1, rejected=["\ude00", "b", "c"]), r'item 1: field "rejected\[0\]" holds half'),
        (item_row(1, id="\ud83d"), r'item 1: field "id" holds half a surrogate pair'),
    ],
)
def test_a_bad_item_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "chat_filtered.json"
    path.write_text(json.dumps([item_row(0), row]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"chat_filtered\.json, {message}"):
        load_items(tmp_path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_items(tmp_path / "absent")
    with pytest.raises(ValueError, match="no RM-Bench file"):
        load_items(tmp_path)
    path = tmp_path / "chat_filtered.json"
    path.write_text('[{"id": 1,', encoding="utf-8")
    with pytest.raises(ValueError, match=r"chat_filtered\.json, line 1: no JSON"):
        load_items(tmp_path)
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"chat_filtered\.json: the bytes are no UTF-8"):
        load_items(tmp_path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a JSON list"):
        load_items(tmp_path)
    for text in ("[" * 100_000, "[" + "1" * 5000 + "]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"chat_filtered\.json: no JSON that can be read"):
            load_items(tmp_path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"chat_filtered\.json: the list holds no items"):
        run(tmp_path, tmp_path / "j.jsonl")
    assert not (tmp_path / "j.jsonl").exists()
    path.unlink()
    row = item_row(1, domain="poetry")
    (tmp_path / "total_dataset.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(ValueError, match=r'total_dataset\.json, item 0: field "domain"'):
        load_items(tmp_path)


def test_model_id_follows_the_weights(tmp_path: Path) -> None:
    model = tmp_path / "step-000010"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    weights = bytearray(3 << 20)
    (model / "model.safetensors").write_bytes(weights)
    first = model_id(model)
    assert first.startswith("step-000010@")
    (model / "notes.txt").write_text("not part of it", encoding="utf-8")
    assert model_id(model) == first
    weights[-1] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert model_id(model) != first
    with pytest.raises(ValueError, match="no such folder"):
        model_id(tmp_path / "absent")


@real_data
def test_the_real_files(tmp_path: Path) -> None:
    found = load_items(REAL)
    assert Counter(item.domain for item in found.items) == {
        "chat": 129, "safety-refuse": 284, "safety-response": 157,
    }  # fmt: skip
    assert found.missing == ("math", "code")
    cells = plan(found.items, seed=0)
    assert len(cells) == 570 * 9
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(cell.pair().answer_a and cell.pair().answer_b for cell in cells)


class LikesShort(FakeGenerator):
    """Prefers the shorter answer: bad at style, and able to read any text."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        answers = []
        for ids in prompts:
            first, second = "".join(map(chr, ids)).split("[Answer A]\n")[1].split("[Answer B]\n")
            verdict = "A" if len(first) < len(second) else "B"
            text = f"<answer>[[{verdict}]]</answer>"
            answers.append([Rollout([0], [0.0], text, "stop")])
        return answers


@real_data
def test_real_items_judged_and_rescored(tmp_path: Path) -> None:
    result = run(REAL, tmp_path / "j.jsonl", limit=20, generator=LikesShort())
    assert result.judgments == 3 * 20 * 9
    again = score_file(result.output, "rm-bench")
    assert again == result.score
    assert set(again["missing"]) == {"math", "code"}
    # Who likes it short is right when style argues for the wrong answer, and wrong otherwise.
    assert again["hard"] > 0.9
    assert again["easy"] < 0.2
