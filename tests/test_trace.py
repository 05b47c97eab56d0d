"""Traces from endpoints: two passes, checks, costs, failures, resuming; a real server."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import Reply, Request, Server, serving

from rmr1.cli import main
from rmr1.data import Message, Pair, read_pairs, write_pairs
from rmr1.judgment_log import appending
from rmr1.models import POCKET
from rmr1.traces.check import correction, fault_of
from rmr1.traces.trace import TraceConfig, TraceReport, trace

KEY = "sk-secret-0123456789"
JUDGMENT = (
    "<type>Reasoning</type>\n<solution>It is 4.</solution>\n<eval><quote_A>4</quote_A> fits"
    "</eval>\n<answer>[[{}]]</answer>"
)
PRICES = {"input_price": 10.0, "output_price": 100.0}  # 100 and 10 tokens: 0.002 dollars


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


def pair(number: int) -> Pair:
    label = "A" if number % 2 else "B"
    conversation: tuple[Message, ...] = ({"role": "user", "content": f"What is {number} + 0?"},)
    return Pair(f"p{number}", "tests", conversation, "a", "b", label, "reasoning")


def number_of(request: Request) -> int:
    (found,) = set(re.findall(r"What is (\d+) \+ 0", request["messages"][1]["content"]))
    return int(found)


def right(request: Request) -> Reply:
    return Reply(JUDGMENT.format(pair(number_of(request)).label))


def wrong(request: Request) -> Reply:
    return Reply(JUDGMENT.format("B" if pair(number_of(request)).label == "A" else "A"))


class Traces:
    """Runs `trace` on some pairs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out" / "traces.jsonl"

    def config(self, server: Server | str, pairs: int = 4, **more: Any) -> TraceConfig:
        url = server if isinstance(server, str) else server.url
        path = self.folder / "pairs.jsonl"
        write_pairs(path, [pair(number) for number in range(pairs)])
        endpoint = {
            "base_url": url, "key_variable": "TEACHER_KEY", "retries": 0, "concurrency": 2,
            "timeout": 5.0,
        }  # fmt: skip
        teacher = {**endpoint, "model": "teacher", **more.pop("teacher", {})}
        corrector = {**endpoint, **more.pop("corrector", {})}
        return TraceConfig.model_validate(
            {"pairs": str(path), "output": str(self.output), "teacher": teacher,
             "corrector": corrector, **more}
        )  # fmt: skip

    def __call__(self, server: Server | str, pairs: int = 4, **more: Any) -> TraceReport:
        return trace(self.config(server, pairs, **more))

    def written(self) -> list[Pair]:
        return read_pairs(self.output)

    def log(self) -> list[dict[str, Any]]:
        lines = self.output.with_suffix(".log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def run(tmp_path: Path) -> Traces:
    return Traces(tmp_path)


def test_what_the_teacher_gets_wrong_a_second_model_writes_anew(run: Traces) -> None:
    def answer(request: Request, _: int) -> Reply:
        if request["model"] == "second":
            return right(request)
        return wrong(request) if number_of(request) == 2 else right(request)

    with serving(answer) as server:
        report = run(server, corrector={"model": "second", "send_sampling": False}, temperature=0.5)
    figures = report.to_json()
    assert (figures["traces"], figures["right_at_once"], figures["corrected"]) == (4, 3, 1)
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (500, 50)
    assert [one.id for one in run.written()] == ["p0", "p1", "p2", "p3"]
    assert all(f"[[{one.label}]]" in one.trace for one in run.written())
    assert server.keys == [f"Bearer {KEY}"] * 5
    (second,) = [one for one in server.requests if one["model"] == "second"]
    system, task, flawed, told = second["messages"]
    assert [turn["role"] for turn in (system, task, flawed, told)] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert flawed["content"] == JUDGMENT.format("A")
    assert told["content"].startswith("That verdict is wrong: answer B is the better one.")
    assert "temperature" not in second
    first = [one for one in server.requests if one["model"] == "teacher"]
    assert all(one["temperature"] == 0.5 and one["max_tokens"] == 4096 for one in first)
    # Of a temperature that was not sent nothing is claimed.
    assert {(row["model"], row["temperature"]) for row in run.log()} == {
        ("teacher", 0.5), ("second", None),
    }  # fmt: skip
    # The label is in no first request: those that differ in it only are the same.
    assert not any("[[B]] is" in json.dumps(one) for one in first)


def test_no_trace_without_a_second_model_or_when_it_fails_too(run: Traces) -> None:
    with serving(lambda request, _: wrong(request)) as server:
        assert run(server).to_json()["rejected"] == {"wrong verdict": 4}
        again = run(server, corrector={"model": "second"}).to_json()
    assert again["rejected"] == {"wrong verdict": 4}
    assert [one["model"] for one in server.requests] == ["teacher"] * 4 + ["second"] * 4
    assert run.output.read_text() == ""


@pytest.mark.parametrize(
    ("text", "step", "fault"),
    [
        (JUDGMENT.format("B"), "teacher", ""),
        (JUDGMENT.format("A"), "teacher", "wrong verdict"),
        ("I cannot say.", "teacher", "no verdict (NO_TYPE)"),
        ("<answer>[[B]]</answer>", "teacher", "format (NO_TYPE)"),
        (JUDGMENT.format("B").replace("It is 4", "I was told B"), "teacher", ""),
        (JUDGMENT.format("B").replace("It is 4", "I was told B"), "corrector", "speaks of what"),
        (JUDGMENT.format("B").replace("It is 4", "The correct label is B"), "corrector", "speaks"),
        (JUDGMENT.format("B").replace("It is 4", "The correct answer is 4"), "corrector", ""),
        (JUDGMENT.format("B").replace("It is 4", "As I know that B is better"), "corrector", "spe"),
        (JUDGMENT.format("B").replace("It is 4", "The reference says B"), "corrector", "speaks"),
        (
            JUDGMENT.format("B").replace(
                "It is 4", "The instruction says that the verdict must be B"
            ),
            "corrector",
            "speaks",
        ),
        (
            JUDGMENT.format("B").replace(">4<", ">I was told the train was late<"),
            "corrector",
            "",
        ),
    ],
)
def test_what_is_wrong_with_a_judgment(text: str, step: Any, fault: str) -> None:
    found = fault_of(text, pair(0), step, cut=False, strict=True)
    assert found == "" if not fault else found.startswith(fault)


def test_loose_formats_and_cut_judgments() -> None:
    answer = "<answer>[[B]]</answer>"
    assert fault_of(answer, pair(0), "teacher", cut=False, strict=False) == ""
    assert fault_of(answer, pair(0), "teacher", cut=True, strict=False).startswith("cut by")
    told = correction([], "x", "no verdict (NO_TYPE)", pair(0))[-1]["content"]
    assert told.startswith("That is no judgment (no verdict (NO_TYPE)): answer B is the better")


def test_errors_that_pass_are_tried_again(run: Traces) -> None:
    def answer(request: Request, number: int) -> Reply:
        if number == 0:
            return Reply(status=429, body={"error": {"message": "slow down"}},
                         headers={"Retry-After": "0.05"})  # fmt: skip
        if number == 1:
            return Reply(status=503, body=b"<html>no", headers={"Retry-After": "0.05"})
        return right(request)

    with serving(answer) as server:
        report = run(server, teacher={"retries": 3, "concurrency": 1}).to_json()
    assert (report["traces"], report["failed_requests"], len(server.requests)) == (4, 0, 6)


@pytest.mark.parametrize(
    "bad",
    [
        Reply(body=b"not json"),
        Reply(body={}),
        Reply(status=500, body={"error": {"message": "oh"}}),
        Reply("x", before=lambda: time.sleep(1.0)),
    ],
    ids=["text", "empty", "500", "slow"],
)
def test_a_request_that_fails_is_left_for_the_next_run(run: Traces, bad: Reply) -> None:
    def answer(request: Request, _: int) -> Reply:
        return bad if failing and number_of(request) == 1 else right(request)

    failing = True
    with serving(answer) as server:
        report = run(server, teacher={"timeout": 0.5}).to_json()
        assert (report["traces"], report["failed_requests"]) == (3, 1)
        assert [one.id for one in run.written()] == ["p0", "p2", "p3"]
        before = len(server.requests)
        failing = False
        report = run(server).to_json()
    assert (report["traces"], report["failed_requests"], report["new_answers"]) == (4, 0, 1)
    assert len(server.requests) == before + 1  # nothing else is asked for again
    assert [one.id for one in run.written()] == ["p0", "p1", "p2", "p3"]


def test_what_a_server_refuses_is_not_asked_again_and_blocks_nothing(run: Traces) -> None:
    """Twelve of sixty, in a row: the prompts before them were answered, and those behind are."""

    def answer(request: Request, _: int) -> Reply:
        if 10 <= number_of(request) < 22:
            return Reply(status=400, body={"error": {"message": "content policy"}})
        return right(request)

    with serving(answer) as server:
        one: Any = {"teacher": {"concurrency": 1}, "corrector": {"model": "second"}}
        figures = run(server, pairs=60, **one).to_json()
        assert (figures["traces"], figures["failed_requests"]) == (48, 0)
        assert figures["rejected"] == {"refused by the server": 12}
        assert "content policy" in run.log()[10]["fault"]
        figures = run(server, pairs=80, **one).to_json()
        assert (figures["traces"], len(server.requests)) == (68, 80)


def test_a_server_that_refuses_everything_leaves_no_mark(run: Traces) -> None:
    """It is how it was asked: with the right setting every pair is asked anew."""

    def answer(request: Request, _: int) -> Reply:
        if "max_tokens" in request:
            return Reply(status=400, body={"error": {"message": "unsupported max_tokens"}})
        return right(request)

    with serving(answer) as server:
        with pytest.raises(ValueError, match=r"30 requests in a row failed, .*unsupported max_tok"):
            run(server, pairs=40)
        assert run.log() == []
        figures = run(server, pairs=40, teacher={"limit_name": "max_completion_tokens"}).to_json()
    assert figures["traces"] == 40


def test_an_answer_without_text_is_paid_for_and_corrected(run: Traces) -> None:
    def answer(request: Request, _: int) -> Reply:
        return right(request) if request["model"] == "second" else Reply(None)

    with serving(answer) as server:
        figures = run(
            server, teacher=PRICES, corrector={**PRICES, "model": "second"}, max_cost=1.0
        ).to_json()
        assert (figures["traces"], figures["corrected"]) == (4, 4)
        assert figures["cost"] == pytest.approx(8 * 0.002)
        second = [one for one in server.requests if one["model"] == "second"]
    assert all(one["messages"][2]["content"] == "(no answer)" for one in second)


def test_a_failure_that_costs_is_booked_and_the_next_run_knows(run: Traces) -> None:
    """A body without choices that was counted, and an answer that came too late."""

    def answer(request: Request, _: int) -> Reply:
        if number_of(request) == 0:
            return Reply(body={"usage": {"prompt_tokens": 100, "completion_tokens": 10}})
        return Reply("x", before=lambda: time.sleep(1.0))

    more: Any = {"teacher": {**PRICES, "timeout": 0.3}, "max_new_tokens": 20}
    with serving(answer) as server:
        first = run(server, pairs=2, max_cost=1.0, **more).to_json()
        counted, late = sorted(row["cost"] for row in run.log())
        assert counted == pytest.approx(0.002)
        assert late > 20 * 100e-6  # all that it might have written, and the prompt
        assert first["cost"] == pytest.approx(counted + late)
        assert (first["failed_requests"], first["new_answers"]) == (2, 0)
        again = run(server, pairs=2, max_cost=1.0, **more).to_json()
    assert again["cost"] == pytest.approx(2 * (counted + late))


def test_a_pair_too_dear_is_left_out_and_the_others_go_on(run: Traces) -> None:
    more: Any = {"teacher": {**PRICES, "concurrency": 1}, "max_new_tokens": 20}
    with serving(lambda request, _: right(request)) as server:
        config = run.config(server, pairs=6, max_cost=0.3, **more)
        pairs = [pair(number) for number in range(6)]
        pairs[0] = replace(pairs[0], answer_a="long " * 8000)
        write_pairs(config.pairs, pairs)
        figures = trace(config).to_json()
    assert figures["traces"] == 5
    assert figures["stopped"].startswith("max_cost")


def test_an_error_that_ends_it_waits_for_what_is_out(run: Traces) -> None:
    """The second model is unknown: what the first was asked is paid for, and kept."""

    def answer(request: Request, _: int) -> Reply:
        if request["model"] == "second":
            return Reply(status=404, body={"error": {"message": "no such model"}})
        if number_of(request) == 0:
            return wrong(request)
        return slow(right(request))

    with (
        serving(answer) as server,
        pytest.raises(ValueError, match="knows no model 'second'"),
    ):
        run(server, pairs=40, teacher={"concurrency": 8}, corrector={"model": "second"})
    asked = [one for one in server.requests if one["model"] == "teacher"]
    assert len(run.log()) == len(asked) < 40
    assert len(run.written()) == len(asked) - 1


def test_nobody_there_is_said_soon(run: Traces) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match="30 requests in a row failed, the last with no con"):
        run(url, pairs=40)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_ends_it_and_is_not_repeated(
    run: Traces, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = {"error": {"message": f"Incorrect API key: {KEY}"}}
    with (
        serving(lambda *_: Reply(status=status, body=told)) as server,
        pytest.raises(ValueError, match=f"refuses the key in TEACHER_KEY .HTTP {status}") as error,
    ):
        run(server)
    assert KEY not in str(error.value)
    assert len(server.requests) <= 2  # those that were out
    assert KEY not in run.output.with_suffix(".log.jsonl").read_text()
    assert KEY not in caplog.text


def test_a_server_that_repeats_the_key_does_not_get_it_into_a_message(run: Traces) -> None:
    told = {"error": {"message": f"model? your key {KEY} was fine"}}
    with (
        serving(lambda *_: Reply(status=404, body=told)) as server,
        pytest.raises(ValueError, match=r"knows no model 'teacher'.*\[key\] was fine"),
    ):
        run(server)


def test_the_key_and_the_package_are_needed(run: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ValueError, match="environment variable TEACHER_KEY is not set"):
        run("http://127.0.0.1:9/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'rmr1[teacher]'")):
        run("http://127.0.0.1:9/v1", teacher={"key_variable": ""})


