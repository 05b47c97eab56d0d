"""The terminal: rate, time left, plain lines, a bar that closes, and the table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rmr1.terminal import Phase, duration, in_order, interval, percent, phase, print_table


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width)


def fancy() -> Console:
    # An explicit environment: a dumb TERM around the tests must not change what they see.
    return Console(file=io.StringIO(), force_terminal=True, width=140, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rate_and_time_left() -> None:
    clock = Clock()
    state = Phase("Evaluate", 100, "pairs", clock=clock)
    assert state.seconds_left is None
    assert state.status() == "time left unknown"
    clock.now += 10
    state.reach(20, 100)
    assert state.seconds_left == pytest.approx(40)
    assert state.status() == "0:40 left, 2 pairs/s"
    clock.now += 15  # Nothing finished since: the estimate counts down, and the rate stands.
    assert state.seconds_left == pytest.approx(25)
    clock.now += 60
    assert state.seconds_left == 0


def test_slow_items_figures_and_the_end() -> None:
    clock = Clock()
    state = Phase("RL", 4, "steps", clock=clock)
    clock.now += 8
    state.reach(2, 4)
    state.show({"reward": 0.42111, "kl": 0.0031})
    assert state.status() == "0:08 left, 4 s/step, reward=0.421, kl=0.0031"
    state.reach(4, 4)
    assert state.status() == "2 s/step, reward=0.421, kl=0.0031"


def test_work_of_an_earlier_start_does_not_count_for_the_rate() -> None:
    clock = Clock()
    state = Phase("RL", 1, "steps", clock=clock)
    changes: list[tuple[int, int]] = []
    state.on_change = lambda: changes.append((state.done, state.total))
    clock.now += 60  # loading the model is no step
    state.begin(15, 18)
    assert state.status() == "time left unknown"
    clock.now += 12
    state.reach(16, 18)
    assert changes == [(15, 18), (16, 18)]
    assert state.status() == "0:24 left, 12 s/step"
    assert state.elapsed == 72


def test_a_count_begins_with_what_it_is_told_first() -> None:
    clock = Clock()
    state = Phase("RM-Bench", 1, "judgments", clock=clock)
    clock.now += 5
    state.count(4, 9)
    clock.now += 10
    state.count(5, 9)
    assert state.seconds_left == pytest.approx(40)
    clock.now += 10
    state.count(6, 9)
    assert state.status() == "0:30 left, 10 s/judgment"


def test_durations_and_shares() -> None:
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 7265)] == [
        "0:00", "1:00", "59:59", "1:00:00", "2:01:05",
    ]  # fmt: skip
    assert [percent(v) for v in (0.7064, None, float("nan"), 1.0)] == ["70.6%", "-", "-", "100.0%"]
    assert interval([0.67, 0.742]) == "67.0 to 74.2"
    assert interval(None) == interval([None, 1]) == interval([0.5]) == "-"


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("rmr1.terminal.time.monotonic", clock)
    monkeypatch.setattr(Phase.__init__, "__kwdefaults__", {"clock": clock})
    console = plain()
    with phase("Judge [x]", 40, "pairs", console=console, every=10) as state:
        for done in range(1, 41):
            clock.now += 1
            state.reach(done, 40)
    text = written(console).splitlines()
    assert text[0].startswith("Judge [x]: 1/40 pairs (2%), 0:01, 0:39 left, 1 pairs/s")
    assert len(text) == 5  # After 1, 11, 21 and 31 seconds, and at the end.
    assert text[-1] == "Judge [x]: 40/40 pairs (100%), 0:40, 1 pairs/s, done"
    assert "\x1b" not in written(console)


def interrupt(console: Console) -> None:
    with phase("RL", 9, "steps", console=console) as state:
        state.reach(3, 9)
        raise KeyboardInterrupt


def test_a_total_may_be_unknown_until_the_end() -> None:
    for console in (plain(), fancy()):
        with phase("Read", 0, "rows", console=console, every=0.0) as state:
            state.reach(5, 0)
            assert state.counted == "5"
            state.reach(7, 7)
        assert "7/7" in written(console)
        assert "5/0" not in written(console)
        assert console.is_terminal or "Read: 5 rows, 0:00" in written(console)


def test_ctrl_c_ends_plain_lines() -> None:
    console = plain()
    with pytest.raises(KeyboardInterrupt):
        interrupt(console)
    last = written(console).splitlines()[-1]
    assert last.startswith("RL: 3/9 steps")
    assert last.endswith("stopped")


def test_ctrl_c_closes_the_bar() -> None:
    console = fancy()
    with pytest.raises(KeyboardInterrupt):
        interrupt(console)
    text = written(console)
    assert "3/9" in text
    # The cursor was hidden for the bar and is back.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_bar_shows_title_count_figures() -> None:
    console = fancy()
    with phase("Distil [1/3]", 8, "steps", console=console) as state:
        state.reach(8, 8)
        state.show({"loss": 1.5})
    text = written(console)
    assert "Distil [1/3]" in text
    assert "8/8" in text
    assert "loss=1.5" in text


def test_narrow_terminal_keeps_one_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, _environ={"TERM": "xterm"})
    with phase("Evaluate distilled", 1020, "judgments", console=console) as state:
        state.show({"reward": 0.42, "kl": 0.003, "entropy": 1.5})
        state.reach(5, 1020)
    assert "\x1b[1A" not in written(console)  # Nothing had to be moved up by more than its line.


def test_the_title_may_change() -> None:
    console = fancy()
    with phase("Import", 2, "stages", console=console) as state:
        state.title = "Unpack [it]"
        state.begin(1, 2)
    assert "Unpack [it]" in written(console)
    console = plain()
    with phase("Import", 2, "stages", console=console) as state:
        state.title = "Unpack [it]"
        state.begin(1, 2)
    assert written(console).startswith("Unpack [it]: 1/2 stages (50%)")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("RL", 2, "steps") as state:
        state.reach(2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "RL: 2/2 steps (100%)" in captured.err


def test_table() -> None:
    console = plain(100)
    rows = {
        "rl": {"accuracy": 0.829, "ci": [0.799, 0.859], "accuracy_parsed": None, "n": 1200},
        "base": {
            "accuracy": 0.503, "ci": [0.463, 0.543], "accuracy_parsed": 0.511,
            "ci_parsed": [0.471, 0.551], "parse_rate": 0.984, "n": 600,
        },
        "other [b]": {},
    }  # fmt: skip
    print_table(rows, console=console)
    text = written(console)
    body = [" ".join(line.split()) for line in text.splitlines()]
    assert "Base 50.3% 46.3 to 54.3 51.1% 47.1 to 55.1 98.4% 600" in body
    assert "RL 82.9% 79.9 to 85.9 - - - 1,200" in body
    assert body.index("other [b] - - - - - -") == 2 + body.index(
        "Base 50.3% 46.3 to 54.3 51.1% 47.1 to 55.1 98.4% 600"
    )
    assert "unparsed judgments as wrong" in text


def test_table_fits_80_columns() -> None:
    console = plain(80)
    row = {"accuracy": 0.5, "ci": [0.4, 0.6], "accuracy_parsed": 0.5, "ci_parsed": [0.4, 0.6],
           "parse_rate": 1.0, "n": 12345}  # fmt: skip
    print_table({"base": row, "distilled": row, "rl": row}, console=console)
    assert "…" not in written(console)
    assert "12,345" in written(console)


def test_stages_have_an_order() -> None:
    assert [name for name, _ in in_order({"x": 1, "rl": 2, "base": 3})] == ["base", "rl", "x"]
