"""Contamination: benchmark prompts are found in training prompts, and others are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmr1.data import Message
from rmr1.datasets.contamination import Benchmarks, Hit, benchmark_prompts
from rmr1.datasets.shingles import words
from rmr1.evals.rm_bench_items import load_rm_bench
from rmr1.tasks.catalog import draw_pairs

RM_BENCH = Path(__file__).parent.parent.parent / "shared" / "data" / "rm-bench"
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def benchmark(folder: Path, *prompts: object, field: str = "prompt") -> Path:
    path = folder / "bench.jsonl"
    path.write_text("".join(json.dumps({field: prompt, "id": 1}) + "\n" for prompt in prompts))
    return path


def test_equal_words_are_found_whatever_case_and_punctuation(tmp_path: Path) -> None:
    path = benchmark(tmp_path, "What's the capital of France?", LONG, "!?")
    found = Benchmarks({"mine": str(path)}, overlap=0.5)
    assert found.prompts == {"mine": 2}  # one without a word cannot be asked
    assert found.hit([user("what's the capital of FRANCE")]) == Hit("mine", f"{path}, line 1", 1.0)
    assert found.hit([user("What is the capital of Spain?")]) is None
    assert found.hit([user("!!!")]) is None


CAPITAL = "What's the capital of France?"
ASKS: Message = {"role": "assistant", "content": "What is it?"}


def test_a_short_prompt_inside_a_turn_is_found(tmp_path: Path) -> None:
    path = benchmark(tmp_path, CAPITAL, "Hi", "What is suicide?", "Is it so? I see it")
    found = Benchmarks({"mine": str(path)}, overlap=0.5)
    whole = Hit("mine", f"{path}, line 1", 1.0)
    assert found.hit([user(f"{CAPITAL} Thanks")]) == whole
    assert found.hit([user(f"{LONG} {CAPITAL} {LONG}")]) == whole
    assert found.hit([user("Hello"), ASKS, user(f"Please: {CAPITAL}")]) == whole
    # Not all of it, not in a row, and not over the end of a turn.
    assert found.hit([user("What's the capital of Spain? And of France?")]) is None
    assert (
        found.hit([user("What's the capital of"), ASKS, user("France?")]) is not None
    )  # the whole
    assert found.hit([user("So what's the capital of"), ASKS, user("France?")]) is None
    # Under five words or twenty characters only a turn that says no more.
    for short in ("Hi", "What is suicide?", "Is it so? I see it"):
        assert found.hit([user(short)]) is not None
        assert found.hit([user("Well"), ASKS, user(short)]) is not None
        assert found.hit([user(f"{short} Thanks")]) is None
    assert found.hit([ASKS]) is None


def test_of_two_prompts_the_longer_is_named(tmp_path: Path) -> None:
    path = benchmark(tmp_path, CAPITAL, f"{CAPITAL[:-1]} and of Spain?")
    found = Benchmarks({"mine": str(path)}, overlap=0.5)
    hit = found.hit([user(f"{CAPITAL} And of Spain? Thanks")])
    assert hit is not None
    assert hit.item == f"{path}, line 2"


def test_each_turn_is_compared_by_itself(tmp_path: Path) -> None:
    """Two of the three runs of a turn, which are few of the whole conversation's."""
    longer = f"{LONG} sixteen {' '.join(f'end{n}' for n in range(40))}"
    found = Benchmarks({"mine": str(benchmark(tmp_path, longer))}, overlap=0.5)
    turn = user(" ".join([*LONG.split()[:14], "other"]))
    filler = user(" ".join(f"word{n}" for n in range(200)))
    for conversation in ([turn], [filler, ASKS, turn], [turn, ASKS, filler]):
        hit = found.hit(conversation)
        assert hit is not None
        assert hit.overlap == pytest.approx(2 / 3)


def test_runs_of_13_words_count_by_the_shorter_text(tmp_path: Path) -> None:
    found = Benchmarks({"mine": str(benchmark(tmp_path, LONG))}, overlap=0.5)
    filler = " ".join(f"word{n}" for n in range(200))
    hit = found.hit([user(f"{filler} {LONG} {filler}")])
    assert hit is not None
    assert hit.overlap == 1.0
    fourteen = " ".join(LONG.split()[:14])  # two of its three runs
    hit = found.hit([user(f"{fourteen} {filler}")])
    assert hit is not None
    assert hit.overlap == pytest.approx(2 / 3)
    thirteen = " ".join(LONG.split()[:13])
    assert found.hit([user(f"{thirteen} {filler}")]) is None
    assert found.hit([user(filler)]) is None


def test_only_what_the_user_says_is_compared(tmp_path: Path) -> None:
    found = Benchmarks({"mine": str(benchmark(tmp_path, LONG))}, overlap=0.5)
    reply: Message = {"role": "assistant", "content": LONG}
    assert found.hit([user("Hi"), reply, user("Thanks")]) is None
    assert (
        found.hit([user("Hi"), {"role": "assistant", "content": "Hello"}, user(LONG)]) is not None
    )


def test_rmb_and_messages(tmp_path: Path) -> None:
    turns = [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Tell me a joke")]
    for field in ("conversation_input", "prompt"):
        path = benchmark(tmp_path, turns, field=field)
        assert [text for _, text in benchmark_prompts(path)] == ["Hi\nTell me a joke"]
        assert Benchmarks({"rmb": str(path)}, overlap=0.5).hit(turns) is not None


@pytest.mark.parametrize("prompt", [3, ["x"], None])
def test_a_row_without_a_prompt(tmp_path: Path, prompt: object) -> None:
    path = benchmark(tmp_path, prompt)
    with pytest.raises(ValueError, match=r"line 1: a benchmark's row needs .*found prompt, id"):
        list(benchmark_prompts(path))


@pytest.mark.skipif(not RM_BENCH.is_dir(), reason=f"{RM_BENCH} is not here")
def test_rm_bench_as_published() -> None:
    found = Benchmarks({"rm-bench": str(RM_BENCH)}, overlap=0.5)
    items = load_rm_bench(RM_BENCH).items
    prompts = [item.conversation[-1]["content"] for item in items]
    assert found.prompts["rm-bench"] == len({prompt.casefold() for prompt in prompts})
    assert all(found.hit([user(prompt)]) for prompt in prompts)
    padded = [user(f"Please help me with this. {prompt} Thank you!") for prompt in prompts]
    long = [turn for turn, prompt in zip(padded, prompts, strict=True) if len(prompt.split()) > 15]
    assert len(long) > 100
    assert all(found.hit([turn]) for turn in long)
    # Of 568 prompts 13 are too short to be found inside a longer turn.
    distinct = {" ".join(words(prompt)): prompt for prompt in prompts}.values()
    assert len(distinct) == 568
    thanked = [found.hit([user(f"{prompt} Thanks")]) is None for prompt in distinct]
    second = [found.hit([user("A question."), ASKS, user(prompt)]) is None for prompt in distinct]
    assert (sum(thanked), sum(second)) == (13, 0)
    # Its answers are no prompts of it, but for some that begin by asking again; nor are others.
    asked = dict(benchmark_prompts(RM_BENCH))
    for item in items:
        if hit := found.hit([user(item.contests[3].chosen)]):
            assert words(asked[hit.item]) == words(item.conversation[-1]["content"])
    assert not any(found.hit(pair.conversation) for pair in draw_pairs(500, seed=0, split="train"))