def test_a_cap_on_what_is_spent_is_never_passed(run: Traces) -> None:
    """A request that may cost more than is left is not sent, and the same command may go on."""
    more: Any = {"teacher": {**PRICES, "concurrency": 3}, "max_new_tokens": 20}
    with serving(lambda request, _: right(request)) as server:
        report = run(server, pairs=40, max_cost=0.05, **more)
        figures = report.to_json()
        assert figures["stopped"] == "max_cost (0.05 dollars) leaves no further request"
        assert 0 < figures["traces"] < 40
        assert figures["cost"] == pytest.approx(0.002 * len(server.requests))
        assert figures["cost"] < 0.05
        assert len(run.written()) == figures["traces"]
        done = run(server, pairs=40, max_cost=5.0, **more).to_json()
    assert (done["traces"], done["stopped"], len(server.requests)) == (40, "", 40)
    with pytest.raises(ValueError, match="max_cost needs input_price and output_price"):
        run.config("http://x/v1", max_cost=1.0)


def test_an_answer_that_was_not_counted_costs_its_worst_case(run: Traces) -> None:
    def answer(request: Request, _: int) -> Reply:
        reply = right(request)
        reply.usage = False
        return reply

    with serving(answer) as server:
        report = run(server, pairs=1, teacher=PRICES, max_new_tokens=20)
    size = len(json.dumps(server.requests[0]["messages"][1]["content"]))
    assert report.to_json()["cost"] > 20 * 100e-6 + size * 10e-6


