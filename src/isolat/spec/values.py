"""How each kind of value in a service is read, with the JSON Schema that says the same.

A ``Kind`` is the one place where a form of value is described: ``read`` turns what a file holds into what the
model holds or adds a problem and returns None; ``schema`` describes what ``read`` takes; ``write`` is its
inverse.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isolat.spec import units
from isolat.spec.problems import Problems, child, did_you_mean, quote

Schema = dict[str, Any]
Read = Callable[[object, str, Problems], Any]

MAX_WORDS = 4096
MAX_WORDS_BYTES = 1 << 20
MAX_WORD_BYTES = (128 << 10) - 1  # the kernel's MAX_ARG_STRLEN, with its NUL
MAX_PATH_BYTES = 4095
MAX_DEPTH = 16
MAX_OPTION_NODES = 4096


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind:
    read: Read
    schema: Schema
    write: Callable[[Any], object] = same


def clean(value: object, path: str, problems: Problems, max_bytes: int = MAX_WORD_BYTES) -> str | None:
    """Text that a system call can take: no NUL, encodable, not too long."""
    if not isinstance(value, str):
        problems.add(path, f"must be text, not {_kind(value)}")
        return None
    try:
        length = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        problems.add(path, f"{quote(value)} has characters that no encoding can hold")
        return None
    if "\0" in value:
        problems.add(path, f"{quote(value)} contains a NUL byte")
        return None
    if length > max_bytes:
        problems.add(path, f"has {length} bytes; at most {max_bytes} are allowed")
        return None
    return value


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a truth value (quote it)"
    if isinstance(value, int | float):
        return "a number (quote it)"
    return "a list" if isinstance(value, list) else "a map" if isinstance(value, dict) else "another type"


def text(pattern: str, what: str, max_bytes: int = 255, numbers: bool = False) -> Kind:
    """Text of one form; ``numbers`` lets a whole number stand for its digits (``user: 1000``)."""
    compiled = re.compile(pattern)

    def read(value: object, path: str, problems: Problems) -> str | None:
        if numbers and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32:
            value = str(value)
        found = clean(value, path, problems, max_bytes)
        if found is not None and not compiled.fullmatch(found):
            problems.add(path, f"{quote(found)} is not {what}")
            return None
        return found

    schema: Schema = {"type": "string", "pattern": f"^(?:{pattern})$", "maxLength": max_bytes}
    if numbers:
        schema = {"anyOf": [schema, {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}]}
    return Kind(read, schema)


def _read_flag(value: object, path: str, problems: Problems) -> bool | None:
    if isinstance(value, bool):
        return value
    problems.add(path, f"must be true or false, not {quote(value)}")
    return None


FLAG = Kind(_read_flag, {"type": "boolean"})


def choice(values: dict[str, str], refused: str = "") -> Kind:
    """One of several words, each standing for a value of the model."""
    back = {meaning: word for word, meaning in reversed(values.items())}

    def read(value: object, path: str, problems: Problems) -> str | None:
        if isinstance(value, str) and value in values:
            return values[value]
        hint = did_you_mean(value, values) if isinstance(value, str) else ""
        problems.add(path, f"{quote(value)} is not one of {', '.join(values)}{hint or refused}")
        return None

    return Kind(read, {"enum": list(values)}, lambda value: back[value])


def whole(minimum: int, maximum: int, why: str = "") -> Kind:
    def read(value: object, path: str, problems: Problems) -> int | None:
        number = _whole(value)
        if number is None:
            problems.add(path, f"must be a whole number, not {quote(value)}")
        elif not minimum <= number <= maximum:
            problems.add(path, f"{number} is not between {minimum} and {maximum}{why}")
        else:
            return number
        return None

    number: Schema = {"type": "integer", "minimum": minimum, "maximum": maximum}
    return Kind(read, {"anyOf": [number, {"type": "string", "pattern": "^[0-9]{1,18}$"}]})


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else None
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    return None


def number(minimum: float, maximum: float) -> Kind:
    def read(value: object, path: str, problems: Problems) -> float | None:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.add(path, f"must be a number, not {quote(value)}")
        elif not minimum <= value <= maximum:
            problems.add(path, f"must be between {minimum:g} and {maximum:g}")
        else:
            return float(value)
        return None

    schema: Schema = {"type": "number", "minimum": minimum, "maximum": maximum}
    return Kind(read, {"anyOf": [schema, {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?$"}]})


def size(minimum: int, maximum: int = 1 << 50) -> Kind:
    def read(value: object, path: str, problems: Problems) -> int | None:
        try:
            count = units.parse_bytes(value) if isinstance(value, str) else _whole(value)
        except ValueError as error:
            problems.add(path, f"{quote(value)} {error}")
            return None
        if count is None:
            problems.add(path, f"must be a size such as 512m, not {quote(value)}")
        elif not minimum <= count <= maximum:
            least, most = units.format_bytes(minimum), units.format_bytes(maximum)
            problems.add(path, f"{count} bytes are not between {least} and {most}")
        else:
            return count
        return None

    number: Schema = {"type": "integer", "minimum": minimum, "maximum": maximum}
    return Kind(read, {"anyOf": [number, {"type": "string", "pattern": units.SIZE_PATTERN}]}, units.format_bytes)


def duration(minimum_s: float, maximum_s: float) -> Kind:
    """Compose's text, or a plain number of seconds."""

    def read(value: object, path: str, problems: Problems) -> float | None:
        try:
            count_ns = _duration_ns(value)
        except ValueError as error:
            problems.add(path, f"{quote(value)} {error}")
            return None
        if not minimum_s <= count_ns / 10**9 <= maximum_s:
            problems.add(path, f"must be between {minimum_s:g}s and {maximum_s:g}s")
            return None
        return units.seconds(count_ns)

    def write(value: float) -> str:
        return units.format_duration_ns(units.nanoseconds(value))

    number: Schema = {"type": "number", "minimum": minimum_s, "maximum": maximum_s}
    return Kind(read, {"anyOf": [number, {"type": "string", "pattern": units.DURATION_PATTERN}]}, write)


