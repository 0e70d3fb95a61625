"""From the layers of an image to one EROFS file: opens what is needed, starts the two confined processes, waits.

::

    blobs ──> inflate ──pipe──> merge ──> OUT.new-xxxx ──rename──> OUT
              (decompressors,    (reads the archives, merges,
               blobs' digests)    writes; diff ids)

Neither process can open anything: they have the blobs (read-only), the pipe, one empty file and a pipe to tell on.
Guarantees: ``out`` appears whole or not at all; whatever the layers hold, the answer is a result or one named error;
both processes are gone when ``flatten`` returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, InternalError, InvalidImage, StoreError, Unsupported
from isolat.linux import child

WHAT = "flattening the layers"
TOLD = f"{WHAT}, bytes"
LAYERS_MAX = 500
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031
_TOLD_MAX = 1 << 20
_TEXT_MAX = 2000
_END_S = 10.0
_START = "import sys; sys.path[:0] = sys.argv[1].split(':'); from isolat.images.flatten.worker import main; main()"
_SOURCE = str(Path(__file__).resolve().parents[3])
_RESERVE_BYTES = 64 << 20  # of the disk, for others

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerBlob:
    """One layer as it came. ``diff_id`` "" means that it is not known yet, and wanted."""

    path: Path
    digest: str
    diff_id: str
    size_bytes: int


@dataclass(frozen=True)
class Limits:
    """What strangers may claim. More is refused by name (too-large, too-many-entries)."""

    total_bytes: int = 32 << 30  # of all layers together when they are uncompressed, and of the file that is made
    entries: int = 1_000_000  # of all archives together, extended headers counted
    file_bytes: int = 2 << 40  # what one file may claim to be, holes counted
    xattr_bytes: int = 128 << 10  # the extended attributes of one file
    memory_bytes: int = 2 << 30  # of each process
    cpu_s: int = 3600  # of each process


@dataclass(frozen=True)
class Flattened:
    """``size_bytes`` is the file's; ``content_bytes`` that of the regular files in it; ``entries`` counts inodes."""

    size_bytes: int
    entries: int
    diff_ids: tuple[str, ...]
    content_bytes: int


def no_progress(text: str, done: int, total: int) -> None:
    """For those who don't watch."""


def flatten(
    layers: Sequence[LayerBlob],
    out: Path,
    d: Deadline,
    limits: Limits = Limits(),
    progress: Progress = no_progress,
    pass_fds: Sequence[int] = (),
) -> Flattened:
    """Make ``out`` of the layers, the oldest first. ``pass_fds`` stay open in the processes, for locks that they hold.

    Raises InvalidImage (``stage`` says why in one word), StoreError where this machine is at fault (no room, no
    permission), Unsupported where it can't confine the processes, DeadlineExceeded.
    """
    if len(layers) > LAYERS_MAX:
        raise InvalidImage(
            f"an image of {len(layers)} layers; it must be at most {LAYERS_MAX}", stage="too-many-layers", hint=_HINT
        )
    with contextlib.ExitStack() as stack:
        blobs = [_open_blob(layer, stack) for layer in layers]
        making = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
        target = _create(making, stack)
        stack.callback(making.unlink, missing_ok=True)
        result = _Flattening(layers, blobs, target, limits, pass_fds, progress).run(d)
        os.fchmod(target, 0o600)
        making.rename(out)
        return result


def _open_blob(layer: LayerBlob, stack: contextlib.ExitStack) -> int:
    try:
        descriptor = os.open(layer.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(
            f"could not open the layer {layer.digest}: {error.strerror}", stage="open", errno=error.errno or 0
        ) from error
    stack.callback(os.close, descriptor)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"the layer {layer.digest} is no file", stage="open")
    if found.st_size != layer.size_bytes:
        raise InvalidImage(
            f"the layer {layer.digest} has {found.st_size} bytes; its image says {layer.size_bytes}",
            stage="size-mismatch",
            hint=_HINT,
        )
    return descriptor