def test_requests_keep_their_pace(run: Traces) -> None:
    moments: list[float] = []

    def answer(request: Request, _: int) -> Reply:
        moments.append(time.monotonic())
        return right(request)

    with serving(answer) as server:
        run(server, teacher={"requests_per_minute": 300})
    assert max(moments) - min(moments) > 0.4  # 4 requests, 0.2 s apart, and a busy machine


def test_at_most_so_many_at_a_time(run: Traces) -> None:
    out, most = 0, 0

    def begin() -> None:
        nonlocal out, most
        out += 1
        most = max(most, out)
        time.sleep(0.03)
        out -= 1

    def answer(request: Request, _: int) -> Reply:
        reply = right(request)
        reply.before = begin
        return reply

    with serving(answer) as server:
        run(server, pairs=12, teacher={"concurrency": 3})
    assert most == 3


def test_a_log_of_other_settings_is_refused(run: Traces) -> None:
    with serving(lambda request, _: right(request)) as server:
        run(server)
        with pytest.raises(ValueError, match="line 1: max_new_tokens is 4096, but this run has 10"):
            run(server, max_new_tokens=10)
        with pytest.raises(ValueError, match="line 1: model is 'teacher', but this run has 'other"):
            run(server, teacher={"model": "other"})
        log = run.output.with_suffix(".log.jsonl")
        log.write_text(log.read_text() + '{"id": "p9"')  # a line that was cut off
        assert run(server).to_json()["new_answers"] == 0
        log.write_text("{}\n")
        with pytest.raises(ValueError, match="line 1: no answer of a trace run"):
            run(server)


