"""From a state root to a connection to its daemon, which is started when there is none.

Only the way to a daemon that runs is here, because every command takes it; starting one is in ``start``.
"""

from __future__ import annotations

import _socket
import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

DEFAULT_ROOT = "/var/lib/isolat"
SOCKET = "daemon.sock"
_LONGEST_ADDRESS = 107  # sun_path, with its NUL


def find_root(given: str | None = None) -> str:
    """The state root, absolute: as given, ``ISOLAT_ROOT``, or the default."""
    root = given or posix.environ.get(b"ISOLAT_ROOT", b"").decode("utf-8", "surrogateescape") or DEFAULT_ROOT
    return root if root.startswith("/") else f"{posix.getcwd()}/{root}"


def connect(root: str, *, start: bool = True) -> _socket.socket:
    """A connection to the daemon of ``root``. Raises DaemonUnavailable, with the remedy, when there can be none."""
    try:
        return reach(root)
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    except OSError as error:
        raise _unreachable(root, error) from error
    from isolat.client import start as starting

    return starting.connect_or_start(root) if start else starting.give_up(root)


def reach(root: str) -> _socket.socket:
    """A connection to a daemon that is there. Raises OSError."""
    address = f"{root}/{SOCKET}"
    directory = -1
    if len(address.encode("utf-8", "surrogateescape")) > _LONGEST_ADDRESS:
        directory = posix.open(root, posix.O_PATH | posix.O_CLOEXEC)
        address = f"/proc/self/fd/{directory}/{SOCKET}"
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    finally:
        if directory >= 0:
            posix.close(directory)
    return sock


def _unreachable(root: str, error: OSError) -> Exception:
    from isolat.client import start as starting

    return starting.unreachable(root, error)


class Call:
    """One request and its answer."""

    __slots__ = ("_receiver", "sock")

    def __init__(self, sock: _socket.socket, verb: str, args: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        from isolat.wire import api

        self.sock = sock
        api.send(sock, api.request(verb, args), fds)
        self._receiver = api.Receiver(sock)

    def next(self) -> tuple[str, Any, list[int]]:
        """The kind of the next message (progress, row, stream, ok), its content, its descriptors.

        Raises what the daemon answered as an error; DaemonUnavailable where it died before it had answered.
        """
        try:
            message, fds = self._receiver.receive()
        except (EOFError, ConnectionError):
            raise _died() from None
        for kind in ("ok", "stream", "row", "progress"):
            if kind in message:
                return kind, message[kind], fds
        for fd in fds:
            posix.close(fd)
        from isolat.errors import from_json

        raise from_json(message.get("error"))

    def result(self) -> Any:
        """The content of the final ok; what comes before it is dropped."""
        while True:
            kind, content, fds = self.next()
            for fd in fds:
                posix.close(fd)
            if kind == "ok":
                return content

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._receiver.close_descriptors()
        self.sock.close()


def call(root: str, verb: str, args: Mapping[str, Any], fds: Sequence[int] = (), *, start: bool = True) -> Call:
    """Connect and send a request."""
    sock = connect(root, start=start)
    try:
        return Call(sock, verb, args, fds)
    except ConnectionError:
        sock.close()
        raise _died() from None
    except BaseException:
        sock.close()
        raise


def ask(root: str, verb: str, args: Mapping[str, Any], *, start: bool = True) -> Any:
    """A whole request: its result."""
    with call(root, verb, args, start=start) as request:
        return request.result()


def picture(request: Call) -> bytes:
    """The bytes of the one descriptor that the answer carries, from its beginning."""
    _, content, fds = request.next()
    try:
        if len(fds) != 1:
            from isolat.errors import ProtocolError

            raise ProtocolError("the daemon did not answer with a picture")
        return posix.pread(fds[0], int(content["bytes"]), 0)
    finally:
        for fd in fds:
            posix.close(fd)


def _died() -> Exception:
    from isolat.errors import DaemonUnavailable

    return DaemonUnavailable(
        "the daemon ended before it had answered",
        hint="try again: the next command starts it, and it finds every environment again",
    )
