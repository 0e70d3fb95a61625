"""What `commit` and `import` change of an image's defaults: the instructions of a Containerfile that need no build.

``CMD``, ``ENTRYPOINT``, ``ENV``, ``EXPOSE``, ``LABEL``, ``STOPSIGNAL``, ``USER``, ``VOLUME``, ``WORKDIR``, each in the
form that Docker's ``--change`` takes. The result is the ``config`` map of an OCI configuration (image-spec config.md).
"""

from __future__ import annotations

import json
import posixpath
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from isolat.errors import UsageError

_PORT_DIGITS = 5
Inner = dict[str, Any]


def apply(inner: Inner, changes: Sequence[str]) -> Inner:
    """A new map with the instructions carried out in order. Raises UsageError, which names the instruction."""
    changed = dict(inner)
    for text in changes:
        word, _, rest = text.strip().partition(" ")
        carry_out = _INSTRUCTIONS.get(word.upper())
        if carry_out is None:
            raise UsageError(
                f"--change: {word or text!r} can't be changed here", hint=f"what can be: {', '.join(_INSTRUCTIONS)}"
            )
        try:
            carry_out(changed, rest.strip())
            json.dumps(changed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(f"--change {text!r}: an image's defaults are UTF-8, and this is none") from None
        except ValueError as error:
            raise UsageError(f"--change {text!r}: {error}") from None
    return changed


def _command(name: str) -> Callable[[Inner, str], None]:
    def carry_out(inner: Inner, rest: str) -> None:
        inner[name] = _words(rest)

    return carry_out


def _words(rest: str) -> list[str]:
    """The JSON form, or a line for the shell."""
    if rest.startswith("["):
        found = json.loads(rest)
        if not all(isinstance(word, str) for word in found):
            raise ValueError("every word must be a text")
        return list(found)
    if not rest:
        raise ValueError("nothing follows")
    return ["/bin/sh", "-c", rest]


def _pairs(rest: str) -> list[tuple[str, str]]:
    words = shlex.split(rest)
    if not words:
        raise ValueError("NAME=value is missing")
    if "=" not in words[0]:  # the old form, in which the rest of the line is the value
        name, _, value = rest.partition(" ")
        return [(name, value.strip())]
    pairs = [word.partition("=") for word in words]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError("every word must be NAME=value")
    return [(name, value) for name, _, value in pairs]


def _env(inner: Inner, rest: str) -> None:
    variables = dict(text.partition("=")[::2] for text in inner.get("Env") or ())
    variables.update(_pairs(rest))
    inner["Env"] = [f"{name}={value}" for name, value in variables.items()]


def _label(inner: Inner, rest: str) -> None:
    inner["Labels"] = {**(inner.get("Labels") or {}), **dict(_pairs(rest))}


def _set(name: str, read: Callable[[str], list[str]]) -> Callable[[Inner, str], None]:
    """Those that OCI keeps as a map from each value to an empty map."""

    def carry_out(inner: Inner, rest: str) -> None:
        inner[name] = {**(inner.get(name) or {}), **{word: {} for word in read(rest)}}

    return carry_out


def _ports(rest: str) -> list[str]:
    found = []
    for word in rest.split():
        numbers, slash, protocol = word.partition("/")
        first, dash, last = numbers.partition("-")
        low, high = _port(first), _port(last) if dash else _port(first)
        protocol = protocol.lower()
        if not 0 < low <= high or (slash and protocol not in ("tcp", "udp", "sctp")):
            raise ValueError(f"{word!r} is no PORT[-PORT][/PROTOCOL]")
        found += [f"{number}/{protocol or 'tcp'}" for number in range(low, high + 1)]
    return found


def _port(text: str) -> int:
    """0 for what is none."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= _PORT_DIGITS else 0
    return number if number < 1 << 16 else 0


def _volumes(rest: str) -> list[str]:
    return _words(rest) if rest.startswith("[") else shlex.split(rest)


def _plain(name: str) -> Callable[[Inner, str], None]:
    def carry_out(inner: Inner, rest: str) -> None:
        if not rest:
            raise ValueError("nothing follows")
        inner[name] = rest

    return carry_out


def _workdir(inner: Inner, rest: str) -> None:
    if not rest:
        raise ValueError("nothing follows")
    inner["WorkingDir"] = posixpath.normpath(posixpath.join(inner.get("WorkingDir") or "/", rest))


_INSTRUCTIONS: dict[str, Callable[[Inner, str], None]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "EXPOSE": _set("ExposedPorts", _ports),
    "LABEL": _label,
    "STOPSIGNAL": _plain("StopSignal"),
    "USER": _plain("User"),
    "VOLUME": _set("Volumes", _volumes),
    "WORKDIR": _workdir,
}
