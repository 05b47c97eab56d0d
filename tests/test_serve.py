"""The judge over HTTP: what it answers, what it counts, many at a time, and how it ends."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from served_judge import BODY, PAIR, TOKEN, ask, metric, served, slow_steps

from rmr1.best_of_n import rank
from rmr1.judge import Judge
from rmr1.models import POCKET
from rmr1.tasks.catalog import draw_pairs


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=160)


@pytest.fixture(scope="module")
def url(judge: Judge) -> Iterator[str]:
    with served(judge, token=TOKEN) as found:
        yield found


def test_a_comparison_says_what_led_to_it(url: str, judge: Judge) -> None:
    status, told, _ = ask(f"{url}/v1/judge", {**BODY, "votes": 3, "swap": True})
    assert status == 200, told
    found = judge.compare(BODY["prompt"], BODY["answer_a"], BODY["answer_b"], votes=3, swap=True)
    assert (told["verdict"], told["votes"]) == (found.verdict, found.votes)
    assert [one["text"] for one in told["judgments"]] == [one.text for one in found.samples]
    assert [one["placement"] for one in told["judgments"]] == ["ab"] * 3 + ["ba"] * 3
    assert told["usage"]["completion_tokens"] == sum(one.new_tokens for one in found.samples)
    assert (told["model"], told["prompt_hash"]) == ("pocket", judge.prompt.hash)
    assert {"rubric", "solution", "quotes", "justification", "task_type"} <= told.keys()
    assert all(isinstance(quote["found"], bool) for quote in told["quotes"])


@pytest.mark.parametrize("method", ["round_robin", "knockout"])
def test_answers_are_ranked(url: str, judge: Judge, method: Any) -> None:
    """As the judge ranks them in this process."""
    answers = [PAIR.answer_a, PAIR.answer_b, "I do not know."]
    body = {"prompt": BODY["prompt"], "answers": answers, "method": method, "swap": True}
    status, told, _ = ask(f"{url}/v1/rank", body)
    assert status == 200, told
    found = rank(judge, BODY["prompt"], answers, method=method, swap=True)
    assert {key: told[key] for key in found.to_json(answers)} == found.to_json(answers)
    assert ask(f"{url}/v1/rank", {**body, "answers": ["one"]})[0] == 400
    assert ask(f"{url}/v1/rank", {**body, "method": "elo"})[0] == 400
    status, told, _ = ask(f"{url}/v1/rank", {**body, "answers": ["a", "long " * 3000]})
    assert status == 400
    assert "positions" in told["error"]["message"]


@pytest.mark.skipif(not any(os.access(f"{p}/curl", os.X_OK) for p in os.environ["PATH"].split(":")),
                    reason="no curl")  # fmt: skip
def test_curl(url: str) -> None:
    args = ["curl", "-sS", "-H", f"Authorization: Bearer {TOKEN}", f"{url}/v1/judge"]
    args += ["-H", "Content-Type: application/json", "-d", json.dumps(BODY)]
    told = json.loads(subprocess.run(args, check=True, capture_output=True).stdout)
    assert told["verdict"] in ("A", "B", "tie", None)
    args = [*args[:5], "-d", json.dumps(BODY)]  # as a form, which is curl's way
    told = json.loads(subprocess.run(args, check=True, capture_output=True).stdout)
    assert "Content-Type: application/json" in told["error"]["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON|utf|decod"),
        (b"[]", "valid dictionary|object"),
        ({}, "prompt: Field required"),
        ({**BODY, "answer_b": ""}, "answer_b: String should have at least 1"),
        ({**BODY, "answer_b": " \n"}, '"answer_b" must be a non-empty text'),
        ({**BODY, "prompt": "  "}, "prompt must not be empty"),
        ({**BODY, "prompt": [{"role": "assistant", "content": "x"}]}, "must end with a user turn"),
        ({**BODY, "votes": 0}, "votes: Input should be greater"),
        ({**BODY, "votes": 1000}, "votes: Input should be less"),
        ({**BODY, "vote": 1}, "vote: Extra inputs"),
        ({**BODY, "answer_a": "\ud800"}, "half a surrogate|valid string"),
        ({**BODY, "answer_a": "long " * 1000}, "1042 tokens, and there is room for 864"),
        ({**BODY, "answer_a": "long " * 9000}, "more than 2[0-9]{3} tokens"),  # not read to its end
        ({**BODY, "\ud800": 1}, "valid string"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_malformed_body_is_told_what_is_wrong(url: str, body: Any, told: str) -> None:
    import re

    status, answer, _ = ask(f"{url}/v1/judge", body)
    assert status == 400, answer
    assert re.search(told, answer["error"]["message"]), answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_paths_and_the_api_page(url: str) -> None:
    assert ask(f"{url}/v1/nothing")[0] == 404
    assert ask(f"{url}/v1/judge")[0] == 405
    paths = ask(f"{url}/openapi.json")[1]["paths"]
    assert {"/v1/judge", "/v1/chat/completions", "/healthz", "/metrics"} <= paths.keys()


def test_metrics(url: str, monkeypatch: pytest.MonkeyPatch, judge: Judge) -> None:
    """Every kind of work is counted, and a stream to its last byte."""

    def read(name: str) -> float:
        return metric(url, f"rmr1_{name}", token=TOKEN)

    def verdicts() -> float:
        names = ("A", "B", "tie", "none")
        return sum(read(f'verdicts_total{{verdict="{one}"}}') for one in names)

    prompt, completion = 'tokens_total{kind="prompt"}', 'tokens_total{kind="completion"}'
    before = [verdicts(), read(prompt), read(completion)]
    told = ask(f"{url}/v1/judge", {**BODY, "votes": 3, "swap": True})[1]
    assert verdicts() - before[0] == 1
    # Each order is one prompt, whatever the votes.
    both = [told["judgments"][at]["prompt_tokens"] for at in (0, 3)]
    assert read(prompt) - before[1] == told["usage"]["prompt_tokens"] == sum(both)
    assert read(completion) - before[2] == told["usage"]["completion_tokens"]
    before = [verdicts(), read(prompt), read(completion)]
    body = {"prompt": BODY["prompt"], "answers": ["42", "43", "44"], "method": "knockout"}
    assert ask(f"{url}/v1/rank", body)[0] == 200
    assert verdicts() - before[0] == 2
    assert read(prompt) > before[1]
    assert read(completion) > before[2]

    slow_steps(judge, monkeypatch, 0.02)
    seconds = 'request_seconds_sum{route="/v1/chat/completions"}'
    before = [read(seconds), read(prompt), read(completion)]
    messages = judge.prompt.render(PAIR)
    body = {"model": "pocket", "messages": messages, "max_tokens": 30, "stream": True}
    began = time.monotonic()
    text = ask(f"{url}/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})[1]
    took = time.monotonic() - began
    usage = json.loads(text.split("data: ")[-2])["usage"]
    assert read(seconds) - before[0] > took / 2
    assert read(prompt) - before[1] == usage["prompt_tokens"]
    assert read(completion) - before[2] == usage["completion_tokens"]


def test_metrics_have_routes_for_labels(url: str) -> None:
    ask(f"{url}/v1/judge", BODY)
    ask(f"{url}/v1/judge", {})
    ask(f"{url}/some/path")
    status, text, _ = ask(f"{url}/metrics")
    assert status == 200
    assert 'rmr1_requests_total{route="/v1/judge",status="200"}' in text
    assert 'rmr1_requests_total{route="/v1/judge",status="400"}' in text
    assert 'route="other",status="404"' in text
    assert "rmr1_open_requests 0.0" in text
    assert "rmr1_open_samples 0.0" in text
    assert "/some/path" not in text


def test_many_at_a_time(url: str, judge: Judge) -> None:
    """32 clients: each gets its own answer, that of a judge who has nothing else to do."""
    pairs = draw_pairs(32, seed=3, split="train")
    bodies = [
        {"prompt": p.conversation[0]["content"], "answer_a": p.answer_a, "answer_b": p.answer_b}
        for p in pairs
    ]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: ask(f"{url}/v1/judge", body), bodies))
    assert {status for status, _, _ in answers} == {200}
    alone = [judge.compare(*body.values()) for body in bodies]
    same = [told["text"] == one.text for (_, told, _), one in zip(answers, alone, strict=True)]
    # Sums depend on the batch in their last bits, so a draw may fall otherwise now and then.
    assert sum(same) >= 30


def test_the_command_serves_and_ends_in_good_order() -> None:
    """SIGTERM while a request is open: it is answered, then the process ends with code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [sys.executable, "-m", "rmr1.cli", "serve", "--model", "pocket", "--port", str(port)]
    args += ["--prompt_style", "compact", "--max_new_tokens", "160"]
    # As read from a file, with a line break.
    environment = {**os.environ, "RMR1_TOKEN": f"{TOKEN}\n", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, env=environment, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                assert ask(f"{url}/healthz", token=None)[0] == 200
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            open_one = pool.submit(ask, f"{url}/v1/judge", {**BODY, "votes": 32, "swap": True})
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert open_one.result(timeout=60)[0] == 200
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert TOKEN not in told
