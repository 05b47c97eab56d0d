"""The judge's prompts: a pair becomes chat messages, and messages become token ids.

A prompt is a Jinja file. It sets `user`, and `system` where there is a system turn, from
`conversation` (messages with role and content), `answer_a`, `answer_b` and two switches, `classify`
and `rubric`. It is never told the label, so it cannot show it. Three come with the package
(rmr1/prompt_templates), chosen by name in a config and never guessed from a model's path:

- `rubric`: chain of rubrics for instruct models (the task is classified first; reasoning tasks get
  an own solution, chat tasks a weighted rubric). The instructions are a system turn.
- `reasoning`: for models that already think before they answer. One user turn, verdict only.
- `compact`: the chain of rubrics in three lines, for small models that were taught the format.

The wording is this project's own. `Prompt.hash` identifies the exact template in every result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import (
    FileSystemLoader,
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator

from rmr1.data import Message, Pair

Part = Literal["rubric", "classification"]

_SHIPPED = Path(__file__).parent / "prompt_templates"
SHIPPED_PROMPTS = ("rubric", "reasoning", "compact")

_USER: Message = {"role": "user", "content": "{question}"}
_REPLY: Message = {"role": "assistant", "content": "{r}"}
_SINGLE = Pair("", "", (_USER,), "{a}", "{b}", "A", "chat")
_MULTI = replace(_SINGLE, conversation=(_USER, _REPLY, _USER))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template with its switches; `hash` is twelve hex digits of its exact wording and layout."""

    style: str
    without: tuple[Part, ...]
    template: Template = field(repr=False, compare=False)
    hash: str = ""

    def render(self, pair: Pair) -> list[Message]:
        """The chat messages that ask for a judgment of `pair`; ValueError where the file fails."""
        try:
            made = self.template.make_module(
                {
                    "conversation": pair.conversation,
                    "answer_a": pair.answer_a,
                    "answer_b": pair.answer_b,
                    "classify": "classification" not in self.without,
                    "rubric": "rubric" not in self.without,
                }
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(f"prompt {self.style}: {_told(error)}") from None
        user, system = getattr(made, "user", None), getattr(made, "system", None)
        if not isinstance(user, str):
            raise ValueError(
                f"prompt {self.style} sets no user turn; write {{% set user %}}...{{% endset %}}"
            )
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": user}]


@cache
def load_prompt(style: str, without: tuple[Part, ...] = ()) -> Prompt:
    """A prompt of the package by its name, or one from a file whose name ends in `.jinja`.

    `without` leaves parts of the chain of rubrics out, as the paper's ablations do. Files are run
    in Jinja's sandbox, and can import those of the package.

    Raises:
        ValueError: there is no such prompt, the file is no template, shows not all of a pair, or
            has no part that can be left out.
    """
    prompt = _hashed(Prompt(style, without, _template(style)))
    shown = "\n".join(turn["content"] for turn in prompt.render(_MULTI))
    for told, times in (("{question}", 2), ("{r}", 1), ("{a}", 1), ("{b}", 1)):
        if shown.count(told) < times:
            name = {"{a}": "answer_a", "{b}": "answer_b"}.get(told, "every turn of conversation")
            raise ValueError(f"prompt {style} does not show {name}; a judge has to see all of it")
    for part in without:
        rest = tuple(other for other in without if other != part)
        if _hashed(replace(prompt, without=rest)).hash == prompt.hash:
            raise ValueError(f"prompt {style} has no {part} that can be left out")
    return prompt


def _checked_style(style: str) -> str:
    load_prompt(style)
    return style


# A setting that names a prompt.
PromptStyle = Annotated[str, AfterValidator(_checked_style)]


def _template(style: str) -> Template:
    # Values may not be changed either: one prompt must not depend on those before it.
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_SHIPPED),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if style in SHIPPED_PROMPTS:
        return environment.get_template(f"{style}.jinja")
    if not style.endswith(".jinja"):
        raise ValueError(
            f"prompt style must be one of {', '.join(SHIPPED_PROMPTS)} or a .jinja file, got"
            f" {style!r}"
        )
    try:
        return environment.from_string(Path(style).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{style}: cannot be read ({error.strerror}); give a template") from None
    except (TemplateError, UnicodeDecodeError) as error:
        raise ValueError(f"{style}: no template ({_told(error)})") from None


def _told(error: Exception) -> str:
    line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return f"{error or type(error).__name__}{line}"


def _hashed(prompt: Prompt) -> Prompt:
    text = repr([prompt.render(_SINGLE), prompt.render(_MULTI)])
    return replace(prompt, hash=hashlib.sha256(text.encode()).hexdigest()[:12])


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
