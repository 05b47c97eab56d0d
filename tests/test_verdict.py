"""The meaning of a verdict, case by case, in both parsers; bad input; and very long input."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import rmr1
from rmr1.verdict import (
    FormatError,
    RubricItem,
    Rule,
    Span,
    Verdict,
    parse_verdict,
    parse_verdicts,
    reference_parse,
)

Parser = Callable[..., Verdict]
both = pytest.mark.parametrize("parse", [parse_verdict, reference_parse])

RUBRIC = "<rubric>\n1. Accuracy (60%)\n2. Style (40%)\n<justify>They asked.</justify>\n</rubric>"
EVAL = (
    "<eval><quote_A>It is 4.</quote_A><summary_A>right</summary_A>"
    "<quote_B>It is 5.</quote_B><summary_B>wrong</summary_B></eval>"
)
CHAT = f"<type>Chat</type>\n{RUBRIC}\n{EVAL}\n<answer>[[A]]</answer>"
REASONING = (
    f"<type>Reasoning</type>\n<solution>2 + 2 = 4</solution>\n{EVAL}\n<answer>[[B]]</answer>\n"
)


def cut(text: str, span: Span | None) -> str | None:
    return None if span is None else text[span.start : span.end]


@both
def test_a_chat_judgment(parse: Parser) -> None:
    text = "日本 😀 " + CHAT
    verdict = parse(text)
    assert (verdict.answer, verdict.task_type, verdict.error) == ("A", "chat", FormatError.OK)
    assert verdict.well_formed
    assert verdict.solution is None
    assert cut(text, verdict.rubric) == RUBRIC[len("<rubric>") : -len("</rubric>")]
    assert cut(text, verdict.justify) == "They asked."
    assert cut(text, verdict.evaluation) == EVAL[len("<eval>") : -len("</eval>")]
    assert cut(text, verdict.answer_span) == "[[A]]"
    assert [cut(text, span) for span in verdict.quotes_a] == ["It is 4."]
    assert [cut(text, span) for span in verdict.quotes_b] == ["It is 5."]
    assert [cut(text, span) for span in verdict.summaries_a] == ["right"]
    assert [cut(text, span) for span in verdict.summaries_b] == ["wrong"]
    assert [cut(text, item.span) for item in verdict.rubric_items] == [
        "Accuracy (60%)",
        "Style (40%)",
    ]
    assert [item.weight for item in verdict.rubric_items] == [0.6, 0.4]


@both
def test_a_reasoning_judgment(parse: Parser) -> None:
    verdict = parse(REASONING)
    assert (verdict.answer, verdict.task_type, verdict.error) == ("B", "reasoning", FormatError.OK)
    assert cut(REASONING, verdict.solution) == "2 + 2 = 4"
    assert verdict.rubric is None
    assert verdict.rubric_items == ()


BROKEN = {
    FormatError.OK: CHAT,
    FormatError.UNCLOSED_THINK: "<think>Hm. " + CHAT,
    FormatError.UNCLOSED_TAG: CHAT.replace("</quote_A>", ""),
    FormatError.UNOPENED_TAG: CHAT.replace("<quote_A>", ""),
    FormatError.NO_TYPE: CHAT.replace("<type>Chat</type>", ""),
    FormatError.UNKNOWN_TYPE: CHAT.replace("Chat", "Code"),
    FormatError.NO_SOLUTION: REASONING.replace("<solution>2 + 2 = 4</solution>", ""),
    FormatError.NO_RUBRIC: CHAT.replace(RUBRIC, ""),
    FormatError.NO_RUBRIC_ITEMS: CHAT.replace("1. Accuracy (60%)\n2. Style (40%)", "All of it."),
    FormatError.NO_WEIGHT: CHAT.replace("Style (40%)", "Style"),
    FormatError.NO_JUSTIFY: CHAT.replace("<justify>They asked.</justify>", ""),
    FormatError.NO_EVAL: CHAT.replace(EVAL, ""),
    FormatError.NO_ANSWER: CHAT.replace("<answer>[[A]]</answer>", ""),
    FormatError.BAD_ANSWER: CHAT.replace("[[A]]", "A"),
    FormatError.EMPTY_SECTION: REASONING.replace("2 + 2 = 4", " \n"),
    FormatError.REPEATED_SECTION: REASONING.replace(EVAL, EVAL + EVAL),
    FormatError.REPEATED_ANSWER: CHAT + "<answer>[[A]]</answer>",
    FormatError.OUT_OF_ORDER: f"<answer>[[A]]</answer><type>Chat</type>{EVAL}{RUBRIC}",
    FormatError.MISPLACED_SECTION: CHAT.replace(EVAL, EVAL + "<quote_A>more</quote_A>"),
    FormatError.TEXT_AFTER_ANSWER: CHAT + " I am sure.",
}


def test_every_error_has_a_case() -> None:
    assert list(BROKEN) == list(FormatError)
    assert [error.value for error in FormatError] == list(range(20))


@both
@pytest.mark.parametrize(
    ("error", "text"), BROKEN.items(), ids=lambda value: getattr(value, "name", "")
)
def test_broken_rule(parse: Parser, error: FormatError, text: str) -> None:
    verdict = parse(text)
    assert verdict.error is error
    assert verdict.well_formed == (error is FormatError.OK)
    answerless = ("UNCLOSED_THINK", "NO_ANSWER", "BAD_ANSWER")
    assert (verdict.answer is None) == (error.name in answerless), "the answer stands on its own"


@both
@pytest.mark.parametrize(
    ("text", "error"),
    [
        (CHAT.replace("Chat", " CHAT\n"), "OK"),
        (CHAT.replace("They asked.", ""), "EMPTY_SECTION"),
        (CHAT.replace(EVAL, "<eval>\t</eval>"), "EMPTY_SECTION"),
        (CHAT.replace(EVAL, "<eval>Both fine.</eval>"), "OK"),  # evidence is optional
        (CHAT.replace("<type>", "So: <type>").replace("<eval>", "Now:\n<eval>"), "OK"),
        (CHAT.replace(EVAL, EVAL + "<solution>4</solution>"), "MISPLACED_SECTION"),
        (REASONING.replace(EVAL, RUBRIC + EVAL), "MISPLACED_SECTION"),
        (REASONING.replace(EVAL, "<justify>so</justify>" + EVAL), "MISPLACED_SECTION"),
        (CHAT.replace("<justify>They asked.</justify>", "") + "<justify>x</justify>", "NO_JUSTIFY"),
        (CHAT[: CHAT.index("wrong")], "UNCLOSED_TAG"),
        (CHAT.replace("<eval>", "<eval><rubric>"), "UNCLOSED_TAG"),
        (CHAT.replace("</rubric>", "").replace("</eval>", "</rubric></eval>"), "OUT_OF_ORDER"),
        ("", "NO_TYPE"),
        ("😀" * 50, "NO_TYPE"),
    ],
)
def test_more_format_cases(parse: Parser, text: str, error: str) -> None:
    assert parse(text).error.name == error


@both
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>[[A]]</answer>", "A"),
        ("<answer>[[B]]</answer>", "B"),
        ("<ANSWER> \n[[ B\t]] </Answer>", "B"),
        ("< answer >[[A]]< / answer\n>", "A"),
        ("<answer>[[A]]</answer> or <answer>[[B]]</answer>", "B"),  # the last one
        ("<answer>[[A]]</answer><answer>both</answer>", "A"),  # the last that holds a label
        ("<answer>[[A]]</answer><answer>[[B]]", "A"),
        ("<answer>I take <answer>[[A]]</answer></answer>", "A"),
        ("<answer><b>[[A]]</b></answer>", None),
        ("<answer>[[A]] [[B]]</answer>", None),
        ("<answer>[[a]]</answer>", None),
        ("<answer>[A]</answer>", None),
        ("<answer>[[A]</answer>", None),
        ("<answer>[[]]</answer>", None),
        ("<answer>[[]]]</answer>", None),
        ("<answer>[[[A]]]</answer>", None),
        ("<answer>A</answer>", None),
        ("<answer></answer>", None),
        ("<answer id=1>[[A]]</answer>", None),
        ("</answer>[[A]]<answer>", None),
        ("[[A]]", None),
        ("<answer>[[C]]</answer>", None),
        ("<answer>[[А]]</answer>", None),  # a Cyrillic A
        ("<think>[[x]] <answer>[[A]]</answer>", None),
        ("<think><answer>[[A]]</answer></think>", None),
        ("<answer>[[A]]</answer></think>", None),
        ("<think>a</think><answer>[[B]]</answer>", "B"),
        ("a</think>b</THINK><answer>[[B]]</answer>", "B"),
        ("<answer>[[A]]</answer><think>", None),
        ("</think><think><answer>[[A]]</answer>", None),
        ("<answer>[[A]]<think></think></answer>", None),
        ("<eval><quote_A><answer>[[B]]</answer></quote_A></eval><answer>[[A]]</answer>", "A"),
    ],
)
def test_last_tag(parse: Parser, text: str, answer: str | None) -> None:
    assert parse(text).answer == answer


@both
@pytest.mark.parametrize("label", ["tie", "Tie", "TIE", "C", " tie "])
@pytest.mark.parametrize("rule", ["last_tag", "rm_r1"])
def test_ties(parse: Parser, label: str, rule: Rule) -> None:
    text = CHAT.replace("[[A]]", f"[[{label}]]")
    assert parse(text, rule=rule).answer is None
    assert parse(text).error is FormatError.BAD_ANSWER
    tied = parse(text, rule=rule, allow_tie=True)
    literal = rule == "last_tag" or label in ("tie", "C")
    assert tied.answer == ("tie" if literal else None)
    assert tied.error is FormatError.OK


A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


@both
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (A, "A"),
        (B + " ok", "B"),
        (A + "x" * 58, "A"),  # the form is exactly the first 22 of the last 80 characters
        (A + "x" * 59, None),
        ("😀" * 100 + A + "😀" * 58, "A"),  # characters, not bytes
        (A + B, None),
        (A + "x" * 36 + B, None),
        (A + "x" * 37 + B, "B"),  # A starts one character before the last 80
        (A + A, "A"),
        (A + "[[B]]", "A"),  # the label alone is not the form
        (B + "x" * 60 + A, "A"),
        ("<think>" + A, "A"),  # the published rule knows no thinking
        ("<answer>[[A]] </answer>", None),
        ("<Answer>[[A]]</Answer>", None),
        ("", None),
    ],
)
def test_rm_r1(parse: Parser, text: str, answer: str | None) -> None:
    verdict = parse(text, rule="rm_r1")
    assert verdict.answer == answer
    assert cut(text, verdict.answer_span) == (f"[[{answer}]]" if answer else None)


@both
def test_rules_differ_in_the_answer_only(parse: Parser) -> None:
    text = CHAT + "x" * 100
    last_tag, published = parse(text), parse(text, rule="rm_r1")
    assert (last_tag.answer, published.answer) == ("A", None)
    assert (last_tag.error, published.error) == (FormatError.TEXT_AFTER_ANSWER,) * 2
    assert last_tag.evaluation == published.evaluation


@both
@pytest.mark.parametrize(
    ("line", "weight"),
    [
        ("1. Accuracy (40%)", 0.4),
        ("1) Accuracy: 40%", 0.4),
        ("(1) Accuracy - 40 %", 0.4),
        ("- Accuracy [40%]", 0.4),
        ("* **Accuracy** (40%)", 0.4),
        ("• Accuracy 40 percent", 0.4),
        ("**Accuracy** (40%)", 0.4),
        ("**Accuracy (40%):** no errors", 0.4),
        ("**1. Accuracy** (40%)", 0.4),
        ("### 1. Accuracy (40%)", 0.4),
        ("## Accuracy (40%)", 0.4),
        ("Accuracy: 40%", 0.4),
        ("| Accuracy | 40% |", 0.4),
        ("准确性：40％", 0.4),
        ("1. Accuracy (weight: 0.4)", 0.4),
        ("1. Accuracy (Weight = 40)", 0.4),
        ("1. Accuracy, weight 40", 0.4),
        ("1. Accuracy (weight of 40%)", 0.4),
        ("1. Accuracy, weighted at 0.4: right", 0.4),
        ("1. Accuracy\n   - no errors\n   - Weight: **40%**", 0.4),
        ("1. Accuracy (weighting 4/10)", 0.4),
        ("1. Accuracy (weight: .4)", 0.4),
        ("1. Accuracy, 90% of facts right (weight: 0.4)", 0.4),  # the word goes first
        ("- 0.4 - Accuracy", 0.4),
        ("- 40: Accuracy", 0.4),
        ("- **0.4** – Accuracy", 0.4),
        ("- [0.4] Accuracy", 0.4),
        ("- Accuracy (0.4)", 0.4),
        ("- Accuracy (4/10)", 0.4),
        ("- Accuracy: 0.4", 0.4),
        ("- **Accuracy**: 40", 0.4),
        ("- Accuracy - 0.4", 0.4),
        ("1. Accuracy (33.3%)", 0.333),
        ("1. Accuracy (100%)", 1.0),
        ("1. Accuracy (weight 1)", 1.0),
        ("1. Accuracy (0%)", 0.0),
        ("1. Accuracy", None),
        ("1. Accuracy (140%)", None),
        ("1. Accuracy (2023)", None),
        ("1. Accuracy (3)", None),
        ("1. Accuracy [1]", None),
        ("1. Accuracy, 12345%", None),
        ("1. Accuracy (1.23456)", None),
        ("1. 2-3 sentences", None),
        ("1. As good as GPT-4", None),
        ("1. Ready at 10:30", None),
        ("1. Lightweight 40", None),
        ("1. Accuracy (weight 5/4)", None),
        ("1. Accuracy (weight 5/0)", None),
    ],
)
def test_weight(parse: Parser, line: str, weight: float | None) -> None:
    text = f"<rubric>\n{line}\n</rubric>"
    items = parse(text).rubric_items
    assert [item.weight for item in items] == [weight]
    assert text[slice(*items[0].span)] in line


@both
@pytest.mark.parametrize(
    ("rubric", "items"),
    [
        ("1. A (50%)\n2. B (50%)", ["A (50%)", "B (50%)"]),
        ("1. A (50%)\n  more on A\n2. B (50%)", ["A (50%)\n  more on A", "B (50%)"]),
        ("1. A (50%)\n- detail\n2. B (50%)", ["A (50%)\n- detail", "B (50%)"]),
        ("- A (50%)\n  - detail 3%\n- B (50%)", ["A (50%)\n  - detail 3%", "B (50%)"]),
        ("- A (50%)\n\t- detail 3%", ["A (50%)\n\t- detail 3%"]),
        ("  - A (50%)\n - B (50%)", ["A (50%)", "B (50%)"]),
        (
            "**A** (50%)\n- detail\n**B** (50%)\n- detail",
            ["**A** (50%)\n- detail", "**B** (50%)\n- detail"],
        ),
        ("**Criteria**\n1. A (50%)\r\n2. B (50%)\r\n", ["A (50%)", "B (50%)"]),
        ("Criteria are:\nA: 50%\nB: 50%\n", ["A: 50%", "B: 50%"]),
        ("1. A\n2. B", ["A", "B"]),
        ("- A\n1. B", ["B"]),
        ("1.\n2. B", ["", "B"]),
        ("---\n- A (50%)", ["A (50%)"]),
        ("1. A 50%\n<justify>2. no 50%</justify>\n3. B 50%", ["A 50%", "B 50%"]),
        ("1. A 50%\n<justify>no</justify> as said", ["A 50%"]),
        ("Nothing in particular.", []),
        ("", []),
    ],
)
def test_rubric_items(parse: Parser, rubric: str, items: list[str]) -> None:
    text = f"\U0001f600<rubric>{rubric}</rubric>"
    assert [text[slice(*item.span)] for item in parse(text).rubric_items] == items


@both
def test_first_section_wins_and_inner_pairs_first(parse: Parser) -> None:
    text = "<eval>1</eval><eval>2</eval><solution>a<solution>b</solution>c</solution>"
    verdict = parse(text)
    assert cut(text, verdict.evaluation) == "1"
    assert cut(text, verdict.solution) == "b"


@both
def test_parts_outside_their_section_do_not_count(parse: Parser) -> None:
    text = "<quote_A>1</quote_A><eval><quote_A>2</quote_A><quote_A>3</quote_A></eval>"
    text += "<justify>1</justify><rubric><justify>2</justify></rubric><eval><quote_A>4</quote_A>"
    verdict = parse(text)
    assert [cut(text, span) for span in verdict.quotes_a] == ["2", "3"]
    assert cut(text, verdict.justify) == "2"


def test_a_verdict_is_a_frozen_value() -> None:
    verdict = parse_verdict(CHAT)
    assert verdict == parse_verdict(CHAT) == reference_parse(CHAT)
    assert verdict != parse_verdict(REASONING)
    assert verdict != "A"
    assert len({verdict, parse_verdict(CHAT), parse_verdict(REASONING)}) == 2
    assert eval(repr(verdict)) == verdict
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    assert repr(parse_verdict("")) == "Verdict(error=FormatError.NO_TYPE)"
    assert isinstance(verdict.rubric_items[0], RubricItem)
    assert isinstance(verdict.answer_span, Span)
    with pytest.raises(AttributeError):
        verdict.answer = "B"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        verdict.other = "B"  # type: ignore[attr-defined]
    assert Verdict(answer="tie", quotes_a=(Span(1, 2),)).quotes_a == (Span(1, 2),)
    with pytest.raises(ValueError, match="answer must be A, B, tie or None, not D"):
        Verdict(answer="D")  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="text must be a str, not NoneType"):
        parse_verdict(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, not bytes"):
        parse_verdicts(["", b""])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="takes a list of texts"):
        parse_verdicts("text")
    with pytest.raises(ValueError, match="rule must be last_tag or rm_r1, not newest"):
        parse_verdict("", rule="newest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be from 0"):
        parse_verdicts([], -1)
    assert parse_verdicts([]) == []
    assert parse_verdicts(iter([CHAT])) == [parse_verdict(CHAT)]
    assert rmr1.parse_verdict is parse_verdict


MEGA = 10_000_000
GARBAGE = {
    "opens": "<quote_A>" * (MEGA // 9),
    "closes": "</quote_A>" * (MEGA // 10),
    "pairs": "<eval>" + "<quote_A></quote_A>" * (MEGA // 19) + "</eval>",
    "nested": "<eval>" * (MEGA // 13) + "</eval>" * (MEGA // 13),
    "thinks": "<think>" * (MEGA // 15) + "</think>" * (MEGA // 15),
    "alternating thinks": "<think></think>" * (MEGA // 15),
    "answers": "<answer>[[C]]</answer>" * (MEGA // 22),
    "angles": "<" * MEGA,
    "angle and spaces": "<" + " " * MEGA,
    "many angles and spaces": ("<" + " " * 3000) * (MEGA // 3001),
    "half tags": "<answer" * (MEGA // 7),
    "letters": "<" + "a" * MEGA,
    "brackets": f"<answer>{'[' * MEGA}</answer>",
    "spaces in answer": f"<answer>[[{' ' * MEGA}</answer>",
    "wide": "㰼" * (MEGA // 2),
    "emoji": "😀<" * (MEGA // 2),
    "newlines": f"<rubric>{chr(10) * MEGA}</rubric>",
    "spaces in rubric": f"<rubric>1. {' ' * MEGA}x</rubric>",
    "numbers": f"<rubric>{'1.' + chr(10)} {'1 ' * (MEGA // 2)}</rubric>",
    "digits": f"<rubric>1. {'1' * MEGA}</rubric>",
    "items": f"<rubric>{'- a' + chr(10):s}{('- 5' + chr(10)) * (MEGA // 4)}</rubric>",
    "weights": f"<rubric>1. {'weight ' * (MEGA // 7)}</rubric>",
    "hashes": f"<rubric>{'#' * MEGA}</rubric>",
}


def seconds(parse: Parser, text: str) -> float:
    start = time.process_time()
    parse(text)
    return time.process_time() - start


@pytest.mark.parametrize("name", GARBAGE)
def test_ten_megabytes_of_garbage(name: str) -> None:
    """On a busy core most take 0.02 s of processor time, 2.5 million rubric items 0.7 s.

    The bound leaves room for a slow machine; quadratic time would be hours.
    """
    assert seconds(parse_verdict, GARBAGE[name]) < 3


@pytest.mark.parametrize("name", GARBAGE)
def test_reference_is_linear_too(name: str) -> None:
    """A hundredth of each text: were the time quadratic, it would be seconds, not milliseconds."""
    text = GARBAGE[name][:-20:100] if set(GARBAGE[name]) <= {"<"} else GARBAGE[name][: MEGA // 50]
    assert seconds(reference_parse, text) < 1
    assert parse_verdict(text) == reference_parse(text)


def test_a_batch_releases_the_lock() -> None:
    """Another thread of Python never stands still for as long as a batch is parsed."""
    texts = [CHAT * 2000] * 400
    longest, stop = [0.0], threading.Event()

    def run_on() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now

    thread = threading.Thread(target=run_on)
    thread.start()
    began = time.perf_counter()
    try:
        parse_verdicts(texts, 1)
        lasted = time.perf_counter() - began
    finally:
        stop.set()
        thread.join()
    assert lasted > 0.1  # else the scheduler's own pauses would say nothing
    assert longest[0] < lasted / 2


def test_threads_share_the_work() -> None:
    """Threads of the process grow while a batch is parsed with four of them, and not with one."""

    def most_threads(threads: int) -> int:
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                most[0] = max(most[0], len(list(Path("/proc/self/task").iterdir())))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            parse_verdicts([CHAT * 2000] * 40, threads)
        finally:
            stop.set()
            watcher.join()
        return most[0]

    assert most_threads(4) >= most_threads(1) + 2
