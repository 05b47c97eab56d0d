"""The JSON files of a model directory: how they are read, and what their values may be.

Anyone may have written them, so nothing is taken for granted; each error names the value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short  # a value in an error: it may be of any length and depth
from typing import Any

__all__ = [
    "check_size",
    "end_token_ids",
    "flag",
    "names",
    "positive",
    "read_json",
    "short",
    "size",
    "token_id",
]

# Far above any model, and low enough that no tensor has more bytes than 64 bits count.
_MOST_POSITIONS, _MOST_LAYERS, _MOST_OF_OTHERS = 2**31 - 1, 2**12, 2**20
# Models compute in float32 at most: what is smaller is 0 there, what is larger infinite.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. ValueError names the file if it holds anything else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is nested too deep to be read; get it again.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number without an end
        raise ValueError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(raw).__name__}.")
    return raw


def end_token_ids(raw: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    """Return `eos_token_id` of a config.json or generation_config.json: one, several or none."""
    value = raw.get("eos_token_id")
    if not isinstance(value, list):
        return token_id(raw, "eos_token_id", "a token id or a list of token ids")
    if not all(type(one) is int and abs(one) < 2**31 for one in value):
        raise ValueError(f"eos_token_id must hold token ids only, got {short(value)}.")
    return tuple(value)


def token_id(raw: Mapping[str, Any], name: str, wanted: str = "a token id") -> int | None:
    """Read a token id. None or a negative one, as some files have it, stands for no token."""
    value = raw.get(name)
    if value is not None and (type(value) is not int or abs(value) >= 2**31):
        raise ValueError(f"{name} must be {wanted}, got {short(value)}.")
    return value


def size(raw: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """Read a whole number from `least` up, see `check_size`."""
    if name not in raw and default is None:
        raise ValueError(f"model config: `{name}` is missing from config.json.")
    value = raw.get(name, default)
    check_size(name, value, least)
    return value


def check_size(name: str, value: Any, least: int = 1) -> None:
    """ValueError unless `value` is a whole number that a model can have there."""
    if type(value) is not int or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer from {least} up"
        raise ValueError(f"model config: {name} must be {wanted}, got {short(value)}.")
    most = _MOST_OF_OTHERS
    if name.endswith(("_position_embeddings", "_window")):
        most = _MOST_POSITIONS
    elif name.endswith("_layers"):
        most = _MOST_LAYERS
    if value > most:
        raise ValueError(f"model config: {name} must be at most {most}, got {short(value)}.")


def positive(
    raw: Mapping[str, Any], name: str, default: float | None = None, *, or_zero: bool = False
) -> float:
    """Read a number above 0 (`or_zero`: or 0 itself); JSON as Python reads it has NaN, too."""
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"model config: {name} must be a number, got {short(value)}.")
    # Compared before it is converted: float() of an integer with 400 digits overflows.
    if not (_SMALLEST <= value <= _LARGEST or (or_zero and value == 0)):
        wanted = "0 or a finite number above it" if or_zero else "a finite number above 0"
        raise ValueError(f"model config: {name} must be {wanted} in float32, got {short(value)}.")
    return float(value)


def flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Read true or false; null is false. A text such as "false" would count as true in Python."""
    value = raw.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"model config: {name} must be true or false, got {short(value)}.")
    return bool(value)


def names(raw: Mapping[str, Any], name: str) -> list[str]:
    """Read a list of names; none is an empty list."""
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"model config: {name} must be a list of names, got {short(value)}.")
    return value
