"""A frozen dataclass as the schema of a section of a configuration file.

The type hint of a field says what a key may hold, its metadata the range, the meaning and the rule behind a default
that follows from other keys. Checks, the messages of errors, TOML and the reference page all come from these, so that
a key is described once. Types: int, float, str, bool, Literal of texts, tuple of numbers, and any of them ``| None``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal

from ..errors import InputError
from .toml import literal

COUNT, SIZE, POSITIVE, SHARE = "[0, inf)", "[1, inf)", "(0, inf)", "[0, 1)"  # intervals that options share

_TYPES = {int: ("integer", "an integer"), float: ("number", "a number"), str: ("text", "text")}
_TYPES[bool] = ("true or false", "true or false")


def option(default: Any, doc: str, span: str = "") -> Any:
    """A field with a default; ``span`` is the interval of a number, such as ``"[0, 1)"`` or ``"(0, inf)"``."""
    return dataclasses.field(default=default, metadata={"doc": doc, "span": span, "rule": ""})


def derived(rule: str, doc: str, span: str = "") -> Any:
    """A field that follows from others by ``rule`` (words) unless given: None until ``Config.resolved`` fills it."""
    return dataclasses.field(default=None, metadata={"doc": doc, "span": span, "rule": rule})


@dataclass(frozen=True)
class Section:
    """Base of every section: values are checked, and brought to their type, on construction. Raises InputError."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(type(self), field.name, getattr(self, field.name)))


def fill(section: Any, **values: Any) -> Any:
    """``section`` with ``values`` in the fields that are None."""
    return dataclasses.replace(section, **{k: v for k, v in values.items() if getattr(section, k) is None})


@dataclass(frozen=True)
class _Kind:
    """The type of a field: its base, the choices of a Literal, the length of a tuple (0: none), whether None is a value
    or stands for what follows from other fields."""

    base: type
    choices: tuple[str, ...]
    length: int
    optional: bool
    derived: bool
    span: str

    def describe(self, article: bool = True) -> str:
        if self.choices:
            text = ("one of " if article else "") + ", ".join(f'"{c}"' for c in self.choices)
        else:
            text = _TYPES[self.base][article]
        return f"a list of {self.length} {text.split()[-1]}s" if self.length else text


@functools.cache
def _kinds(section: type) -> dict[str, _Kind]:
    kinds = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint, optional = hints[field.name], False
        if typing.get_origin(hint) in (UnionType, typing.Union):
            (hint,) = (t for t in typing.get_args(hint) if t is not NoneType)
            optional = True
        arguments = typing.get_args(hint)
        is_choice, is_tuple = typing.get_origin(hint) is Literal, typing.get_origin(hint) is tuple
        base = str if is_choice else arguments[0] if is_tuple else hint
        choices, length = arguments if is_choice else (), len(arguments) if is_tuple else 0
        derived = bool(field.metadata["rule"])
        kinds[field.name] = _Kind(base, choices, length, optional, derived, field.metadata["span"])
    return kinds


def checked(section: type, key: str, value: Any) -> Any:
    """``value`` as the type of ``section.key``: an integer does for a number, "none" for None. Else an InputError."""
    kind = _kinds(section)[key]
    if (kind.optional or kind.derived) and (value is None or value == "none"):
        return None
    try:
        if kind.length:
            if not isinstance(value, list | tuple) or len(value) != kind.length:
                raise ValueError
            return tuple(_scalar(kind, v) for v in value)
        return _scalar(kind, value)
    except (ValueError, OverflowError):
        wanted = kind.describe() + _within(kind.span) + (' or "none"' if kind.optional else "")
        raise InputError(f"{section.__name__.lower()}.{key}: expected {wanted}, found {literal(value)}") from None


