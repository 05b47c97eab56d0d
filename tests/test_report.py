"""The report: structure, escaping, missing and damaged inputs, curve geometry, table values."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmr1.data import Pair
from rmr1.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Interval,
    Series,
    figure,
    interval_chart,
    line_chart,
    moving_mean,
    nice_ticks,
    thinned,
    tick_labels,
)
from rmr1.reporting.judgments import Sample, find_quote, mark_answer, mark_judgment, pick_samples
from rmr1.reporting.report import write_report

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'
JUDGMENT = """<type>Chat</type>
<rubric>
1. Correct facts (60%)
2. Clear words (40%)
<justify>Facts weigh most.</justify>
</rubric>
<eval><quote_A>the sky is blue</quote_A> is right; <quote_B>cheese</quote_B> was never said. \
<summary_B>B guesses.</summary_B></eval>
<answer>[[A]]</answer>"""
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, style: str) -> list[tuple[str, dict[str, str | None]]]:
        return [one for one in self.tags if style in (one[1].get("class") or "").split()]


def pair(**changes: Any) -> Pair:
    values: dict[str, Any] = {
        "id": "p1",
        "source": "tasks/facts",
        "conversation": ({"role": "user", "content": "Why is the sky blue?"},),
        "answer_a": "Well, the sky is blue because of scattering.",
        "answer_b": "Nobody knows.",
        "label": "A",
        "kind": "chat",
    }
    return Pair(**{**values, **changes})


def sample_row(**changes: Any) -> dict[str, Any]:
    row = {"stage": "rl", "pair": asdict(pair()), "text": JUDGMENT, "verdict": "A", "label": "A"}
    return {**row, **changes}


def evaluation(accuracy: float, **changes: Any) -> dict[str, Any]:
    row = {
        "accuracy": accuracy,
        "ci": [accuracy - 0.04, accuracy + 0.04],
        "accuracy_parsed": accuracy + 0.01,
        "ci_parsed": [accuracy - 0.03, accuracy + 0.05],
        "parse_rate": 0.985,
        "n": 1234,
        "swap_consistency": 0.777,
        "mean_completion_length": 81.4,
        "families": {
            "tasks/sorting": {"accuracy": accuracy, "n": 40, "ci": [0.3, 0.9]},
            "tasks/units": {"accuracy": 0.5, "n": 40, "ci": [0.35, 0.65]},
        },
    }
    return {**row, **changes}


def rl_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "stage": "rlvr",
        "step": step,
        "reward": -0.5 + step / 10,
        "kl": step / 1000,
        "entropy": 0.5,
        "completions/mean_length": 80 + step,
        "clip_ratio/low_mean": 0.001,
        "clip_ratio/high_mean": 0.002,
        "step_time": 2.5,
        "num_tokens": 1000,
    }
    return {**row, **changes}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fill(directory: Path) -> Path:
    """A complete run directory."""
    sft = [{"stage": "sft", "step": s, "loss": 3 / s, "step_time": 1.0} for s in range(1, 9)]
    (directory / "metrics.jsonl").write_text(lines([*sft, *(rl_row(s) for s in range(1, 6))]))
    (directory / "samples.jsonl").write_text(lines([sample_row()]), encoding="utf-8")
    (directory / "evaluations.json").write_text(
        json.dumps(
            {
                # Out of order on purpose: the page puts the stages in theirs.
                "rl": evaluation(0.83, gain={"accuracy": [0.12, 0.09, 0.15]}),
                "base": evaluation(0.5),
                "distilled": evaluation(0.71),
            }
        )
    )
    (directory / "config.toml").write_text('model = "pocket"\nseed = 7\n\n[grpo]\nbeta = 0.001\n')
    return directory


def read(directory: Path, command: str = "") -> tuple[str, Page]:
    text = write_report(directory, command=command).read_text(encoding="utf-8")
    return text, Page(text)


def test_full_report_has_every_part(tmp_path: Path) -> None:
    text, page = read(fill(tmp_path), command="rmr1 demo --seed 7")
    assert (tmp_path / "report.html").is_file()
    assert text.startswith("<!doctype html>")
    for expected in (
        tmp_path.name, "pocket", "rmr1 demo --seed 7", "Training: RL", "Training: Distillation",
        "Reward", "KL to the start", "Entropy", "Judgment length", "Clip fraction",
        "Time per step", "Loss", "sorting", "units", "Judgments", "beta = 0.001",
        "Accuracy 50.0 % (base) → 71.0 % (distilled) → 83.0 % (RL) on 1,234 held-out pairs.",
    ):  # fmt: skip
        assert expected in page.text
    assert "What this report lacks" not in page.text
    assert len(page.all("judgment")) == 1


def test_table_values_and_order(tmp_path: Path) -> None:
    text, page = read(fill(tmp_path))
    table = text[text.index('id="accuracy"') : text.index('id="families"')]
    rows = [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[dh](?: class=\"gain\")?>(.*?)</t[dh]>", row)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.S)
    ]
    assert [row[0] for row in rows] == ["Base", "Distilled", "RL"]
    assert rows[0][1:3] == ["50.0 % 46.0 – 54.0", ""]
    assert rows[1][2] == "+21.0"
    assert rows[2][2] == "+12.0 +9.0 to +15.0"
    assert rows[2][3] == "84.0 % 80.0 – 88.0"
    assert rows[2][5:] == ["98.5 %", "77.7 %", "81.4", "1,234"]
    bars = [attrs["style"] for _, attrs in page.all("bar")]
    assert bars == ["--v:50.0", "--v:71.0", "--v:83.0"] + ["--v:50.0"] * 3


def test_no_external_reference_and_only_its_own_script(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "samples.jsonl").write_text(
        lines([sample_row(text="see https://example.com/x.js " + ATTACK)])
    )
    text, page = read(tmp_path)
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attrs)
        assert not [name for name in attrs if name.startswith("on")]
    assert not re.search(r"@import|url\(", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    run = tmp_path / "run <b>"
    run.mkdir()
    fill(run)
    hostile = pair(
        source=ATTACK, answer_a=f"x {ATTACK} y", answer_b=ATTACK,
        conversation=({"role": "system", "content": ATTACK}, {"role": "user", "content": ATTACK}),
    )  # fmt: skip
    quote = f"<quote_A>{ATTACK}</quote_A>"
    text = f"<type>{ATTACK}</type><solution>{ATTACK}</solution><eval>{quote}</eval>{ATTACK}"
    (run / "samples.jsonl").write_text(
        lines([sample_row(pair=asdict(hostile), text=text, stage=ATTACK)])
    )
    (run / "config.toml").write_text(f"model = '{ATTACK}'\n")
    bad = evaluation(0.5, families={ATTACK: {"accuracy": 0.5, "n": 3, "ci": [0.1, 0.9]}})
    (run / "evaluations.json").write_text(json.dumps({ATTACK: bad, "base": bad}))
    html, page = read(run, command=ATTACK)
    assert html.count("<script>") == 1
    assert "<img" not in html
    assert page.text.count('<script>alert("x")</script>') >= 10


def test_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    _, page = read(tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.json", "config.toml"):
        assert f"{name} is not there yet" in page.text
    assert not page.all("chart")
    assert not page.all("judgment")


def test_missing_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory; give the directory of a run"):
        write_report(tmp_path / "nothing")


def test_run_in_progress(tmp_path: Path) -> None:
    """A torn last line, metrics still in the stages' own folders, no evaluation yet."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "rlvr").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 2.5}\n')
    (tmp_path / "rlvr" / "metrics.jsonl").write_text(lines([rl_row(1)]) + '{"stage": "rlvr", "st')
    _, page = read(tmp_path)
    assert "Training: RL" in page.text
    assert "Training: Distillation" in page.text
    assert "damaged" not in page.text
    assert "metrics.jsonl is not there" not in page.text
    assert "evaluations.json is not there yet" in page.text


