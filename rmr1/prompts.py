"""The judge's prompts: a pair becomes chat messages, and messages become token ids.

A prompt is a Jinja file. It sets `user`, and `system` where there is a system turn, from
`conversation` (messages with role and content), `answer_a`, `answer_b` and two switches, `classify`
and `rubric`. It is never told the label, so it cannot show it. Three come with the package
(rmr1/prompt_templates), chosen by name in a config and never guessed from a model's path:

- `rubric`: chain of rubrics for instruct models (the task is classified first; reasoning tasks get
  an own solution, chat tasks a weighted rubric). The instructions are a system turn.
- `reasoning`: for models that already think before they answer. One user turn, verdict only.
- `compact`: the chain of rubrics in three lines, for small models that were taught the format.

The wording is this project's own. `Prompt.hash` identifies the exact template in every result: it
covers what the template makes of a few pairs, its source with those that it imports, and the
switches.
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
    Environment,
    FileSystemLoader,
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    meta,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator

from rmr1.data import Message, Pair

Part = Literal["rubric", "classification"]

_SHIPPED = Path(__file__).parent / "prompt_templates"
SHIPPED_PROMPTS = ("rubric", "reasoning", "compact")

# What every template is tried with, and hashed by: one question, one with a system turn, and a
# conversation of many turns. The texts are long, with a mark in every line: what is cut shows.
_LONG = "\n".join(f"{{NAME{line}}} and so on, until it is long" for line in range(500))
_USER: Message = {"role": "user", "content": _LONG.replace("NAME", "question")}
_SYSTEM: Message = {"role": "system", "content": "{system}"}
_REPLY: Message = {"role": "assistant", "content": "{reply}"}
_ANSWERS = (_LONG.replace("NAME", "a"), _LONG.replace("NAME", "b"))
_SINGLE = Pair("", "", (_USER,), *_ANSWERS, "A", "chat")
_MANY: list[Message] = [
    turn | {"content": f"{{{turn['role']}{at}}}"} for at in range(20) for turn in (_USER, _REPLY)
]
_PROBES = tuple(
    replace(_SINGLE, conversation=turns)
    for turns in ((_USER,), (_SYSTEM, _USER), (_SYSTEM, *_MANY, _USER))
)
_MARK = re.compile(r"\{[a-z]+[0-9]*\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template with its switches; `hash` is twelve hex digits of its source and its wording."""

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
    template, sources = _template(style)
    prompt = Prompt(style, without, template)
    made = [prompt.render(pair) for pair in _PROBES]
    for pair, messages in zip(_PROBES, made, strict=True):
        _shows_all(prompt, pair, "\n".join(turn["content"] for turn in messages))
    for part in without:
        other = replace(prompt, without=tuple(one for one in without if one != part))
        if [other.render(pair) for pair in _PROBES] == made:
            raise ValueError(f"prompt {style} has no {part} that can be left out")
    # The source too: a template may treat a pair in a way that no probe shows.
    text = repr([sources, sorted(without), made])
    return replace(prompt, hash=hashlib.sha256(text.encode()).hexdigest()[:12])


def _shows_all(prompt: Prompt, pair: Pair, shown: str) -> None:
    """ValueError unless every mark of a probe is in the prompt that is made of it."""
    marks = set(_MARK.findall(shown))
    parts = {
        "every turn of conversation": "".join(turn["content"] for turn in pair.conversation),
        "answer_a": pair.answer_a,
        "answer_b": pair.answer_b,
    }
    for name, text in parts.items():
        if not marks.issuperset(_MARK.findall(text)):
            raise ValueError(
                f"prompt {prompt.style} does not show {name}; a judge has to see all of it"
            )


def _checked_style(style: str) -> str:
    load_prompt(style)
    return style


# A setting that names a prompt.
PromptStyle = Annotated[str, AfterValidator(_checked_style)]


def _template(style: str) -> tuple[Template, list[str]]:
    """The template, and the sources of it and of what it imports from the package."""
    # Values may not be changed either: one prompt must not depend on those before it.
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(_SHIPPED),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if style in SHIPPED_PROMPTS:
        path = _SHIPPED / f"{style}.jinja"
    elif style.endswith(".jinja"):
        path = Path(style)
    else:
        raise ValueError(
            f"prompt style must be one of {', '.join(SHIPPED_PROMPTS)} or a .jinja file, got"
            f" {style!r}"
        )
    try:
        source = path.read_text(encoding="utf-8")
        return environment.from_string(source), _sources(environment, source)
    except OSError as error:
        raise ValueError(f"{style}: cannot be read ({error.strerror}); give a template") from None
    except (TemplateError, UnicodeDecodeError) as error:
        raise ValueError(f"{style}: no template ({_told(error)})") from None


def _sources(environment: Environment, source: str) -> list[str]:
    """A template's source and those of the package's templates that it uses, and so on."""
    found, waiting = {"": source}, [source]
    while waiting:
        named = meta.find_referenced_templates(environment.parse(waiting.pop()))
        for name in named:
            # A name that is worked out while it runs could be any.
            for own in [name] if name else environment.list_templates():
                path = _SHIPPED / own
                if own not in found and path.parent == _SHIPPED and path.is_file():
                    found[own] = path.read_text(encoding="utf-8")
                    waiting.append(found[own])
    return [found[name] for name in sorted(found)]


def _told(error: Exception) -> str:
    line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return f"{error or type(error).__name__}{line}"


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