def _scalar(kind: _Kind, value: Any) -> Any:
    result: Any
    if kind.base is str and isinstance(value, str | os.PathLike):
        result = str(value)
        good = not kind.choices or result in kind.choices
    elif kind.base is bool or isinstance(value, bool):
        result, good = value, kind.base is bool and isinstance(value, bool)
    elif kind.base is int and isinstance(value, numbers.Integral):
        result = int(value)
        good = _inside(kind.span, result)
    elif kind.base is float and isinstance(value, numbers.Real):
        result = float(value)
        good = _inside(kind.span, result)
    else:
        good = False
    if not good:
        raise ValueError
    return result


def _bounds(span: str) -> tuple[float, float]:
    low, high = span[1:-1].split(",")
    return float(low), float(high)


def _inside(span: str, x: float) -> bool:
    if not span:
        return True
    low, high = _bounds(span)
    return (low <= x if span[0] == "[" else low < x) and (x <= high if span[-1] == "]" else x < high)


def _within(span: str) -> str:
    """The interval in words, to follow the name of a type."""
    if not span:
        return ""
    low, high = _bounds(span)
    if high < math.inf:
        return f" in {span}"
    return f" {'of at least' if span[0] == '[' else 'above'} {low:g}"


def read_override(sections: Mapping[str, type], text: str) -> dict[str, Any]:
    """The tables that an override ``section.key=value`` stands for: the value is TOML, or a bare word for text."""
    name, equals, word = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise InputError(f"{text!r}: expected section.key=value, such as train.steps=100")
    try:
        document = tomllib.loads(f"value = {word}")
        value = document["value"] if len(document) == 1 else word
    except tomllib.TOMLDecodeError:
        value = word
    kind = _kinds(sections[section]).get(key) if section in sections else None
    if kind and kind.base is str and not isinstance(value, str):
        value = word  # a name made of digits
    return {section: {key: value}}


def check_tables(sections: Mapping[str, type], tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} with every name known and every value of its type and in its range. Raises InputError."""
    result: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if name not in sections or not isinstance(table, Mapping):
            raise InputError(_unknown_section(sections, name, table))
        for key, value in table.items():
            if key not in _kinds(sections[name]):
                raise InputError(_unknown_key(sections, name, key))
            result.setdefault(name, {})[key] = checked(sections[name], key, value)
    return result


def _unknown_section(sections: Mapping[str, type], name: str, table: Any) -> str:
    if name in sections:
        return f"{name}: expected the section [{name}], found {literal(table)}"
    if isinstance(table, Mapping):
        return f"unknown section [{name}]" + nearest(name, sections, "[{}]")
    homes = [f"{s}.{name}" for s, cls in sections.items() if name in _kinds(cls)]
    return f"{name} stands outside a section" + (f"; did you mean {homes[0]}?" if homes else "")


def _unknown_key(sections: Mapping[str, type], section: str, key: str) -> str:
    own = _kinds(sections[section])
    homes = [f"{s}.{key}" for s, cls in sections.items() if key in _kinds(cls)]
    if homes and not difflib.get_close_matches(key, own, 1):
        return f"unknown key {section}.{key}; did you mean {homes[0]}?"
    return f"unknown key {section}.{key}" + nearest(key, own, f"{section}.{{}}")


def nearest(word: str, known: Mapping[str, Any] | Sequence[str], form: str = "{}") -> str:
    """The end of a message about an unknown ``word``: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, 1, 0.6 if len(word) > 2 else 0.5)
    return f"; did you mean {form.format(close[0])}?" if close else f"; there are {', '.join(known)}"


def reference(sections: Mapping[str, type]) -> str:
    """The table of every section in Markdown: key, type and range, default, meaning."""
    tables = []
    for name, section in sections.items():
        lines = [
            f"## [{name}]",
            "",
            section.__doc__ or "",
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(section):
            kind = _kinds(section)[field.name]
            what = kind.describe(article=False) + _within(kind.span)
            what += " or none" if kind.optional else ""
            unset = field.metadata["rule"] or "none"
            default = unset if field.default is None else f"`{literal(field.default)}`"
            lines.append(f"| `{field.name}` | {what} | {default} | {field.metadata['doc']} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)