def test_damaged_inputs_become_notes(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no json\n[1]\n" + lines([rl_row(1)]))
    (tmp_path / "samples.jsonl").write_text(lines([sample_row(pair={"id": "x"}), sample_row()]))
    (tmp_path / "evaluations.json").write_text("{")
    (tmp_path / "config.toml").write_bytes(b"model = \xff <oops>")
    _, page = read(tmp_path)
    assert "metrics.jsonl: 2 damaged lines are left out" in page.text
    assert 'samples.jsonl: a judgment is left out: field "source" is missing' in page.text
    assert "evaluations.json cannot be read" in page.text
    assert "config.toml is no valid TOML" in page.text
    assert "<oops>" in page.text
    assert len(page.all("judgment")) == 1


def test_nan_missing_and_lone_surrogates(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = [
        rl_row(1, kl=math.nan, reward=None),
        rl_row(2, kl=0.5, entropy="?"),
        rl_row(3, kl=math.inf),
    ]
    (tmp_path / "metrics.jsonl").write_text(lines(rows))
    nothing = {"accuracy": math.nan, "ci": [math.nan, 1], "accuracy_parsed": None, "n": None}
    (tmp_path / "evaluations.json").write_text(json.dumps({"base": nothing, "rl": {}}))
    torn = json.dumps(sample_row(text="x \ud800 [[A]]", verdict=None))
    (tmp_path / "samples.jsonl").write_text(torn + "\n")
    _, page = read(tmp_path)
    assert "ud800" in torn
    assert "nan" not in page.text.replace(tmp_path.name, "").lower()
    assert "inf" not in " ".join(attrs.get("d") or "" for _, attrs in page.tags)
    assert "No verdict" in page.text


def test_step_logged_twice_counts_once_and_the_last(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        lines([rl_row(1), rl_row(2, reward=0.25), rl_row(2, reward=0.75)])
    )
    _, page = read(tmp_path)
    hover = json.loads(
        next(attrs["data-hover"] for _, attrs in page.tags if attrs.get("data-hover")) or ""
    )
    assert [(row[1], row[2][0][1]) for row in hover] == [("1", "−0.400"), ("2", "0.750")]
    assert "2 steps, 2,000 tokens" in page.text


def coordinates(markup: str) -> Iterator[tuple[float, float]]:
    for path in re.findall(r'<path class="line[^"]*" d="([^"]*)"', markup):
        yield from ((float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path))
    for x, y in re.findall(r'<circle class="dot[^"]*" cx="([-\d.]+)" cy="([-\d.]+)"', markup):
        yield float(x), float(y)


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        [0.0], [5.0], [0.0, 0.0], [1e-9, 2e-9], [-3.0, 4.0, None, 1.0], [1e6, 1e6 + 1],
        [None, 2.0, None], [math.sin(i) for i in range(200)], [float(i) for i in range(5000)],
    ],
)  # fmt: skip
def test_points_lie_inside_the_plot(values: list[float | None], from_zero: bool) -> None:
    points = tuple((float(step), value) for step, value in enumerate(values, start=1))
    markup = str(line_chart("T", "unit", [Series("a", points)], from_zero=from_zero))
    found = list(coordinates(markup))
    assert found
    for x, y in found:
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_curve_positions_of_known_data() -> None:
    """From zero: 0 lies on the axis; equal steps are equally wide; larger is higher."""
    series = Series("a", ((1.0, 0.0), (2.0, 1.0), (3.0, 2.0)))
    markup = str(line_chart("T", "unit", [series]))
    (x1, y1), (x2, y2), (x3, y3) = list(coordinates(markup))[:3]
    assert (x1, y1) == (LEFT, HEIGHT - BOTTOM)
    assert x3 == WIDTH - RIGHT
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.15)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.15)
    assert y3 < y2 < y1