def _duration_ns(value: object) -> int:
    if isinstance(value, str):
        return units.parse_duration_ns(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise ValueError("must be a duration such as 10s, 1m30s or 500ms")
    return units.nanoseconds(value)


def _read_words(value: object, path: str, problems: Problems) -> tuple[str, ...] | None:
    if isinstance(value, str):
        if (line := clean(value, path, problems, MAX_WORDS_BYTES)) is None:
            return None
        try:
            value = shlex.split(line)
        except ValueError as error:
            problems.add(path, f"cannot be split into words: {str(error).lower()}")
            return None
    if not isinstance(value, list | tuple):
        problems.add(path, f"must be a list of words or one line, not {_kind(value)}")
        return None
    if len(value) > MAX_WORDS:
        problems.add(path, f"has {len(value)} words; at most {MAX_WORDS} are allowed")
        return None
    words = [clean(word, f"{path}[{i}]", problems) for i, word in enumerate(value)]
    found = tuple(word for word in words if word is not None)
    if found and not found[0] and len(found) == len(words):
        problems.add(f"{path}[0]", "the command's name is empty")
    return found if _fits(found, path, problems) else None


def _fits(words: tuple[str, ...], path: str, problems: Problems) -> bool:
    total = sum(len(word.encode("utf-8", "surrogateescape")) + 1 for word in words)
    if total > MAX_WORDS_BYTES:
        problems.add(path, f"has {total} bytes in all; at most {MAX_WORDS_BYTES} are allowed")
        return False
    return True


WORDS = Kind(
    _read_words,
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_WORDS}]},
    list,
)


def _read_signal(value: object, path: str, problems: Problems) -> str | None:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else clean(value, path, problems, 32)
    if text is None or signal_number(text):
        return text
    problems.add(path, f"{quote(text)} is no signal; a name as SIGINT, or a number from 1 to 64")
    return None


def signal_number(text: str) -> int:
    """The number of ``SIGINT``, ``int`` or ``2`` (signal(7)); 0 for what is no signal."""
    if text.isdecimal():
        return int(text) if 1 <= int(text) < signal.NSIG else 0
    name = text.upper().removeprefix("SIG")
    if name.startswith("RTMIN+") and name[6:].isdecimal():
        number = int(signal.SIGRTMIN) + int(name[6:])
        return number if number < signal.NSIG else 0
    found = getattr(signal, f"SIG{name}", 0)
    return int(found) if isinstance(found, signal.Signals) else 0


SIGNAL = Kind(_read_signal, {"type": ["string", "integer"]})


def pairs(names_without_equals: bool) -> Kind:
    """A map, or a list of ``NAME=value``; labels may lack the value, variables may not."""

    def read(value: object, path: str, problems: Problems) -> tuple[tuple[str, str], ...] | None:
        entries = _entries(value, path, problems, names_without_equals)
        if entries is None:
            return None
        if len(entries) > MAX_WORDS:
            problems.add(path, f"has {len(entries)} entries; at most {MAX_WORDS} are allowed")
            return None
        found: dict[str, str] = {}
        for name, content, at in entries:
            pair = _pair(name, content, at, problems)
            if pair is not None:
                found[pair[0]] = pair[1]
        return tuple(found.items()) if _fits((*found, *found.values()), path, problems) else None

    scalar: Schema = {"type": ["string", "number", "null"] if names_without_equals else ["string", "number"]}
    pattern = "" if names_without_equals else "="
    listed: Schema = {"type": "array", "items": {"type": "string", "pattern": pattern}, "maxItems": MAX_WORDS}
    mapped: Schema = {"type": "object", "additionalProperties": scalar, "maxProperties": MAX_WORDS}
    return Kind(read, {"anyOf": [mapped, listed]}, dict)