def test_a_killed_run_goes_on(run: Traces) -> None:
    """kill -9 in the middle: what was answered and written down is not asked for again."""
    with serving(lambda request, _: slow(right(request))) as server:
        config = run.config(server, pairs=40)
        code = f"""
from rmr1.traces.trace import TraceConfig, trace
trace(TraceConfig.model_validate_json({config.model_dump_json()!r}))
"""
        process = subprocess.Popen([sys.executable, "-c", code])
        wait_for(lambda: len(server.requests) > 6)
        process.kill()
        process.wait()
        answered = len(run.log())
        assert 0 < answered < 40
        report = run(server, pairs=40).to_json()
    assert (report["traces"], report["new_answers"]) == (40, 40 - answered)


def test_ctrl_c_waits_for_what_is_out_and_writes_what_there_is(run: Traces) -> None:
    with serving(lambda request, _: slow(right(request))) as server:
        config = run.config(server, pairs=40)
        path = run.folder / "config.json"
        path.write_text(config.model_dump_json())
        code = f"""
from rmr1.traces.trace import TraceConfig, trace
print(trace(TraceConfig.model_validate_json(open({str(path)!r}).read())).stopped)
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(server.requests) > 6)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=30)
    assert out.strip() == "interrupted", told
    assert "Stopping when the answers that are asked for have come" in told
    assert len(run.log()) == len(run.written()) == len(server.requests) < 40


def slow(reply: Reply) -> Reply:
    reply.before = lambda: time.sleep(0.1)
    return reply


def wait_for(said: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not said():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ctrl_c_begins_no_request_of_either_model(run: Traces) -> None:
    with serving(lambda request, _: slow(wrong(request))) as server:
        config = run.config(server, pairs=40, corrector={"model": "second", "concurrency": 2})
        path = run.folder / "config.json"
        path.write_text(config.model_dump_json())
        code = f"""