def test_gap_lifts_the_pen_and_a_lone_point_gets_a_dot() -> None:
    points = ((1.0, 1.0), (2.0, 1.0), (3.0, None), (4.0, 1.5), (5.0, None), (6.0, 2.0), (7.0, 2.0))
    markup = str(line_chart("T", "unit", [Series("a", points)]))
    path = re.search(r'<path class="line[^"]*" d="([^"]*)"', markup)
    assert path is not None
    assert path.group(1).count("M") == 3
    assert markup.count("<circle") == 2  # step 4, and the last point


def test_percent_axis_ends_at_100_and_two_curves_are_named() -> None:
    series = [
        Series("low", ((1.0, 99.0), (2.0, 100.0))),
        Series("high", ((1.0, 98.0), (2.0, 97.0))),
    ]
    page = Page(str(line_chart("T", "% of x", series, from_zero=False)))
    ticks = [float(word) for word in page.words if re.fullmatch(r"\d+(\.\d+)?", word)]
    assert max(ticks) <= 100
    assert "low" in page.text
    assert "high" in page.text
    assert "97.0 %" in page.text


def test_chart_without_values_says_so() -> None:
    assert "Not recorded" in line_chart("T", "u", [Series("a", ((1.0, None),))])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.3, 0.9), (1e-7, 3e-6), (0, 12345), (99, 101)]
)
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    step = ticks[1] - ticks[0]
    assert all(low - step * 1e-6 <= tick <= high + step * 1e-6 for tick in ticks)
    leading = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(leading == pytest.approx(nice) for nice in (1, 2, 2.5, 5))
    assert len(set(tick_labels(ticks))) == len(ticks)


