"""Which images a Containerfile stands on: read before buildah reads it, because buildah never talks to a registry.

Only FROM, ARG, ``COPY --from=`` and ``RUN --mount=…,from=`` are understood, as the builder does it (openshift's
imagebuilder 1.2.3 in buildah 1.28: dockerfile/parser, shell_parser.go): continued lines, comments, the directive
``escape``, variables in FROM from the ARGs before the first stage. What is malformed in any other way is buildah's to
say. Stages that the target does not need are left out, as buildah leaves them out.

Where this reading and buildah's differ, the build fails for a base that is not there; nothing else can come of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from isolat.errors import UsageError
from isolat.images.oci import Platform, own_platform

BYTES_MAX = 1 << 20
STAGES_MAX = 1000
SCRATCH = "scratch"

_DIRECTIVE = re.compile(r"#[ \t]*escape[ \t]*=[ \t]*(.).*", re.IGNORECASE)
_HEREDOC = re.compile(r"<<-?[\"']?[A-Za-z_]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODIFIER = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::([-+])(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Base:
    """An image that is needed. ``written``: as it stands in the file, variables and all; ``name``: what that means."""

    written: str
    name: str


@dataclass
class _Stage:
    """``parent``: what its FROM names. ``uses``: what it copies or mounts from."""

    name: str
    parent: Base
    uses: list[Base] = field(default_factory=list)


@dataclass(frozen=True)
class _Line:
    word: str
    flags: tuple[str, ...]
    rest: tuple[str, ...]
    text: str


def bases(text: str, arguments: Mapping[str, str], target: str = "", platform: Platform | None = None) -> list[Base]:
    """The images that a build of ``target`` (default: the last stage) needs, in the order in which they are named.

    ``arguments``: what ``--build-arg`` gives. Raises UsageError for what can't be built at all.
    """
    stages = _stages(text, arguments, platform or own_platform())
    if not stages:
        raise UsageError("the Containerfile has no FROM", hint="its first instruction names what it starts from")
    found: dict[Base, None] = {}
    for index in sorted(_needed(stages, _index(stages, target))):
        stage = stages[index]
        for base in (stage.parent, *stage.uses):
            if base.name != SCRATCH and _stage_before(stages, base.name, index) is None:
                found[base] = None
    return list(found)


def has_heredoc(text: str) -> bool:
    """Whether a RUN or COPY uses a here-document, which buildah knows from 1.33 on only."""
    return any(line.word in ("RUN", "COPY", "ADD") and _HEREDOC.search(line.text) for line in _lines(text))


# Stages


def _stages(text: str, arguments: Mapping[str, str], platform: Platform) -> list[_Stage]:
    stages: list[_Stage] = []
    heading = _platform_arguments(platform)
    variables: dict[str, str] = {}
    for line in _lines(text):
        if line.word == "ARG":
            known = variables if stages else heading
            for word in line.rest:
                _declare(word, known, heading, arguments)
        elif line.word == "FROM":
            stages.append(_stage(line, len(stages), heading))
            variables = {}
        elif stages and line.word in ("COPY", "ADD"):
            stages[-1].uses += [_base(flag[7:], variables) for flag in line.flags if flag.startswith("--from=")]
        elif stages and line.word == "RUN":
            stages[-1].uses += [_base(name, variables) for name in _mounted(line)]
    if len(stages) > STAGES_MAX:
        raise UsageError(f"the Containerfile has {len(stages)} stages, and at most {STAGES_MAX} are built")
    return stages


def _platform_arguments(platform: Platform) -> dict[str, str]:
    native = own_platform()
    found: dict[str, str] = {}
    for prefix, one in (("TARGET", platform), ("BUILD", native)):
        found |= {
            f"{prefix}PLATFORM": str(one),
            f"{prefix}OS": one.os,
            f"{prefix}ARCH": one.architecture,
            f"{prefix}VARIANT": one.variant,
        }
    return found


def _declare(word: str, known: dict[str, str], heading: Mapping[str, str], arguments: Mapping[str, str]) -> None:
    """One ARG: what the caller gives for it, else its default, else what the heading says."""
    name, equals, default = word.partition("=")
    if name in arguments:
        known[name] = arguments[name]
    elif equals:
        known[name] = substitute(default, known)
    elif name in heading:
        known[name] = heading[name]


def _stage(line: _Line, index: int, heading: Mapping[str, str]) -> _Stage:
    words = line.rest
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].lower() != "as"):
        raise UsageError(f"the Containerfile's {line.text[:100]!r} is no FROM", hint="FROM IMAGE [AS STAGE]")
    base = _base(words[0], heading)
    if not base.name:
        raise UsageError(
            f"the Containerfile's {line.text[:100]!r} names no image: a variable in it is empty",
            hint="give it with --build-arg, or write ARG NAME=DEFAULT before the first FROM",
        )
    return _Stage(words[2] if len(words) == 3 else str(index), base)


def _base(written: str, variables: Mapping[str, str]) -> Base:
    return Base(written, substitute(written, variables))


def _mounted(line: _Line) -> list[str]:
    found = []
    for flag in line.flags:
        if flag.startswith("--mount="):
            found += [part[5:] for part in flag[8:].split(",") if part.startswith("from=")]
    return found


def _index(stages: list[_Stage], target: str) -> int:
    if not target:
        return len(stages) - 1
    for index, stage in enumerate(stages):
        if stage.name.lower() == target.lower() or str(index) == target:
            return index
    names = ", ".join(stage.name for stage in stages)
    raise UsageError(f"the Containerfile has no stage {target!r}", hint=f"its stages: {names}")


def _stage_before(stages: list[_Stage], name: str, index: int) -> int | None:
    """The stage before this one that the name means; the youngest of several."""
    if name.isdecimal() and int(name) < index:
        return int(name)
    for earlier in range(index - 1, -1, -1):
        if stages[earlier].name.lower() == name.lower():
            return earlier
    return None


def _needed(stages: list[_Stage], index: int) -> set[int]:
    found: set[int] = set()
    waiting = [index]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        for base in (stages[current].parent, *stages[current].uses):
            earlier = _stage_before(stages, base.name, current)
            if earlier is not None:
                waiting.append(earlier)
    return found


# Lines


def _lines(text: str) -> list[_Line]:
    """The instructions: continued lines joined, comments and empty lines left out."""
    # As buildah (Go's bufio.ScanLines): a form feed, say, begins no line
    raw = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    escape = _escape(raw)
    continued = re.compile(re.escape(escape) + r"[ \t]*$")
    found: list[_Line] = []
    whole, open_line = "", False
    for line in raw:
        if not line.strip() or line.lstrip().startswith("#"):
            continue  # within a continued line, too
        joined = continued.sub("", line)
        whole = whole + joined if open_line else joined.lstrip()
        open_line = joined != line
        if not open_line:
            found += _instruction(whole)
            whole = ""
    return found + (_instruction(whole) if open_line else [])


def _escape(lines: list[str]) -> str:
    """The directive counts on the first line only, where no other comes before it."""
    match = _DIRECTIVE.fullmatch(lines[0].strip()) if lines else None
    return match.group(1) if match and match.group(1) in "\\`" else "\\"


def _instruction(text: str) -> list[_Line]:
    words = text.split()
    if not words:
        return []
    rest = words[1:]
    flags = []
    while rest and rest[0].startswith("--"):
        flags.append(rest.pop(0))
    return [_Line(words[0].upper(), tuple(flags), tuple(rest), text)]


# Variables


def substitute(word: str, variables: Mapping[str, str]) -> str:
    """Quotes removed, ``$NAME``, ``${NAME}``, ``${NAME:-WORD}`` and ``${NAME:+WORD}`` replaced; unknown ones are empty.

    Raises UsageError for a brace that is never closed, and for any other modifier.
    """
    found, at, quote = "", 0, ""
    while at < len(word):
        letter = word[at]
        if letter == "\\" and quote != "'" and at + 1 < len(word):
            found += word[at + 1]
            at += 2
        elif letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
            at += 1
        elif letter == "$" and quote != "'":
            value, at = _variable(word, at + 1, variables)
            found += value
        else:
            found += letter
            at += 1
    return found


def _variable(word: str, at: int, variables: Mapping[str, str]) -> tuple[str, int]:
    """The value of the variable that begins after a ``$``, and where the word goes on."""
    if word[at : at + 1] != "{":
        match = _VARIABLE.match(word, at)
        return (variables.get(match.group(), ""), match.end()) if match else ("$", at)
    end = _closing(word, at)
    match = _MODIFIER.fullmatch(word[at + 1 : end])
    if match is None:
        raise UsageError(f"the Containerfile's {word[:100]!r} has a variable that is not understood")
    name, kind, other = match.groups()
    value = variables.get(name, "")
    if kind == "-" and not value:
        value = substitute(other, variables)
    elif kind == "+":
        value = substitute(other, variables) if value else ""
    return value, end + 1


def _closing(word: str, at: int) -> int:
    """Where the brace at ``at`` is closed; braces may be in braces."""
    depth = 0
    for index in range(at, len(word)):
        depth += {"{": 1, "}": -1}.get(word[index], 0)
        if depth == 0:
            return index
    raise UsageError(f"the Containerfile's {word[:100]!r} has a brace that is never closed")
