"""What buildah says while it builds, understood: which step it is at, and why it failed. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

TAIL_LINES = 20

_STEP = re.compile(r"(?:\[\d+/\d+\] )?STEP (\d+)/(\d+): (.*)")
_ERROR = re.compile(r'(?:Error: )(?:building at STEP "(.*?)(?<!\\)": )?(.*)')
_EXIT = re.compile(r"exit status (\d+)$")
_REPEATED = re.compile(r'Error: building at STEP "|time="[^"]*" level=error msg="(?:exit status \d+"$|\+\(UNHANDLED)')
_KILLED = re.compile(r"container exited on (\w[\w ]*)$")
_WARNING = re.compile(
    r'time="[^"]*" level=warning msg="(.* is not supported for OCI image format.*?)(?: Must use .*)?"$'
)
_STEP_LETTERS = 120
_DISK = ("no space left on device", "disk quota exceeded")
_NETWORK_HINT = "if it needs the network: a build has none, unless you build with --network host"


class Watch:
    """Takes every line, passes on what is for people, remembers what an error needs."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.step = ""
        self.steps = 0
        self.error = ""
        self.killed = ""
        self._warned: set[str] = set()

    def line(self, text: str) -> None:
        warning = _WARNING.fullmatch(text)
        if warning:  # buildah repeats it with every further step
            if warning[1] not in self._warned:
                self._warned.add(warning[1])
                self._tell(f"note: {warning[1]}")
            return
        self._understand(text)

    def _understand(self, text: str) -> None:
        found = _STEP.fullmatch(text)
        if found:
            self.steps += 1
            self.step = f"step {found[1]} ({shorten(found[3])})"
            self.killed = ""
            self.tail.clear()
        failed = _ERROR.match(text)
        if failed:
            self.error = failed[2].partition(" &imagebuilder.")[0]  # a Go structure follows
        if _REPEATED.match(text):
            return  # told at the end, in our words
        killed = _KILLED.fullmatch(text)
        self.killed = killed[1] if killed else self.killed
        if not (found or failed or text.startswith(("COMMIT", "--> "))):
            self.tail.append(text)
        self._tell(text)

    @property
    def exit_code(self) -> int | None:
        """What the failing RUN step ended with, where it was one that ran."""
        found = _EXIT.search(self.error)
        return int(found[1]) if found else None

    @property
    def full(self) -> bool:
        """Whether a disk limit was met."""
        text = "\n".join((*self.tail, self.error)).lower()
        return any(word in text for word in _DISK)

    @property
    def ran(self) -> bool:
        """Whether the step that failed is a RUN."""
        return "(RUN " in self.step

    def why(self) -> str:
        """The sentence that says what failed."""
        if not self.step:
            return f"could not build: {self.error or 'buildah did not say why'}"
        if self.killed and self.ran:
            return f"could not build: {self.step} was ended by a signal: {self.killed}"
        if self.exit_code is not None and self.ran:
            return f"could not build: {self.step} ended with code {self.exit_code}"
        return f"could not build: {self.step}: {self.error or 'buildah did not say why'}"


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _STEP_LETTERS else f"{text[: _STEP_LETTERS - 1]}…"


def network_hint(watch: Watch, *, host_network: bool) -> str:
    """What to do where the missing network may be the reason: in a RUN, or an ADD from elsewhere."""
    return "" if host_network or not (watch.ran or "(ADD http" in watch.step) else _NETWORK_HINT
