"""A QEMU of our own for a moment: to ask it what it can do, and to see whether a guest comes up under KVM.

Machines are started by their keepers, not by this: what is started here does not outlive the question.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from isolat.errors import StartFailed

_WORDS_BYTES, _WORDS_LINES = 4096, 2
_STAGE = "qemu"


@dataclass
class Short:
    """One that runs."""

    process: subprocess.Popen[bytes]
    _words: IO[bytes]

    def words(self) -> str:
        """The last lines of what it and its guest's init have said, as one; of the kernel's own only why it gave up."""
        end = os.fstat(self._words.fileno()).st_size
        text = os.pread(self._words.fileno(), _WORDS_BYTES, max(0, end - _WORDS_BYTES))
        lines = (line.strip() for line in text.decode(errors="replace").splitlines())
        return "; ".join([line for line in lines if _says_why(line)][-_WORDS_LINES:])


def _says_why(line: str) -> bool:
    return bool(line) and "warning:" not in line and (not line.startswith("[") or "panic" in line)


@contextlib.contextmanager
def run(argv: Sequence[str], descriptors: Sequence[int]) -> Iterator[Short]:
    """Start it with these descriptors, at their own numbers, and kill it at the end of the block.

    It dies with us, too: setpriv(1) sets the death signal, which execve(2) keeps. Raises StartFailed.
    """
    setpriv = shutil.which("setpriv")
    prefix = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
    with tempfile.TemporaryFile() as words:
        try:
            process = subprocess.Popen(
                [*prefix, *argv],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                pass_fds=tuple(descriptors),
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            )
        except OSError as error:
            why = f"could not start {argv[0]}: {error.strerror}"
            raise StartFailed(why, stage=_STAGE, errno=error.errno or 0) from error
        try:
            yield Short(process, words)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket for us and its other end for QEMU, both closed at the end (ours also by who takes it over)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs
