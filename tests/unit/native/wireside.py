"""The Python side of a keeper or init under test: frames over a socketpair, and a process that ends with its test."""

from __future__ import annotations

import array
import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from isolat.wire import codec
from isolat.wire import kinds as k

NATIVE = Path(__file__).resolve().parents[3] / "native"
BUILD = NATIVE / "build"
SANITIZED = BUILD / "sanitize"
# ISOLAT_SANITIZE=1 runs every test of this directory against the sanitized programs (make -C native sanitize)
SANITIZE = os.environ.get("ISOLAT_SANITIZE") == "1"
KEEPER = (SANITIZED if SANITIZE else BUILD) / "isolat-keeper"
INIT = (SANITIZED if SANITIZE else BUILD) / "isolat-init"
AGENT = (SANITIZED if SANITIZE else BUILD) / "isolat-agent"
TIMEOUT_S = 20.0


class Gone(Exception):
    """The other side closed the connection."""


class Refused(Exception):
    """An ERROR came back."""

    def __init__(self, frame: codec.Frame) -> None:
        self.frame = frame
        self.stage = frame.text(k.T_STAGE)
        self.errno = frame.int(k.T_ERRNO)
        self.code = frame.int(k.T_CODE)
        self.message = frame.text(k.T_MESSAGE)
        self.tail = frame.bytes(k.T_TAIL)
        super().__init__(f"{self.stage}: {self.message} (errno {self.errno}, code {self.code}) {self.tail!r}")