def _entries(value: object, path: str, problems: Problems, bare: bool) -> list[tuple[object, object, str]] | None:
    if isinstance(value, dict):
        missing = "" if bare else None
        return [(name, missing if content is None else content, child(path, name)) for name, content in value.items()]
    if not isinstance(value, list | tuple):
        problems.add(path, f"must be a map or a list of NAME=value, not {_kind(value)}")
        return None
    entries: list[tuple[object, object, str]] = []
    for i, line in enumerate(value):
        at = f"{path}[{i}]"
        if not isinstance(line, str):
            problems.add(at, f"must be NAME=value, not {_kind(line)}")
            continue
        name, equals, content = line.partition("=")
        entries.append((name, content if equals or bare else None, at))
    return entries


def _pair(name: object, content: object, path: str, problems: Problems) -> tuple[str, str] | None:
    if not isinstance(name, str) or not name or "=" in name:
        problems.add(path, f"{quote(name)} is not a name: it must be text, not empty, without '='")
        return None
    if content is None:
        problems.add(path, f"{quote(name)} has no value")
        return None
    if isinstance(content, int | float) and not isinstance(content, bool) and _finite(content):
        content = str(content)
    found_name, found = clean(name, path, problems), clean(content, path, problems)
    if found_name is None or found is None:
        return None
    length = len(f"{name}={found}".encode("utf-8", "surrogateescape"))
    if length > MAX_WORD_BYTES:
        problems.add(path, f"has {length} bytes with its name; at most {MAX_WORD_BYTES} are allowed")
        return None
    return name, found


def _finite(value: float) -> bool:
    return abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)


def absolute(value: object, path: str, problems: Problems, what: str = "a path inside") -> str | None:
    """An absolute path without ``..`` and without needless parts, so that equal places are equal text."""
    found = clean(value, path, problems, MAX_PATH_BYTES)
    if found is None:
        return None
    if not found.startswith("/"):
        problems.add(path, f"{quote(found)} is not {what}: it must begin with /")
        return None
    parts = [part for part in found.split("/") if part not in {"", "."}]
    if ".." in parts:
        problems.add(path, f"{quote(found)} must not contain ..")
        return None
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        problems.add(path, "has a component of more than 255 bytes")
        return None
    return "/" + "/".join(parts)


PATH = Kind(absolute, {"type": "string", "pattern": "^/", "maxLength": MAX_PATH_BYTES})


def read_open_map(value: object, path: str, problems: Problems) -> dict[str, Any] | None:
    """A map whose content only its layer understands: bounded, JSON, nothing more is asked here."""
    if not isinstance(value, dict):
        problems.add(path, f"must be a map, not {_kind(value)}")
        return None
    before = len(problems.lines)
    budget = [MAX_OPTION_NODES]
    copy = _copy(value, path, problems, MAX_DEPTH, budget)
    if budget[0] < 0:
        problems.add(path, f"has more than {MAX_OPTION_NODES} values")
    return copy if len(problems.lines) == before and isinstance(copy, dict) else None


def _copy(value: object, path: str, problems: Problems, depth: int, budget: list[int]) -> object:
    budget[0] -= 1
    if budget[0] < 0:
        return None
    if depth == 0:
        problems.add(path, f"nests deeper than {MAX_DEPTH}")
        return None
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                problems.add(child(path, key), "a key must be text")
        return {k: _copy(v, child(path, k), problems, depth - 1, budget) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(v, f"{path}[{i}]", problems, depth - 1, budget) for i, v in enumerate(value)]
    if isinstance(value, str):
        return clean(value, path, problems)
    if value is None or isinstance(value, bool) or (isinstance(value, int | float) and _finite(value)):
        return value
    problems.add(path, f"must be plain data, not {_kind(value)}")
    return None


def known_keys(value: object, path: str, problems: Problems, known: tuple[str, ...]) -> dict[str, Any] | None:
    """The ``known`` keys of a map; any other is a problem."""
    if not isinstance(value, dict):
        problems.add(path, f"must be a map, not {_kind(value)}")
        return None
    for key in value:
        if key not in known:
            hint = did_you_mean(key, known) if isinstance(key, str) else ""
            problems.add(child(path, key), f"is not known here{hint or '; allowed: ' + ', '.join(known)}")
    return {key: value[key] for key in known if key in value}
