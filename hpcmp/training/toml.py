"""Reading TOML (tomllib, with errors for people) and writing it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from ..errors import InputError


def literal(value: Any) -> str:
    """``value`` in TOML (shortened when it is long and no value of a section)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    text = "nothing" if value is None else "a table" if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError naming the file, and the line where it is broken."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        what, line = found.groups() if found else (str(error), None)
        place = f", line {line}" if line else ", at its end" if found else ""
        raise InputError(f"{path}{place}: {what}") from None


def to_toml(sections: Mapping[str, Any]) -> str:
    """Sections as TOML text that reads back as the same values. An unset key is left out where that is its default."""
    tables = []
    for name, section in sections.items():
        lines = [f"[{name}]"]
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value is not None or field.default is not None:
                lines.append(f"{field.name} = {literal('none' if value is None else value)}")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)
