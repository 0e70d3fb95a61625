"""``cp`` and ``export`` on the caller's side: its files are read and written here, with its rights.

What goes in is packed by the program that packs inside, started as the caller; what comes out is hostile, and made
into files by ``landing``. Between them and the inside is an archive in the streams of a process.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from isolat.client import connect
from isolat.client.landing import Landing, Wanted
from isolat.client.streams import Ending, Pump
from isolat.engine.paths import native_dir
from isolat.errors import CopyFailed, DaemonUnavailable, IsolatError, Lost, NotFound, Unsupported, UsageError
from isolat.guest.files import AGENT
from isolat.images.flatten.bad import Bad
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import Bounds, Reader

TOP = "0"  # what the one thing that is copied is called in the archive
_READ_BYTES = 256 << 10
_PACKER_END_S = 5.0
_SAY_S = 2.0
_ENTRIES_MAX, _FILE_BYTES_MAX, _ATTRIBUTE_BYTES_MAX = 1 << 40, 1 << 62, 1 << 20
_WORDS_MAX, _TOLD = 64 << 10, 20
_LEFT_OUT, _AGENT_SAYS = "left out: ", "isolat-agent: "
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"BZh", "bz2"), (b"\xfd7zXZ\0", "lzma"))
_ABSENT, _REFUSED, _UNKNOWN = 3, 4, 64  # what the programs end with: native/copy.h; an older one has no such words

Progress = Callable[[int], None]  # how many bytes have gone


@dataclass(frozen=True)
class Copied:
    """``left``: what was left out, and why."""

    bytes: int
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """``owners``: those of the source, else root's inside and the caller's here. ``follow``: what a link leads to."""

    owners: bool = False
    follow: bool = False


def copy_in(
    root: str, env: str, source: str, path: str, options: Options, progress: Progress = lambda _: None
) -> Copied:
    """Put what is at ``source`` to ``path`` inside. Raises NotFound, UsageError, CopyFailed, Lost."""
    name, at, contents = _named(source)
    words = ["--copy-out", *(["--follow"] if options.follow else []), at, TOP]
    args = {"env": env, "path": path, "name": name, "contents": contents, "owners": options.owners}
    with _packed(words) as (reading, packer), _Transfer(root, "copy_in", args, progress) as transfer:
        ending = transfer.run(source=reading)
        failed = packer.finish()  # first: an archive that ends too early is no news then
        if failed is not None:
            raise failed
        return transfer.end(ending, packer.left)


def put_archive(root: str, env: str, source: int, path: str, progress: Progress = lambda _: None) -> Copied:
    """Put what the archive at the descriptor ``source`` holds below the directory ``path`` inside, with its owners."""
    args = {"env": env, "path": path, "archive": True, "owners": True}
    with _opened(source) as opening, _Transfer(root, "copy_in", args, progress) as transfer:
        ending = transfer.run(source=opening.reading)
        opening.finish()  # first: what is cut short is complained of inside, too
        return transfer.end(ending, [])


def copy_out(
    root: str, env: str, path: str, target: str, options: Options, progress: Progress = lambda _: None
) -> Copied:
    """Put what is at ``path`` inside to ``target``. Raises what ``copy_in`` raises."""
    if options.owners and os.geteuid() != 0:
        raise UsageError("only root can give files to others", hint="leave out -a: they are then yours")
    clean = posixpath.normpath(f"/{path.lstrip('/')}")
    contents = clean == "/" or posixpath.basename(path) == "."
    wanted = Wanted(target, posixpath.basename(clean), contents, options.owners)
    args = {"env": env, "path": path, "name": TOP, "follow": options.follow}
    left: list[str] = []
    with _Transfer(root, "copy_out", args, progress) as transfer:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        failed = None
        with _Running(transfer, writing) as running:
            try:
                _land(wanted, reading, left.append)
            except CopyFailed as error:
                failed = error
            finally:
                os.close(reading)
        ending = running.ending
        if failed is not None and (ending is None or not ending.code):
            raise failed  # else it is but a consequence
        return transfer.end(ending, left)


def get_archive(
    root: str, env: str, path: str, target: int, options: Options, progress: Progress = lambda _: None
) -> Copied:
    """Write what is at ``path`` inside to the descriptor ``target``, as an archive."""
    clean = posixpath.normpath(f"/{path.lstrip('/')}")
    contents = clean == "/" or posixpath.basename(path) == "."
    args = {
        "env": env,
        "path": path,
        "name": "." if contents else posixpath.basename(clean),
        "follow": options.follow,
    }
    with _Transfer(root, "copy_out", args, progress) as transfer:
        return transfer.end(transfer.run(target=target), [])


def export(root: str, env: str, target: int, progress: Progress = lambda _: None) -> Copied:
    """Write the whole root file system to the descriptor ``target``, as an archive."""
    with _Transfer(root, "export", {"env": env}, progress) as transfer:
        return transfer.end(transfer.run(target=target), [])


def _named(source: str) -> tuple[str, str, bool]:
    """What a source is called, its absolute path, and whether only what is in it is meant."""
    if not source:
        raise UsageError("the source has no name")
    bare = source.rstrip("/") or "/"
    base = posixpath.basename(bare)
    at = f"{os.getcwd()}/{source}" if not source.startswith("/") else source  # noqa: PTH109
    if base in (".", "..") or bare == "/":
        real = os.path.realpath(source)
        return posixpath.basename(real) or TOP, f"{real.rstrip('/')}/", base != ".."
    return base, at, False


# the archive's other end here


@dataclass
class _Packer:
    """The program that packs what the caller has."""

    process: subprocess.Popen[bytes]
    words: bytearray = field(default_factory=bytearray)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.words += line[: max(0, _WORDS_MAX - len(self.words))]

    def finish(self) -> IsolatError | None:
        """Why it failed; None where it did not, or nobody wanted to hear all of it."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        try:
            code = self.process.wait(_PACKER_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._thread.join()
        self.left, rest = _sorted(bytes(self.words))
        return _error(code, rest) if code > 0 else None

    def end(self) -> None:
        """Nobody listens any more when this returns: a descriptor that is read can't be closed."""
        self.process.kill()
        self._thread.join()


@contextlib.contextmanager
def _packed(words: list[str]) -> Iterator[tuple[int, _Packer]]:
    argv = [str(native_dir() / AGENT), *words]
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
    except OSError as error:
        raise Unsupported(
            f"{argv[0]} can't be started: {error.strerror}", hint="make builds it, or set ISOLAT_LIBEXEC"
        ) from error
    with process:
        assert process.stdout is not None
        packer = _Packer(process)
        try:
            yield process.stdout.fileno(), packer
        finally:
            packer.end()


class _Opening:
    """The plain bytes of an archive that may be compressed with gzip, bzip2 or xz, in the pipe ``reading``."""

    def __init__(self, source: int) -> None:
        self.reading, self._writing = os.pipe2(os.O_CLOEXEC)
        self._source = source
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with open(self._writing, "wb") as out, open(os.dup(self._source), "rb") as stream:
                head = stream.peek(len(_MAGIC[-1][0]))
                found = next((name for magic, name in _MAGIC if head.startswith(magic)), "")
                opened = __import__(found).open(stream) if found else stream
                while chunk := opened.read(_READ_BYTES):
                    out.write(chunk)
        except BrokenPipeError:
            pass  # nobody wants the rest, who says why
        except Exception as error:  # of three libraries: zlib.error, LZMAError, EOFError, …
            self._error = error

    def close(self) -> None:
        if self.reading >= 0:
            os.close(self.reading)
            self.reading = -1

    def finish(self) -> None:
        """Raises CopyFailed where it can't be opened, or ends too early.

        Where the other side has ended before, the rest is never read, and the thread may be waiting for it.
        """
        self.close()
        self._thread.join(_SAY_S)
        if isinstance(self._error, EOFError):
            raise CopyFailed("the archive ends too early") from self._error
        if self._error is not None:
            raise CopyFailed(f"the archive can't be read: {self._error}") from self._error


@contextlib.contextmanager
def _opened(source: int) -> Iterator[_Opening]:
    opening = _Opening(source)
    try:
        yield opening
    finally:
        opening.close()


def _land(wanted: Wanted, reading: int, tell: Callable[[str], None]) -> None:
    source = Source(lambda: memoryview(os.read(reading, _READ_BYTES)))
    reader = Reader(source, Bounds(_ENTRIES_MAX, _FILE_BYTES_MAX, _ATTRIBUTE_BYTES_MAX))
    try:
        Landing(wanted, tell).take(reader)
    except Bad as error:
        raise CopyFailed(f"what came from inside can't be used: {error.what}") from error


# the way between


class _Transfer:
    """One copy: the request, and the streams of the program inside."""

    def __init__(self, root: str, verb: str, args: Mapping[str, Any], progress: Progress) -> None:
        self.bytes = 0
        self._request = connect.call(root, verb, args)
        self._progress = progress
        self._words = bytearray()
        self._sock: socket.socket | None = None

    def __enter__(self) -> _Transfer:
        try:
            _, _, fds = self._request.next()
            (fd,) = fds
            self._sock = socket.socket(fileno=fd)
        except BaseException:
            self._request.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._sock is not None:
            self._sock.close()
        self._request.close()

    def cut(self) -> None:
        """Nothing more comes or goes."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def run(self, *, source: int = -1, target: int = -1) -> Ending:
        """Pump until the program inside has ended."""
        assert self._sock is not None

        def output(stream: int, data: bytes) -> None:
            if stream == 2:
                self._words.extend(data[: max(0, _WORDS_MAX - len(self._words))])
                return
            self._count(len(data))
            _write(target, data)

        pump = _Counting(self._sock, self._count, source, output)
        return pump.run()

    def _count(self, count: int) -> None:
        self.bytes += count
        self._progress(self.bytes)

    def end(self, ending: Ending | None, left: list[str]) -> Copied:
        """Let the daemon put away what it held for it, and see how it went."""
        told, words = _sorted(bytes(self._words))
        self._finish()
        if ending is None or ending.kind == "lost":
            raise Lost("it ended while it was copied")
        if ending.kind != "exited":
            raise CopyFailed(ending.message)
        if ending.signal:
            raise Lost(f"what copies inside was killed by signal {ending.signal}")
        if ending.code:
            raise _error(ending.code, words)
        return Copied(self.bytes, tuple([*left, *told][:_TOLD]))

    def _finish(self) -> None:
        with contextlib.suppress(OSError, DaemonUnavailable):  # one that was killed has cut nothing off
            self._request.sock.shutdown(socket.SHUT_WR)
            self._request.result()


class _Counting(Pump):
    """A pump that tells how much of its source it has sent."""

    def __init__(
        self, sock: socket.socket, count: Callable[[int], None], source: int, on_output: Callable[[int, bytes], None]
    ) -> None:
        super().__init__(sock, source=source if source >= 0 else None, on_output=on_output)
        self._sent = count

    def _read_source(self) -> None:
        before = self._credit
        super()._read_source()
        self._sent(max(0, before - self._credit))


class _Running:
    """A pump beside whoever reads what it writes to the pipe ``writing``, which is closed at its end."""

    def __init__(self, transfer: _Transfer, writing: int) -> None:
        self.ending: Ending | None = None
        self._transfer = transfer
        self._writing = writing
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError):  # nobody reads any more
                self.ending = self._transfer.run(target=self._writing)
        finally:
            os.close(self._writing)

    def __enter__(self) -> _Running:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Who inside has nothing more to say has said so by now, or is not waited for."""
        if kind is None:
            self._thread.join(_SAY_S)
        self._transfer.cut()
        self._thread.join()


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


# what the programs say


def _sorted(words: bytes) -> tuple[list[str], list[str]]:
    """What was left out, and the other lines."""
    lines = words.decode("utf-8", "backslashreplace").splitlines()
    left = [line.removeprefix(_LEFT_OUT) for line in lines if line.startswith(_LEFT_OUT)]
    return left, [line.removeprefix(_AGENT_SAYS) for line in lines if not line.startswith(_LEFT_OUT)]


def _error(code: int, words: list[str]) -> IsolatError:
    said = words[-1] if words else f"what copies ended with {code}"
    if code == _ABSENT:
        return NotFound(said)
    if code == _REFUSED:
        return UsageError(said)
    if code == _UNKNOWN:
        return Unsupported("it was started by an older version of Isolat, which can't copy", hint="start it anew")
    return CopyFailed(said, details=tuple(words[:-1][-_TOLD:]))