from rmr1.traces.trace import TraceConfig, trace
print(trace(TraceConfig.model_validate_json(open({str(path)!r}).read())).stopped)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(server.requests) > 6)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)  # a request that was on its way may still come in
        before = len(server.requests)
        process.communicate(timeout=30)
    assert len(server.requests) <= before + 1
    assert len(run.log()) == len(server.requests)


def test_pairs_that_changed_under_their_ids_are_refused(run: Traces) -> None:
    """A file that was built anew with another seed has the same ids and other sides."""
    with serving(lambda request, _: right(request)) as server:
        config = run.config(server)
        trace(config)
        write_pairs(config.pairs, [pair(number).swapped() for number in range(4)])
        with pytest.raises(ValueError, match="line 1: content is "):
            trace(config)
    assert len(server.requests) == 4


def test_pairs_of_another_run_count_by_their_cost(run: Traces) -> None:
    with serving(lambda request, _: right(request)) as server:
        run(server, pairs=6)
        figures = run(server, pairs=6, limit=2).to_json()
    assert (figures["pairs"], figures["traces"], figures["prompt_tokens"]) == (2, 2, 600)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: {"output": str(run.folder)}, "a folder; output names the file"),
        (lambda run: {"output": str(run.folder / "x.parquet")}, "traces are JSONL"),
        (lambda run: {"output": str(run.folder / "pairs.jsonl")}, "pairs and output are one file"),
    ],
)
def test_an_output_that_cannot_be_written(run: Traces, change: Any, told: str) -> None:
    config = run.config("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=told):
        trace(config.model_copy(update=change(run)))
    assert len(read_pairs(config.pairs)) == 4


def test_traces_are_not_replaced_by_nothing(run: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda request, _: right(request)) as server:
        run(server)
    run.output.with_suffix(".log.jsonl").unlink()
    with pytest.raises(ValueError, match="30 requests in a row failed"):
        run(server, pairs=40)  # it is gone
    assert len(run.written()) == 4


def test_two_processes_do_not_share_a_log(run: Traces) -> None:
    with serving(lambda request, _: right(request)) as server:
        config = run.config(server)
        with appending(config.log), pytest.raises(ValueError, match="another process is writing"):
            trace(config)
        assert server.requests == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"prompt_style": "reasoning"}, "A it is.\n<answer>[[{}]]</answer>"),
        ({"prompt_without": ["classification"]}, "<solution>4</solution>\n<answer>[[{}]]</answer>"),
    ],
)
def test_a_prompt_that_asks_for_less_gets_traces_with_less(
    run: Traces, more: dict[str, Any], text: str
) -> None:
    def answer(request: Request, _: int) -> Reply:
        (found,) = set(re.findall(r"What is (\d+) \+ 0", json.dumps(request["messages"])))
        return Reply(text.format(pair(int(found)).label))

    with serving(answer) as server:
        assert run(server, **more).to_json()["traces"] == 4
    with pytest.raises(ValueError, match="drop strict_format"):
        run.config("http://127.0.0.1:9/v1", strict_format=True, **more)


def test_the_second_model_may_have_a_cap_of_its_own(run: Traces) -> None:
    with serving(lambda request, _: wrong(request)) as server:
        run(server, pairs=1, corrector={"model": "second"}, corrector_max_new_tokens=9000)
    assert [one["max_tokens"] for one in server.requests] == [4096, 9000]


def test_the_command(run: Traces, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda request, _: right(request)) as server:
        config = run.config(server)
        args = ["trace", "--pairs", config.pairs, "--output", config.output]
        args += ["--teacher.model", "teacher", "--teacher.base_url", server.url]
        args += ["--teacher.key_variable", "TEACHER_KEY"]
        assert main([*args, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["traces"] == 4
        assert main(args) == 0
    out = capsys.readouterr().out
    assert re.search(r"right at once +4", out)
    assert "traces.log.jsonl" in out
    assert main(["trace", "--pairs", config.pairs]) == 2
    assert "'teacher.model' is missing" in capsys.readouterr().err


# --- A real server -------------------------------------------------------------------------------


def start_transformers_serve(model: Path, port: int) -> subprocess.Popen[bytes]:
    args = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*args, "--port", str(port), "--device", "cpu", "--log-level", "error"], env=environment
    )


@pytest.mark.parametrize(
    "model",
    [
        "pocket",
        pytest.param("smollm2", marks=pytest.mark.slow),
    ],
)
def test_transformers_own_server(run: Traces, model: str) -> None:
    """Neither model is a teacher: what is tested is that a real server is asked and understood."""
    from rmr1.models import resolve_model

    folder = POCKET if model == "pocket" else resolve_model(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start_transformers_serve(folder, port)
    try:
        wait_for_health(process, port)
        report = run(
            f"http://127.0.0.1:{port}/v1",
            pairs=2,
            teacher={"model": str(folder), "key_variable": "", "timeout": 120.0},
            prompt_style="compact",
            max_new_tokens=24,
        ).to_json()
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert (report["failed_requests"], report["new_answers"]) == (0, 2)
    assert report["prompt_tokens"] > 20
    assert 0 < report["new_tokens"] <= 48
    assert all(row["text"] for row in run.log())


def wait_for_health(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.3)