def test_figures_for_reading() -> None:
    read_as = [figure(v) for v in (0.0, 1234567, 99.95, 0.12345, 2e-6, -0.5, None, math.nan)]
    assert read_as == ["0.00", "1,234,567", "100.0", "0.123", "2.0e−6", "−0.500", "–", "–"]


def test_thinning_and_moving_mean_keep_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1, 2101)]
    thin, size = thinned(points, 600)
    assert size == 4
    assert len(thin) == 525
    assert sum(v or 0 for _, v in thin) / 525 == pytest.approx(sum(v for _, v in points) / 2100)
    assert [v for _, v in moving_mean([(float(i), 2.0 * i) for i in range(50)])] == pytest.approx(
        [2.0 * i for i in range(50)]
    )


def test_interval_chart_positions() -> None:
    row = Interval("RL", "s-rl", 0.75, (0.7, 0.8), None, None)
    markup = str(interval_chart([row]))
    dots = re.findall(r'<circle class="mark s-rl" cx="([\d.]+)"', markup)
    chance = re.search(r'class="chance" x1="([\d.]+)"', markup)
    bar = re.search(r'class="whisker s-rl" d="M([\d.]+) [\d.]+H([\d.]+)', markup)
    assert chance is not None
    assert bar is not None
    assert len(dots) == 1
    width = float(dots[0]) - float(chance.group(1))  # a quarter of the axis
    assert float(bar.group(2)) - float(bar.group(1)) == pytest.approx(width * 0.4, abs=0.2)


def judged(**changes: Any) -> dict[str, Any]:
    return mark_judgment(Sample(**{"stage": "rl", "pair": pair(), "text": JUDGMENT, "verdict": "A",
                                   "label": "A", **changes}))  # fmt: skip


def test_judgment_is_marked_by_section() -> None:
    shown = judged()
    page = Page(str(shown["judgment"]))
    for style in ("rubric", "justify", "evaluation", "answer"):
        assert len(page.all(style)) == 1
    assert len(page.all("item")) == 2
    assert [attrs["style"] for _, attrs in page.all("weight")] == ["--v:60.0", "--v:40.0"]
    assert [attrs["class"] for _, attrs in page.all("quote")] == ["quote", "quote absent"]
    assert "not in B" in page.text
    assert shown["outcome"] == "right"
    assert (shown["quotes_found"], shown["quotes"]) == (1, 2)
    side, answer, better = shown["answers"][0]  # type: ignore[index]
    assert (side, better) == ("A", True)
    assert answer == "Well, <mark>the sky is blue<sup>1</sup></mark> because of scattering."