def _create(path: Path, stack: contextlib.ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreError(f"could not make {path}: {error.strerror}", stage="create", errno=error.errno or 0) from error
    stack.callback(os.close, descriptor)
    return descriptor


_HINT = "fetch or build it again; if it stays, whoever made the image must repair it"
_HINTS = {
    "too-large": "it may be meant to fill this machine's disk or memory; if you trust it, make a smaller image of it",
    "too-many-entries": "if you trust it, make an image of fewer files of it",
    "digest-mismatch": "it was damaged or changed on its way: remove it and fetch it again",
    "bad-compression": "layers are tar, tar+gzip or tar+zstd: build the image with one of these",
    "crashed": "the image may be an attack on what opens it: don't use it, and tell Isolat's makers",
}


class _Process:
    """One confined process, and what it has told."""

    def __init__(self, job: dict[str, Any], keep: Sequence[int]) -> None:
        self.role = str(job["role"])
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self._rest = b""
        self.told, write = os.pipe2(os.O_CLOEXEC)
        try:
            text = json.dumps({**job, "tell": write, "parent": os.getpid()})
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, ":".join((_SOURCE, *packages())), text],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child.clean_environment(),
                process_group=0,
                pass_fds=(write, *keep),
            )
        except OSError as error:
            os.close(self.told)
            raise StoreError(
                f"{WHAT}: could not start: {error.strerror}", stage=WHAT, errno=error.errno or 0
            ) from error
        finally:
            os.close(write)

    def read(self) -> list[dict[str, Any]] | None:
        """What it tells next; None when it is done telling. Raises InvalidImage for what none of ours would tell."""
        chunk = os.read(self.told, 65536)
        if not chunk:
            return None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        try:
            if len(self._rest) > _TOLD_MAX:
                raise ValueError("a line without end")
            return [self._take(line) for line in lines]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidImage(
                f"{WHAT} ({self.role}): the process tells nonsense: {type(error).__name__}",
                stage="crashed",
                hint=_HINTS["crashed"],
            ) from error

    def _take(self, line: bytes) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(line)
        if "result" in told:
            self.result = dict(told["result"])
        elif "error" in told:
            words = {key: _printable(str(told[key])) for key in ("error", "what", "entry")}
            self.error = {**words, "layer": int(told["layer"])}
        else:
            told = {"done": int(told["done"])}
        return told

    def wait(self) -> int:
        """How it ended, once it has told all: 0, a code, or a signal's number below zero."""
        try:
            return self._child.wait(_END_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGALRM

    def end(self) -> None:
        """Kill it, if it is still there, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        os.close(self.told)


def _printable(text: str) -> str:
    """Whatever a process that was taken over tells must not steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:_TEXT_MAX])


def packages() -> list[str]:
    """Where isal and zstandard may be: with ``-S`` the child looks nowhere itself, like the daemon that starts it."""
    found = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = Path(sys.executable).parent.parent / "lib" / version / "site-packages"
    return list(dict.fromkeys([str(own), *found, "/usr/lib/python3/dist-packages"]))


