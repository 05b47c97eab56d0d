"""The judge's prompts: a pair becomes chat messages, and messages become token ids.

Three styles, chosen by name in a config and never guessed from a model's path:

- `rubric`: chain of rubrics for instruct models (the task is classified first; reasoning tasks get
  an own solution, chat tasks a weighted rubric). The instructions are a system turn.
- `reasoning`: for models that already think before they answer. One user turn, verdict only.
- `compact`: the chain of rubrics in three lines, for small models that were taught the format.

The wording is this project's own. `prompt_hash` identifies the exact template in every result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from rmr1.data import Message, Pair

Style = Literal["rubric", "reasoning", "compact"]

_RUBRIC_SYSTEM = """\
You are a careful judge. You read a conversation and two candidate replies, A and B, and decide \
which reply serves the user better. Neither the order nor the length of the replies is a reason.

First decide what kind of task it is. Reasoning covers mathematics, code, logic and any question \
with a result that can be worked out. Chat covers everything else: open conversation, advice, \
style, safety, help with facts.

For a reasoning task, work out your own solution before you look at the replies, then hold each \
reply against it. Write:
<type>Reasoning</type>
<solution>your own solution, step by step</solution>
<eval>how A and B compare with it</eval>
<answer>[[A]]</answer>

For a chat task, write the criteria that matter for this request, with weights that add up to \
100%, justify them, then hold each reply against them. Write:
<type>Chat</type>
<rubric>
1. first criterion (60%)
2. second criterion (40%)
<justify>why these criteria and weights</justify>
</rubric>
<eval>how A and B do on each criterion</eval>
<answer>[[A]]</answer>

Inside <eval>, support what you say: copy words from a reply as <quote_A>...</quote_A> or \
<quote_B>...</quote_B>, or put them in your own words as <summary_A>...</summary_A> or \
<summary_B>...</summary_B>. The last line is the verdict: <answer>[[A]]</answer> or \
<answer>[[B]]</answer>, and nothing after it."""

_REASONING_TASK = """\
Below are a conversation and two candidate replies, A and B. Think about what a good reply needs, \
working out the solution yourself where there is one, and compare the two. Neither their order \
nor their length is a reason. End with your verdict alone on the last line: <answer>[[A]]</answer> \
if A is better, <answer>[[B]]</answer> if B is better."""

_COMPACT_TASK = "Judge the two answers."


def _single(question: str, pair: Pair) -> str:
    return (
        f"[Question]\n{question}\n[Answer A]\n{pair.answer_a}\n[Answer B]\n{pair.answer_b}\n[End]"
    )


def _conversation(pair: Pair, answer: str, name: str) -> str:
    """A whole conversation that ends in one of the answers. Speakers are named alike in both."""
    names = {"system": "System", "user": "User", "assistant": "Assistant"}
    turns = [f"{names[turn['role']]}: {turn['content']}" for turn in pair.conversation]
    return "\n".join([f"[Conversation {name}]", *turns, f"Assistant: {answer}"])


def task_text(pair: Pair) -> str:
    """What is to be judged: question and two answers, or two whole conversations."""
    if len(pair.conversation) == 1:
        return _single(pair.conversation[0]["content"], pair)
    return (
        _conversation(pair, pair.answer_a, "A")
        + "\n"
        + _conversation(pair, pair.answer_b, "B")
        + "\n[End]"
    )


def render(pair: Pair, style: Style) -> list[Message]:
    """The chat messages that ask for a judgment of `pair`."""
    if style == "rubric":
        return [
            {"role": "system", "content": _RUBRIC_SYSTEM},
            {"role": "user", "content": task_text(pair)},
        ]
    if style == "reasoning":
        return [{"role": "user", "content": f"{_REASONING_TASK}\n\n{task_text(pair)}"}]
    if style == "compact":
        return [{"role": "user", "content": f"{_COMPACT_TASK}\n{task_text(pair)}"}]
    raise ValueError(f"prompt style must be one of {', '.join(get_args(Style))}, got {style!r}")


def encode(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, ready for the assistant's turn.

    The chat template writes every special token itself, so nothing is added around it (templated
    text that is tokenised once more with special tokens gets a second BOS). A special token that a
    message spells out, such as an answer that ends its own turn and goes on as the judge, is
    tokenised as the plain text it is. ValueError when the template refuses the messages.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spelt = [token for token in special if any(token in m["content"] for m in messages)]
    mark = ""
    if spelt:
        mark = _unused_character(messages)
        messages = [_hide(message, spelt, mark) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(
            f"the model's chat template refuses the prompt ({error}); the styles `reasoning` and"
            " `compact` have one user turn and no system turn"
        ) from error
    ids: list[int] = []
    pieces = re.split(f"{mark}([0-9]+){mark}", text) if mark else [text]
    for at, piece in enumerate(pieces):
        hidden = at % 2 == 1
        ids += tokenizer(
            spelt[int(piece)] if hidden else piece,
            add_special_tokens=False,
            split_special_tokens=hidden,
        )["input_ids"]
    return ids


def _unused_character(messages: Sequence[Message]) -> str:
    """A character of the private use area that no message contains."""
    used = set().union(*(message["content"] for message in messages))
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)


def _hide(message: Message, spelt: Sequence[str], mark: str) -> Message:
    """The message with each spelt-out special token as its number in `spelt` between two marks."""
    longest_first = sorted(spelt, key=len, reverse=True)
    content = re.sub(
        "|".join(map(re.escape, longest_first)),
        lambda found: f"{mark}{spelt.index(found[0])}{mark}",
        message["content"],
    )
    return {"role": message["role"], "content": content}


def prompt_hash(style: Style) -> str:
    """Twelve hex digits that identify the exact wording and layout of a style."""
    probe: Message = {"role": "user", "content": "{question}"}
    single = Pair("", "", (probe,), "{a}", "{b}", "A", "chat")
    multi = Pair("", "", (probe, {"role": "assistant", "content": "{r}"}, probe), "{a}", "{b}", "A",
                 "chat")  # fmt: skip
    text = repr([render(single, style), render(multi, style)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