@pytest.mark.parametrize(
    "text",
    [
        "", "no tags at all", "<eval>never closed <quote_A>x", "</answer></answer>[[A]]",
        "<rubric><eval>1. a (50%)</rubric></eval>", "<think>" + JUDGMENT, JUDGMENT * 2,
        "🙂 <type>Chat</type> 漢字 <eval>\n\n<quote_A>\n</quote_A></eval> & < > \"",
        "<eval><quote_A><quote_B>x</quote_A></quote_B></eval>",
    ],
)  # fmt: skip
def test_no_text_is_lost_and_markup_is_balanced(text: str) -> None:
    assert_all_shown(text)


NAMES = ("type", "rubric", "justify", "eval", "answer", "think", "quote_A", "quote_B", "summary_A")
PARTS = [f"<{slash}{name}>" for name in NAMES for slash in ("", "/")]
WORDS = [
    "1. fine (60%)\n",
    "- poor: 40%\n",
    "[[A]]",
    "Chat",
    " the sky is blue ",
    "& <b>",
    "漢🙂",
    "\n",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PARTS + WORDS), max_size=30))
def test_no_text_is_lost_in_any_order_of_tags(parts: list[str]) -> None:
    assert_all_shown("".join(parts).replace("<b>", "< b"))


def assert_all_shown(text: str) -> None:
    """Besides spaces and tags, every character of the judgment is shown, in its order."""
    markup = str(judged(text=text, verdict=None)["judgment"])
    Page(markup)  # Balanced, or the parser's assertion fails.
    labels = re.sub(r'<span class="label">.*?</span>', "", markup)
    shown = Page(f"<p>{labels}</p>")
    bare = re.compile(r"</?[A-Za-z_]+>|\s")
    assert bare.sub("", "".join(shown.words)) == bare.sub("", text)


def test_wrong_unparsed_and_exchanged(tmp_path: Path) -> None:
    assert judged(verdict="B")["outcome"] == "wrong"
    assert judged(verdict=None, text="hm")["outcome"] == "unparsed"
    assert judged(verdict=None, text="hm")["fault"] == "no type"
    # The judge saw the answers exchanged: they are shown as it saw them.
    (tmp_path / "samples.jsonl").write_text(lines([sample_row(label="B", verdict="B")]))
    text, page = read(tmp_path)
    assert text.index("Nobody knows.") < text.index("because of scattering")
    assert "says B, B is better" in page.text
    assert len(page.all("right")) == 1


def test_quotes() -> None:
    assert find_quote(" b c\n", "a b c d") == (2, 5)
    assert find_quote('"b c"', "a b c d") == (2, 5)
    assert find_quote("“b c”", "a b c d") == (2, 5)
    assert find_quote("b  c", "a b c d") is None
    assert find_quote("  ", "a b c d") is None
    marked = mark_answer("a<b> c", [(0, 4, 1), (2, 6, 2)])  # The second overlaps the first.
    assert marked == "<mark>a&lt;b&gt;<sup>1</sup></mark> c"


def test_choice_of_judgments() -> None:
    samples = [
        Sample(stage, pair(id=f"{stage}{i}", source=f"s{i % 5}"), "", "A" if i % 3 else "B", "A")
        for stage in ("base", "distilled", "rl", "rlvr")
        for i in range(30)
    ]
    chosen = pick_samples(samples)
    counts = {
        stage: sum(one.stage == stage for one in chosen) for stage in ("rl", "distilled", "base")
    }
    assert counts == {"rl": 6, "distilled": 3, "base": 3}
    assert sum(one.right for one in chosen if one.stage == "rl") == 3
    assert len({one.pair.source for one in chosen}) == 5
    assert len({one.pair.id for one in chosen}) == 12
    assert pick_samples(samples) == chosen
    # Without evaluations, judgments of training are shown.
    assert len(pick_samples([one for one in samples if one.stage == "rlvr"])) == 12
    assert pick_samples([]) == []
