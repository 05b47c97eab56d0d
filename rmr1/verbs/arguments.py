"""From a command line (and a TOML file) to a validated settings object.

pydantic-settings makes the parser and the help from the fields; the values are then laid over the
file's and validated together, so that every error can name where its key stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_origin

from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from rmr1.config import dotted, load_config, named_sections

# Arguments come from the command line and the file only: no variable has this prefix.
SETTINGS = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="RMR1_UNUSED_")

# Not "None": that is an answer a judge may be asked about.
_UNSET = "unset"


class Verb(BaseSettings):
    """A verb's arguments. `run` does the work and returns the exit code."""

    model_config = SETTINGS

    def run(self) -> int:
        """Do the work; 0 is success."""
        raise AssertionError("every verb has its own run")


VerbT = TypeVar("VerbT", bound=Verb)


def parse(kind: type[VerbT], args: Sequence[str], *, prog: str) -> VerbT:
    """Read arguments. Prints help and exits on --help; ValueError says what is wrong.

    A verb with a field `config_file` takes a TOML file there, and the other arguments are laid
    over it.
    """
    plain, inside = _of_named_sections(kind, args)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            kind,
            cli_prog_name=prog,
            cli_parse_args=plain,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            # What is required may stand in the file; without one the parser can tell.
            cli_enforce_required="config_file" not in kind.model_fields,
            cli_parse_none_str=_UNSET,
            cli_exit_on_error=False,
            cli_implicit_flags=True,
        )
        given = dotted(source())
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise ValueError(f"{reason}; `{prog} --help` lists the arguments") from None
    file = given.pop("config_file", None) or None
    return load_config(kind, file, {**given, **inside})


def _of_named_sections(kind: type[VerbT], args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without those of sections that the user names, and these by their dotted keys.

    --sources.NAME.key VALUE, also with "=": the parser knows no names that only the file has.
    """
    plain: list[str] = []
    inside: dict[str, Any] = {}
    words = iter(args)
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        parts = key.split(".")
        section = named_sections(kind).get(parts[0])
        if not word.startswith("--") or len(parts) < 3 or section is None:
            plain.append(word)
            continue
        given = text if equals else next(words, None)
        if given is None:
            raise ValueError(f"argument --{key}: expected one argument")
        field = section.model_fields.get(parts[2]) if len(parts) == 3 else None
        value = given if field is None else _value(key, get_origin(field.annotation), given)
        # A list may come in parts, as with the parser's own options.
        inside[key] = [*(inside.get(key) or []), *value] if isinstance(value, list) else value
    return plain, inside


def _value(key: str, origin: Any, text: str) -> Any:
    """What the parser makes of a text for a list (JSON or a,b) or a dict (JSON or a=1,b=2)."""
    if text == _UNSET:
        return None
    if origin not in (list, dict):
        return text
    if text.lstrip().startswith("[" if origin is list else "{"):
        try:
            return json.loads(text)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"argument --{key}: no JSON ({error})") from None
    items = [item.strip() for item in text.split(",") if item.strip()]
    if origin is list:
        return items
    if not all("=" in item for item in items):
        raise ValueError(f"argument --{key}: write NAME=VALUE,NAME=VALUE or JSON, got {text!r}")
    return dict(item.rsplit("=", 1) for item in items)