class Line:
    """One connection: send frames, receive frames in order, with descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(TIMEOUT_S)
        self._decoder = codec.Decoder()
        self._frames: list[codec.Frame] = []
        self.fds: list[int] = []
        self._id = 0

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if not fds:
            self.sock.sendall(data)
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = self.sock.sendmsg([data], rights)
        self.sock.sendall(data[sent:])

    def send(self, kind: int, fields: Iterable[tuple[int, codec.Value]] = (), fds: Sequence[int] = ()) -> int:
        self._id += 1
        self.send_bytes(codec.pack(kind, self._id, fields, len(fds)), fds)
        return self._id

    def recv(self, timeout_s: float = TIMEOUT_S) -> codec.Frame:
        self.sock.settimeout(timeout_s)
        while not self._frames:
            try:
                data, rights, _, _ = self.sock.recvmsg(1 << 18, socket.CMSG_SPACE(4 * 16))
            except ConnectionResetError as error:
                raise Gone from error
            for level, kind, value in rights:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    got = array.array("i")
                    got.frombytes(value[: len(value) - len(value) % got.itemsize])
                    self.fds += got
            if not data:
                raise Gone
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def gone(self) -> bool:
        """Read to the end of the connection."""
        try:
            while True:
                self.recv()
        except (Gone, OSError):
            return True

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Controller(Line):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.events: list[codec.Frame] = []

    def answer(self, id: int, timeout_s: float = TIMEOUT_S) -> codec.Frame:
        while True:
            frame = self.recv(timeout_s)
            if frame.id == 0:
                self.events.append(frame)
            elif frame.id < id:
                continue  # of a request whose answer was not waited for
            elif frame.id == id:
                if frame.kind == k.ERROR:
                    raise Refused(frame)
                assert frame.kind == k.OK
                return frame

    def ask(self, kind: int, fields: Iterable[tuple[int, codec.Value]] = (), fds: Sequence[int] = ()) -> codec.Frame:
        return self.answer(self.send(kind, fields, fds))

    def exited(self, key: str) -> codec.Frame:
        """The EXITED event of this process."""
        while True:
            for event in self.events:
                if event.kind == k.EXITED and event.text(k.T_KEY) == key:
                    self.events.remove(event)
                    return event
            frame = self.recv()
            assert frame.id == 0, frame
            self.events.append(frame)

    def hello(self) -> codec.Frame:
        return self.ask(k.HELLO, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "daemon")])

    def spawn(
        self, key: str, argv: Sequence[str | bytes], *, flags: int = 0, to: str = "", env: Sequence[str] = (),
        fds: Sequence[int] = (), more: Iterable[tuple[int, codec.Value]] = (),
    ) -> int:  # fmt: skip
        frame = self.ask(k.SPAWN, spawn_fields(key, argv, flags, to, env, more), fds)
        return frame.int(k.T_PID)

    def adopt(self, name: str, *, stdin: bool = False) -> Client:
        ours, theirs = socket.socketpair()
        client = Client(ours)
        with theirs:
            try:
                self.ask(k.ADOPT, [(k.T_KEY, name), (k.T_FLAGS, k.F_STDIN if stdin else 0)], [theirs.fileno()])
            except BaseException:
                client.close()
                raise
        return client

    def run(
        self, key: str, argv: Sequence[str | bytes], *, to: str = "", flags: int = 0, env: Sequence[str] = (),
        stdin: bytes | None = None, more: Iterable[tuple[int, codec.Value]] = (),
    ) -> Result:  # fmt: skip
        """Adopt, spawn, talk to the end."""
        client = self.adopt(f"{to}/{key}" if to else key, stdin=stdin is not None)
        try:
            self.spawn(key, argv, to=to, flags=flags | (k.F_STDIN if stdin is not None else 0), env=env, more=more)
            return client.finish(stdin or b"")
        finally:
            client.close()

    def step(self, number: int, fields: list[tuple[int, codec.Value]], *, revert: bool = False,
             fds: Sequence[int] = ()) -> None:  # fmt: skip
        nested: codec.Fields = [(k.T_OP, number), *fields]
        self.ask(k.STEP, [(k.T_OP, int(revert)), (k.T_STEP, nested)], fds)

    def procs(self, prefix: str = "") -> dict[str, codec.Frame]:
        found = self.ask(k.PROCS, [(k.T_PREFIX, prefix)]).nested(k.T_PROC)
        return {p.text(k.T_KEY): p for p in found}


def spawn_fields(
    key: str, argv: Sequence[str | bytes], flags: int = 0, to: str = "", env: Sequence[str] = (),
    more: Iterable[tuple[int, codec.Value]] = (),
) -> codec.Fields:  # fmt: skip
    fields: codec.Fields = [(k.T_KEY, key), (k.T_FLAGS, flags)]
    if to:
        fields.append((k.T_TO, to))
    fields += [(k.T_ARGV, a if isinstance(a, bytes) else os.fsencode(a)) for a in argv]
    fields += [(k.T_ENV, os.fsencode(e)) for e in env]
    return fields + list(more)


class Result:
    def __init__(self) -> None:
        self.out = {k.STDOUT: bytearray(), k.STDERR: bytearray()}
        self.eof: list[int] = []
        self.order: list[int] = []
        self.exited: codec.Frame | None = None
        self.error: codec.Frame | None = None

    @property
    def stdout(self) -> bytes:
        return bytes(self.out[k.STDOUT])

    @property
    def stderr(self) -> bytes:
        return bytes(self.out[k.STDERR])

    @property
    def code(self) -> int:
        assert self.exited is not None
        return self.exited.int(k.T_CODE)


class Client(Line):
    """What a user's command is: stdin by credit, output, the end."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.credit = 0
        self.result = Result()

    def take(self, frame: codec.Frame) -> None:
        result = self.result
        result.order.append(frame.kind)
        if frame.kind == k.DATA:
            assert len(frame.body) <= k.MAX_DATA_BYTES + 1
            assert frame.body[0] not in result.eof
            result.out[frame.body[0]] += frame.body[1:]
        elif frame.kind == k.EOF:
            result.eof.append(frame.body[0])
        elif frame.kind == k.CREDIT:
            self.credit += int.from_bytes(frame.body, "little")
        elif frame.kind == k.EXITED:
            result.exited = frame
        elif frame.kind == k.ERROR and frame.id == 0:
            result.error = frame

    def read_until(self, needle: bytes, stream: int = k.STDOUT) -> bytes:
        while needle not in self.result.out[stream]:
            self.take(self.recv())
        return bytes(self.result.out[stream])

    def write(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            while not self.credit:
                self.take(self.recv())
            n = min(self.credit, k.MAX_DATA_BYTES, len(data) - at)
            self.credit -= n
            self._send_while_reading(codec.pack_data(k.STDIN, data[at : at + n]))
            at += n

    def _send_while_reading(self, data: bytes) -> None:
        self.sock.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while data:
                for _, events in selector.select(TIMEOUT_S):
                    if events & selectors.EVENT_WRITE:
                        data = data[self.sock.send(data) :]
                    elif events & selectors.EVENT_READ:
                        self.take(self.recv())
                        self.sock.setblocking(False)

    def end_input(self) -> None:
        self.send_bytes(codec.pack_eof(k.STDIN))

    def finish(self, stdin: bytes = b"") -> Result:
        with contextlib.suppress(Gone):
            if stdin:
                self.write(stdin)
            with contextlib.suppress(BrokenPipeError):
                self.end_input()
            while True:
                self.take(self.recv())
        return self.result


class Held:
    """A keeper (or init) process with its controller; kill() leaves nothing."""

    def __init__(self, argv: Sequence[str], controller_fd: int, log: Path, env: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.log = log
        with theirs, log.open("ab") as err:
            if controller_fd == 0:
                self.process = subprocess.Popen(
                    argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=err, env=env
                )
            else:
                self.process = subprocess.Popen(
                    ["/bin/sh", "-c", f'exec "$0" "$@" {controller_fd}<&0 0</dev/null', *argv],
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=err, env=env,
                )  # fmt: skip
        self.c = Controller(ours)
        self.pid = self.process.pid

    def stop(self) -> None:
        with contextlib.suppress(OSError, Gone, TimeoutError):
            self.c.ask(k.QUIT)
        self.c.close()
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("it did not end after QUIT") from None
        assert code in {0, -signal.SIGKILL, 75}, (code, self.words())

    def words(self) -> str:
        """What it wrote to stderr, before and after it had its directory."""
        return "".join(p.read_text() for p in (self.log, self.log.with_name("keeper.log")) if p.exists())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.c.close()


def start_keeper(directory: Path, *options: str, binary: Path = KEEPER) -> Held:
    directory.mkdir(exist_ok=True)
    env = os.environ | {"ASAN_OPTIONS": "exitcode=23:detect_leaks=1"}
    return Held([str(binary), str(directory), *options], 0, directory / "stderr", env)


def start_init(directory: Path, binary: Path = INIT) -> Held:
    directory.mkdir(exist_ok=True)
    # an init can't be traced, so the leak detector can't work in it
    held = Held([str(binary)], 3, directory / "stderr", os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    hello = held.c.recv()
    assert (hello.kind, hello.id, hello.text(k.T_ROLE)) == (k.HELLO, 0, "init")
    return held


def wait_for(condition: object, what: str = "condition", timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def log_records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    data = path.read_bytes()
    at = 0
    while at < len(data):
        when, n, stream = (
            int.from_bytes(data[at : at + 8], "little"),
            int.from_bytes(data[at + 8 : at + 12], "little"),
            data[at + 12],
        )
        assert data[at + 13 : at + 16] == bytes(3)
        yield when, stream, data[at + 16 : at + 16 + n]
        at += 16 + n
