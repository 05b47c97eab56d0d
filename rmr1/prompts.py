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

import contextlib
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

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
    text that is tokenised once more with special tokens gets a second BOS). A token that steers the
    model and that a message spells out, such as an answer that ends its own turn and goes on as the
    judge, is tokenised as the plain text it is. ValueError when the template refuses the messages,
    or where no character is left to mark such a place with.
    """
    special, marks = _steering(tokenizer)
    spelt = _spelt(special, messages)
    count = len(spelt)
    spelt += _spelt(marks, [message for message in messages if _guarded(message)])
    mark = ""
    if spelt:
        mark = _unused_character(messages)
        messages = [_hide(m, spelt if _guarded(m) else spelt[:count], mark) for m in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(
            f"the model's chat template refuses the prompt ({error}); the styles `reasoning` and"
            " `compact` have one user turn and no system turn"
        ) from error
    if not mark:
        whole: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return whole
    pieces = re.split(f"{mark}([0-9]+){mark}", text)
    # All at once, and each hidden token once: a text may spell out a hundred thousand.
    between = iter(tokenizer(pieces[::2], add_special_tokens=False)["input_ids"])
    steering = {*special.values(), *marks.values()}
    hidden = [_as_text(tokenizer, token, steering) for token in spelt]
    ids: list[int] = []
    for at, piece in enumerate(pieces):
        ids += hidden[int(piece)] if at % 2 else next(between)
    return ids


_Steering = tuple[dict[str, int], dict[str, int]]
_STEERING: WeakKeyDictionary[Any, tuple[str, _Steering]] = WeakKeyDictionary()


def _steering(tokenizer: Any) -> _Steering:
    """The tokens that a chat is written with, and their ids: special ones, and the template's.

    The role marks of some models are no special tokens (of DeepSeek-R1's distilled models, for
    one). What a template writes may also be blanks, a word or a single sign that is a token for
    another reason: these are text.
    """
    # Found out once for a tokenizer as it is: a template takes as long as a short prompt.
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    as_it_is = repr((size, getattr(tokenizer, "chat_template", None)))
    known = _STEERING.get(tokenizer)
    if known is None or known[0] != as_it_is:
        known = _STEERING[tokenizer] = as_it_is, _find_steering(tokenizer)
    return known[1]


def _find_steering(tokenizer: Any) -> _Steering:
    special: dict[str, int] = {}
    others: dict[str, int] = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special[token.content] = number
        elif len(token.content) > 1 and re.search(r"[^\w\s]", token.content):
            others[token.content] = number
    written = _written(tokenizer) if others else ""
    return special, {text: number for text, number in others.items() if text in written}


def _written(tokenizer: Any) -> str:
    """The chat template's source, and what it makes of some turns: it may put marks together."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by their names
        template = "\n".join(template.values())
    elif not isinstance(template, str):
        template = "\n".join(one["template"] for one in template or ())
    source = template.replace("\\n", "\n")  # as a line break is written inside quotes
    # Not every template takes a system turn, or a reply.
    for roles in (
        ("system", "user", "assistant", "user"),
        ("user", "assistant", "user"),
        ("user",),
    ):
        turns = [{"role": role, "content": "x"} for role in roles]
        with contextlib.suppress(Exception):  # a template can fail in any way that Python can
            return f"{source}\n" + str(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            )
    return source


def _guarded(message: Message) -> bool:
    """Whether marks that are not special are hidden in it.

    Not in the assistant's own turns: templates look for the end of its thoughts there.
    """
    return message["role"] != "assistant"


def _as_text(tokenizer: Any, text: str, steering: set[int]) -> list[int]:
    """The ids of a token's text, none of which is in `steering`."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    if len(text) == 1 or steering.isdisjoint(ids):
        return ids
    # The tokenizer splits special ones only. Two parts of a token are never joined again.
    return _as_text(tokenizer, text[:1], steering) + _as_text(tokenizer, text[1:], steering)


# Unicode's private use areas.
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def _unused_character(messages: Sequence[Message]) -> str:
    """A private character that no message contains; ValueError where they contain all."""
    used = set().union(*(message["content"] for message in messages))
    unused = (chr(code) for area in _PRIVATE for code in area if chr(code) not in used)
    mark = next(unused, "")
    if not mark:
        raise ValueError(
            "the texts contain every character of Unicode's private use areas, and one is needed to"
            " mark the special tokens that they spell out; leave one out"
        )
    return mark


def _spelt(tokens: Iterable[str], messages: Sequence[Message]) -> list[str]:
    """Those of the tokens that stand in a message."""
    return [token for token in tokens if any(token in one["content"] for one in messages)]


def _hide(message: Message, spelt: Sequence[str], mark: str) -> Message:
    """The message with each spelt-out token as its number in `spelt` between two marks."""
    if not spelt:
        return message
    longest_first = sorted(spelt, key=len, reverse=True)
    content = re.sub(
        "|".join(map(re.escape, longest_first)),
        lambda found: f"{mark}{spelt.index(found[0])}{mark}",
        message["content"],
    )
    return {"role": message["role"], "content": content}
