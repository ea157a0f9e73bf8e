"""Values of the configuration: each is read by the type of its key, never by YAML's guess."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from string import Template

import yaml

# Keys whose value is a path
PATHS = ("DATA.PATH", "TRAIN.PRETRAINED", "TRAIN.RESUME", "OUTPUT")
_NULL = ("", "null", "Null", "NULL")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
_MAX_WHOLE = 2**63 - 1
_MAX_NAME, _MAX_PATH = 255, 4095  # bytes, on Linux
_SHOWN = 80


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the expected and the got value."""


class Word(str):
    """Text without quotes, which is a number, a truth value or a text as its key wants it."""


def convert(key: str, value: object, default: object, where: str) -> object:
    """`value` in the type of `default`, the one that `key` has; paths as `user_path` fills them in.

    value: a `Word`, a list of those, or a Python value. where: its place, for messages.
    Raises ConfigError.
    """
    if isinstance(default, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong(key, "list, as [1, 2],", value, where)
        return [convert(f"{key}[{i}]", v, default[0], where) for i, v in enumerate(value)]
    if isinstance(default, float):
        return _finite(key, _as_float(value), value, where)
    if isinstance(default, str):
        text = "" if value is None or (isinstance(value, Word) and value in _NULL) else value
        if not isinstance(text, str):
            raise _wrong(key, "str", value, where)
        return user_path(str(text), f"{key} {where}") if key in PATHS else str(text)
    found = _as_bool(value) if isinstance(default, bool) else _as_int(value)
    if found is None:
        raise _wrong(key, type(default).__name__, value, where)
    if abs(found) > _MAX_WHOLE:
        raise _wrong(key, f"int of at most {_MAX_WHOLE}", value, where)
    return found


def _as_bool(value: object) -> bool | None:
    if isinstance(value, Word):
        return yaml.SafeLoader.bool_values.get(value.lower())
    return value if isinstance(value, bool) else None


def _as_int(value: object) -> int | None:
    if isinstance(value, Word) and _WHOLE.fullmatch(value):
        return int(value) if len(value) < _SHOWN else _MAX_WHOLE + 1
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_float(value: object) -> float | None:
    """The number; None where it is none, infinity where it is too large."""
    if isinstance(value, Word):
        if _OCTAL.fullmatch(value):
            return None
        if _NOT_FINITE.fullmatch(value):
            return math.inf
    elif isinstance(value, str | bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _finite(key: str, number: float | None, value: object, where: str) -> float:
    if number is None:
        raise _wrong(key, "float", value, where)
    if not math.isfinite(number):
        raise _wrong(key, "a finite number", value, where)
    return number


def _wrong(key: str, expected: str, value: object, where: str) -> ConfigError:
    octal = isinstance(value, Word) and _OCTAL.fullmatch(value)
    hint = "; leave out the 0 in front, by which YAML means octal numbers" if octal else ""
    return ConfigError(f"{key}: expected {expected} {where}, got {shown(value)}{hint}")


def shown(value: object) -> str:
    """`value` for a message: in one short line."""
    if value is None or (isinstance(value, Word) and value in _NULL):
        return "nothing"
    kind = "" if isinstance(value, Word) else f" ({type(value).__name__})"
    text = repr(str(value)) if isinstance(value, str) else f"{value}"
    return (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...") + kind


def user_path(text: str, what: str) -> str:
    """A path with ~, ~USER, $VAR and ${VAR} filled in; $$ stands for the sign itself.

    A name with dollar signs that exists as it stands is taken as it stands. what: the key or flag,
    for messages. Raises ConfigError for a variable or user that there is not, and for what cannot
    be the name of a file.
    """
    known = {name: value for name, value in os.environ.items() if value}
    try:
        is_there = "$" in text and os.path.lexists(text)
        filled = text if is_there else Template(text).substitute(known)
    except KeyError as error:
        raise ConfigError(
            f"{what}: the environment variable {error.args[0]} in {shown(Word(text))} is not set, "
            "or empty"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{what}: expected $NAME or ${{NAME}} after a dollar sign ($$ for the sign itself), "
            f"got {shown(Word(text))}"
        ) from error
    path = os.path.expanduser(filled)
    if filled.startswith("~") and path == filled:
        user = filled.partition("/")[0]
        raise ConfigError(f"{what}: no home folder of {user} is known (./{user} is a file here)")
    names = os.fsencode(path).split(b"/")
    if "\0" in path or len(os.fsencode(path)) > _MAX_PATH or max(map(len, names)) > _MAX_NAME:
        raise ConfigError(
            f"{what}: expected a path of at most {_MAX_PATH} bytes, {_MAX_NAME} in each name, "
            f"got {shown(Word(path))}"
        )
    return path


def check_name(key: str, name: str) -> None:
    """Raise ConfigError where `name` cannot be the one name of a folder."""
    fits = name.strip() and name.isprintable() and "/" not in name and name not in (".", "..")
    if not fits or len(os.fsencode(name)) > _MAX_NAME:
        raise ConfigError(
            f"{key}: expected the name of a folder, without / and with at most {_MAX_NAME} bytes, "
            f"got {shown(Word(name))}"
        )
