"""Which verb is legal in which state: one exhaustive table."""

from __future__ import annotations

from enum import StrEnum

from isolat.errors import IllegalState
from isolat.layers.base import State


class Verb(StrEnum):
    EXEC = "exec"
    ATTACH = "attach"
    LOGS = "logs"
    STOP = "stop"
    KILL = "kill"
    WAIT = "wait"
    REMOVE = "rm"
    REMOVE_FORCED = "rm --force"
    INSPECT = "inspect"
    SCREENSHOT = "screenshot"
    FORK = "fork"
    SNAPSHOT = "snapshot"
    RUN_IN = "run --in"
    DIFF = "diff"
    COMMIT = "commit"
    COPY = "cp"
    EXPORT = "export"


_ALWAYS = frozenset(State)
_RUNNING = frozenset({State.RUNNING})
_ENDED = frozenset({State.EXITED, State.LOST})

LEGAL: dict[Verb, frozenset[State]] = {
    Verb.EXEC: _RUNNING,
    Verb.ATTACH: _RUNNING,
    Verb.LOGS: _ALWAYS,
    Verb.STOP: _RUNNING | _ENDED,  # stopping what has ended is no error, as in Docker
    Verb.KILL: _RUNNING,
    Verb.WAIT: _ALWAYS,
    Verb.REMOVE: _ENDED | {State.REMOVING},
    Verb.REMOVE_FORCED: _ALWAYS,
    Verb.INSPECT: _ALWAYS,
    Verb.SCREENSHOT: _RUNNING,
    Verb.FORK: _RUNNING,
    Verb.SNAPSHOT: _RUNNING,
    Verb.RUN_IN: _RUNNING,
    Verb.DIFF: _RUNNING | _ENDED,
    Verb.COMMIT: _RUNNING | _ENDED,
    Verb.COPY: _RUNNING | _ENDED,
    Verb.EXPORT: _RUNNING | _ENDED,
}

_HINTS: dict[Verb, str] = {
    Verb.RUN_IN: "it has to run for that: `isolat ps` lists those that do",
    Verb.EXEC: "start a new one with `isolat run`",
    Verb.ATTACH: "see what it wrote with `isolat logs`",
    Verb.REMOVE: "stop it first with `isolat stop`, or use `isolat rm --force`",
}


def check(verb: Verb, state: State, name: str) -> None:
    """Raise IllegalState when this verb makes no sense in this state."""
    if state not in LEGAL[verb]:
        raise IllegalState(f"cannot {verb} {name}: it is {state}", hint=_HINTS.get(verb, ""))