class _Flattening:
    def __init__(
        self,
        layers: Sequence[LayerBlob],
        blobs: Sequence[int],
        target: int,
        limits: Limits,
        pass_fds: Sequence[int],
        progress: Progress,
    ) -> None:
        self._layers = layers
        self._blobs = blobs
        self._target = target
        self._limits = limits
        self._pass_fds = tuple(pass_fds)
        self._progress = progress
        self._total = sum(layer.size_bytes for layer in layers)
        self._processes: list[_Process] = []
        disk = os.fstatvfs(target)
        self._free = max(0, disk.f_bavail * disk.f_frsize - _RESERVE_BYTES)

    def run(self, d: Deadline) -> Flattened:
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # as much as an ordinary user may have
                import fcntl

                fcntl.fcntl(write, _F_SETPIPE_SZ, _PIPE_BYTES)
            self._start(read, write)
        except BaseException:
            self._end()
            raise
        finally:
            os.close(read)
            os.close(write)
        try:
            self._follow(d)
            codes = [process.wait() for process in self._processes]
        finally:
            self._end()
        return self._answer(codes)

    def _start(self, read: int, write: int) -> None:
        shared = {"memory": self._limits.memory_bytes, "cpu": self._limits.cpu_s}
        merge = {
            **shared, "role": "merge", "pipe": read, "out": self._target,
            "total": min(self._limits.total_bytes, self._free),
            "excess": "too-large" if self._limits.total_bytes <= self._free else "no-space",
            "entries": self._limits.entries, "file": self._limits.file_bytes, "xattr": self._limits.xattr_bytes,
            "diff_ids": [layer.diff_id for layer in self._layers],
        }  # fmt: skip
        blobs = [{"blob": blob, "digest": layer.digest} for blob, layer in zip(self._blobs, self._layers, strict=True)]
        inflate = {
            **shared, "role": "inflate", "pipe": write, "total": self._limits.total_bytes, "layers": blobs,
        }  # fmt: skip
        self._processes.append(_Process(merge, (read, self._target, *self._pass_fds)))
        self._processes.append(_Process(inflate, (write, *self._blobs, *self._pass_fds)))

    def _follow(self, d: Deadline) -> None:
        self._progress(TOLD, 0, self._total)
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process.told, selectors.EVENT_READ, process)
            while selector.get_map():
                ready = selector.select(d.left_s())
                if not ready:
                    raise DeadlineExceeded(f"{WHAT} did not end in time", stage=WHAT)
                for key, _ in ready:
                    told = key.data.read()
                    if told is None:
                        selector.unregister(key.fd)
                        continue
                    for line in told:
                        if "done" in line:
                            self._progress(TOLD, int(line["done"]), self._total)

    def _end(self) -> None:
        for process in self._processes:
            process.end()

    def _answer(self, codes: Sequence[int]) -> Flattened:
        merge, inflate = self._processes
        # The blob's own digest explains whatever the reader of its content has found wrong
        for process, code in ((inflate, codes[1]), (merge, codes[0])):
            if process.error is None and process.result is None:
                raise _crashed(process.role, code)
            if process.error is not None and process.error["error"] != "unread":
                raise self._error(process.error)
        found = merge.result
        if found is None or inflate.result is None:
            raise InternalError(f"{WHAT}: a process ended without a word")
        self._progress(TOLD, self._total, self._total)
        return Flattened(int(found["size"]), int(found["entries"]), tuple(found["diff_ids"]), int(found["content"]))

    def _error(self, told: dict[str, Any]) -> StoreError | InternalError | Unsupported:
        stage, what, entry, index = str(told["error"]), str(told["what"]), str(told["entry"]), int(told["layer"])
        where = f"the layer {self._layers[index].digest}" if 0 <= index < len(self._layers) else "the image"
        message = f"{where}: {what}" + (f" (entry {entry})" if entry else "")
        if stage == "internal":
            return InternalError(f"{WHAT}: {message}")
        if stage == "no-zstd":
            return Unsupported(message, hint="pip install zstandard, or apt-get install python3-zstandard")
        if stage == "not-confined":
            return Unsupported(message, hint="run a kernel with seccomp on an x86_64 or aarch64 machine")
        if stage in ("no-space", "write-failed"):
            return StoreError(message, stage=stage, hint="free some space on the disk of the state root")
        return InvalidImage(message, stage=stage, hint=_HINTS.get(stage, _HINT))


def _crashed(role: str, code: int) -> InvalidImage:
    if code == -signal.SIGXCPU:
        return InvalidImage(
            f"{WHAT} ({role}) took more processor time than is allowed", stage="too-slow", hint=_HINTS["too-large"]
        )
    how = f"killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"it ended with code {code}"
    return InvalidImage(f"{WHAT} ({role}) crashed: {how}", stage="crashed", hint=_HINTS["crashed"])
