"""Formats of public preference sets: what a row becomes, and what is said of a wrong one."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import pytest

from rmr1.data import Pair
from rmr1.datasets.sources import (
    NO_ASSISTANT,
    NO_RIGHT_VERDICT,
    NOT_APART,
    OTHER_CONVERSATIONS,
    Candidate,
    FormatName,
    Unfit,
    candidate_from_row,
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SKYWORK = {
    "chosen": [user("Why?"), says("Because.")],
    "rejected": [user("Why?"), says("No idea.")],
    "source": "helpsteer2",
}
TURNS = [user("Hi"), says("Hello."), user("Why?")]


def test_skywork() -> None:
    made = candidate_from_row(SKYWORK, "skywork")
    assert made == Candidate((user("Why?"),), "Because.", "No idea.", "helpsteer2")  # type: ignore[arg-type]
    several = {"chosen": [*TURNS, says("a")], "rejected": [*TURNS, says("b")], "source": "s"}
    assert candidate_from_row(several, "skywork").conversation == tuple(TURNS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": [user("When?"), says("Now.")]}, OTHER_CONVERSATIONS),
        ({"rejected": [user("Why?")]}, NO_ASSISTANT),
        ({"chosen": []}, NO_ASSISTANT),
    ],
)
def test_a_well_formed_row_that_is_no_pair(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        candidate_from_row(SKYWORK | change, "skywork")


def test_code_preference_pairs() -> None:
    row = {"input": "Sort it", "accepted": "sorted(x)", "rejected": "x", "instruction": "…"}
    made = candidate_from_row(row, "code-preference-pairs")
    assert (made.conversation, made.chosen, made.rejected) == (
        (user("Sort it"),), "sorted(x)", "x",
    )  # fmt: skip


def test_math_step_dpo_puts_the_common_steps_before_both_answers() -> None:
    row = {
        "prompt": "2 + 2 + 2?",
        "initial_reason_steps": "Step 1: 2 + 2 = 4.\nStep 2: ",
        "chosen": "no",
        "rejected": "no",
        "full_chosen": "4 + 2 = 6.",
        "full_rejected": "4 + 2 = 7.",
    }
    made = candidate_from_row(row, "math-step-dpo")
    assert made.chosen == "Step 1: 2 + 2 = 4.\nStep 2: 4 + 2 = 6."
    assert made.rejected == "Step 1: 2 + 2 = 4.\nStep 2: 4 + 2 = 7."


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        {"prompt": [user("Why?")], "chosen": [says("Because.")], "rejected": [says("No idea.")]},
        {"prompt": [user("Why?")], "chosen": "Because.", "rejected": "No idea."},
        {"chosen": SKYWORK["chosen"], "rejected": SKYWORK["rejected"]},
        # The prompt in its column and in both conversations, as UltraFeedback has it.
        {"prompt": "Why?", "chosen": SKYWORK["chosen"], "rejected": SKYWORK["rejected"]},
        {"prompt": [user("Why?")], "chosen": SKYWORK["chosen"], "rejected": SKYWORK["rejected"]},
    ],
)
def test_trl_in_all_its_forms(row: dict[str, Any]) -> None:
    made = candidate_from_row(row, "trl")
    assert made == Candidate((user("Why?"),), "Because.", "No idea.")  # type: ignore[arg-type]


BE_BRIEF = {"role": "system", "content": "Be brief."}
AGAIN = [says("Because."), user("And?")]


@pytest.mark.parametrize(
    ("prompt", "begin"),
    [
        ([BE_BRIEF, user("Why?")], [user("Why?")]),  # a system turn in the prompt only
        ([user("Why?")], [BE_BRIEF, user("Why?")]),  # or in the conversations only
        ([BE_BRIEF, user("Why?")], [BE_BRIEF, user("Why?")]),
        ([BE_BRIEF, user("Why?")], []),
        ([BE_BRIEF], [user("Why?")]),
        ([BE_BRIEF, user("Why?")], [user("Why?"), *AGAIN]),
        ([BE_BRIEF, user("Why?"), *AGAIN], [user("And?")]),
        ([BE_BRIEF, user("Why?")], AGAIN),
    ],
)
def test_trl_prompts_are_not_repeated(
    prompt: list[dict[str, str]], begin: list[dict[str, str]]
) -> None:
    row = {"prompt": prompt, "chosen": [*begin, says("So.")], "rejected": [*begin, says("No.")]}
    whole = [BE_BRIEF, user("Why?"), *(AGAIN if "And?" in json.dumps(row) else [])]
    assert candidate_from_row(row, "trl").conversation == tuple(whole)


def test_trl_texts_with_the_prompt_inside_are_cut_between_words() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    made = candidate_from_row({**row, "id": 7, "source": "sky"}, "trl")
    assert made == Candidate((user("The sky is"),), "blue.", "black.", "sky", "7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no prompt in them"):
        candidate_from_row({"chosen": "blue", "rejected": "black"}, "trl")


def shown(question: str, a: str, b: str) -> str:
    return (
        f"[Client Question]\n{question}\n\n[The Start of Chatbot A's Response]\n{a}\n"
        f"[The End of Chatbot A's Response]\n\n[The Start of Chatbot B's Response]\n{b}\n"
        "[The End of Chatbot B's Response]"
    )


def shown_turns(conversation: list[dict[str, str]], a: str, b: str, misspelt: bool) -> str:
    parts = []
    for side, answer in (("A", a), ("B", b)):
        name = "Chabot B" if misspelt and side == "B" else f"Chatbot {side}"
        turns = [*conversation, says(answer)]
        told = "\n".join(
            f"{'User' if turn['role'] == 'user' else name}: {turn['content']}" for turn in turns
        )
        edge = f"the Conversation between Chatbot {side} and the Client]"
        parts.append(f"[The Start of {edge}\n{told}\n[The End of {edge}")
    return "\n\n".join(parts)


def rm_r1(text: str, winner: str, **more: Any) -> dict[str, Any]:
    return {"context_messages": [{"role": "system", "content": "…"}, user(text)],
            "winner": winner, **more}  # fmt: skip


def test_rm_r1_pairs_of_one_turn_and_of_several() -> None:
    one = candidate_from_row(rm_r1(shown("Why\n\nso?", "yes\n\n1", "no"), "model_b"), "rm-r1")
    assert one == Candidate((user("Why\n\nso?"),), "no", "yes\n\n1")  # type: ignore[arg-type]
    for misspelt in (False, True):
        text = shown_turns(TURNS, "a\nb", "c", misspelt)
        several = candidate_from_row(rm_r1(text, "model_a"), "rm-r1")
        assert several == Candidate(tuple(TURNS), "a\nb", "c")  # type: ignore[arg-type]


TRACE = "<type>Reasoning</type><solution>4</solution><eval>x</eval><answer>[[B]]</answer>"


def test_rm_r1_traces_keep_the_side_they_speak_of() -> None:
    text = shown("2 + 2", "5", "4")
    made = candidate_from_row(rm_r1(text, TRACE, ground_truth="model_b"), "rm-r1")
    assert (made.chosen, made.rejected, made.label, made.kind) == ("4", "5", "B", "reasoning")
    assert made.trace == TRACE
    assert made == candidate_from_row(rm_r1(text, TRACE), "rm-r1")
    for winner, truth in ((TRACE, "model_a"), ("I cannot say.", "model_b"), (TRACE, "tie")):
        with pytest.raises(Unfit, match=NO_RIGHT_VERDICT):
            candidate_from_row(rm_r1(text, winner, ground_truth=truth), "rm-r1")


@pytest.mark.parametrize(
    "after", ["", "\n\nEnd with <answer>[[A]]</answer> or <answer>[[B]]</answer>."]
)
def test_rm_r1_prompts_that_are_one_user_turn(after: str) -> None:
    """As models that think by themselves are asked: what to do stands before and after the pair."""
    before = "Judge the two replies to the [Client Question] below.\n\n"
    for text, turns in (
        (shown("Why\n\nso?", "yes", "no [[A]]"), [user("Why\n\nso?")]),
        (shown_turns(TURNS, "yes", "no [[A]]", True), TURNS),
    ):
        row = {"context_messages": [user(before + text + after)], "winner": "model_a"}
        made = candidate_from_row(row, "rm-r1")
        assert made == Candidate(tuple(turns), "yes", "no [[A]]")  # type: ignore[arg-type]


MARK = "[The End of Chatbot A's Response]\n\n[The Start of Chatbot B's Response]"


@pytest.mark.parametrize(
    "text",
    [
        "Which is better?",
        "",
        shown_turns([user("x\nUser: y")], "a", "b", False),
        shown_turns(TURNS, "a\nUser: b", "c", False),
        shown("Why?", f"a\n{MARK}\nx", "b"),  # one of two places could be the end of A
        shown("Why?", "a", f"b\n{MARK}\nx"),
        shown("[Client Question]\nWhy?", "a", "b"),
    ],
)
def test_rm_r1_prompts_that_cannot_be_taken_apart(text: str) -> None:
    with pytest.raises(Unfit, match=NOT_APART):
        candidate_from_row(rm_r1(text, "model_a"), "rm-r1")


def test_rm_r1_marks_within_a_line_are_text() -> None:
    question, answer = (
        "What is\n [Client Question]?",
        "The [The End of Chatbot A's Response] ends it.",
    )
    made = candidate_from_row(rm_r1(shown(question, answer, "b"), "model_a"), "rm-r1")
    assert (made.conversation[0]["content"], made.chosen, made.rejected) == (question, answer, "b")


def test_rm_r1_many_marks_take_no_time() -> None:
    text = shown("Why?", f"\n{MARK}\n" * 5000, f"\n{MARK}\n" * 5000)
    start = time.perf_counter()
    with pytest.raises(Unfit):
        candidate_from_row(rm_r1(text, "model_a"), "rm-r1")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("truth", [["model_a"], 1, {"winner": "model_a"}])
def test_rm_r1_ground_truth_of_another_type(truth: Any) -> None:
    with pytest.raises(ValueError, match='column "ground_truth" must be a text, got'):
        candidate_from_row(rm_r1(shown("2 + 2", "5", "4"), TRACE, ground_truth=truth), "rm-r1")


PAIR = Pair("p1", "mine", ({"role": "user", "content": "q"},), "a", "b", "B", "chat")


def test_own_pairs_lose_their_side_unless_they_have_a_trace() -> None:
    row = json.loads(json.dumps(asdict(PAIR)))
    made = candidate_from_row(row, "pairs")
    assert (made.chosen, made.rejected, made.label, made.id) == ("b", "a", None, "p1")
    traced = candidate_from_row(row | {"trace": "t"}, "pairs")
    assert (traced.label, traced.trace) == ("B", "t")
    assert traced.pair("B").answer_b == "b"
    # An empty answer is a reason to drop a pair, and no fault of its file.
    assert candidate_from_row(row | {"answer_a": " "}, "pairs").rejected == ""


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("skywork", "chosen, rejected, source"),
        ("code-preference-pairs", "input, accepted, rejected"),
        ("math-step-dpo", "prompt, initial_reason_steps, full_chosen, full_rejected"),
        ("rm-r1", "context_messages, winner"),
        ("trl", "chosen, rejected"),
        ("pairs", "id, source, answer_a, answer_b, conversation, label, kind"),
    ],
)
def test_other_columns_are_shown_with_those_that_are_wanted(form: FormatName, wanted: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked here
        candidate_from_row({"question": "x", "label": 1}, form)
    assert wanted in str(caught.value)
    assert "found question, label" in str(caught.value)
    with pytest.raises(ValueError, match="must be an object with columns, got list"):
        candidate_from_row([1], form)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": None}, 'column "source" must be a text, got None'),
        ({"chosen": "Because."}, 'column "chosen" must be a list of messages'),
        ({"chosen": ["x"]}, 'column "chosen[0]" must have role and content'),
        ({"chosen": [{"role": "human", "content": "x"}]}, 'column "chosen[0].role" must be one of'),
        ({"chosen": [user("Why?"), {"role": "assistant", "content": None}]}, '"chosen[1].content"'),
        ({"chosen": [user("Why?"), says("half \ud83d")]}, "half a surrogate pair"),
    ],
)
def test_other_types_name_the_column(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is checked here
        candidate_from_row(SKYWORK | change, "skywork")
    assert told in str(caught.value)


def test_content_does_not_know_order_nor_label() -> None:
    conversation = ({"role": "user", "content": "q"},)
    one = Candidate(conversation, "a", "b")  # type: ignore[arg-type]
    other = Candidate(conversation, "b", "a", source="x", id="y")  # type: ignore[arg-type]
    assert one.content == other.content
    assert one.content != Candidate(conversation, "a", "c").content  # type: ignore[arg-type]
