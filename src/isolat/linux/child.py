"""Child programs of a long operation: bounded in time and in what is kept of their output, and never left behind.

A child is the leader of its own process group, and the whole group is killed when its time is over or when the caller
is interrupted. When the caller itself is killed the child must see to it (``confine.py``, ``setpriv --pdeathsig``).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, StoreError

_TAIL_LINES = 20
_LINE_BYTES = 4096
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child gets of ours: nothing but the way to the network's proxies."""
    kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return {**kept, "PATH": SAFE_PATH, "HOME": "/", "LC_ALL": "C.UTF-8", **(extra or {})}


def run(
    argv: Sequence[str],
    what: str,
    d: Deadline,
    *,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run to the end, giving each line of its output to ``on_line``.

    Raises StoreError with the output's tail when it fails or does not exist, DeadlineExceeded when it takes too long.
    """
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(environment),
            process_group=0,
            pass_fds=tuple(pass_fds),
        )
    except OSError as error:
        raise StoreError(
            f"{what}: could not start {argv[0]}: {error.strerror}", stage=what, errno=error.errno or 0
        ) from (error)
    try:
        tail = _follow(child, what, d, on_line)
        code = child.wait()
    finally:
        _end(child)
    if code:
        why = f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
        raise StoreError(f"{what} failed: {why}", stage=what, details=tail)


def _follow(
    child: subprocess.Popen[bytes], what: str, d: Deadline, on_line: Callable[[str], None] | None
) -> tuple[str, ...]:
    """Read until the end of the output; the last lines are what it says."""
    assert child.stdout is not None
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(d.left_s()):
                raise DeadlineExceeded(f"{what} did not end in time", stage=what, details=tuple(tail))
            chunk = os.read(child.stdout.fileno(), 65536)
            *lines, rest = (rest + chunk).split(b"\n")
            if not chunk or len(rest) > _LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in filter(None, lines):
                text = line[:_LINE_BYTES].decode(errors="replace").rstrip()
                tail.append(text)
                if on_line is not None:
                    on_line(text)
            if not chunk:
                return tuple(tail)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of its group, reap it, close the pipe."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()
