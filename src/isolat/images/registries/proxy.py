"""One image of a registry through `skopeo experimental-image-proxy`: its manifest, and its blobs as streams.

One start of skopeo serves the whole image, several blobs at a time, and writes no file: what comes through the pipes is
written by us, never more than the manifest says, into files that were never anybody else's. skopeo verifies each blob's
digest. The protocol is that of ostree and bootc (github.com/containers/skopeo, cmd/skopeo/proxy.go): JSON over a
SOCK_SEQPACKET pair, one request at a time, descriptors of pipes with the answers. 0.2.1 has all that is used.

The proxy enforces policy.json only from 0.2.6 on, so images are not fetched this way where a policy asks for anything.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isolat.errors import InvalidImage, StoreError, Unsupported
from isolat.images.oci import DOCUMENT_BYTES_MAX, Descriptor
from isolat.images.registries import skopeo
from isolat.images.registries.watch import Watch

AT_ONCE = 4  # blobs under way
_PACKET_BYTES = 65536
_PIPE_BYTES = 1 << 20
_TICK_MS = 100


@dataclass
class _Stream:
    """A blob on its way: ``left`` bytes are still to come, into the descriptor ``target``."""

    blob: Descriptor
    pipe: int
    pipe_id: int
    target: int
    left: int
    verified: bool = False  # the proxy has said so, and its end of the pipe is closed


class Proxy:
    """A running proxy. Methods raise what skopeo says as our errors, and what ``watch`` says."""

    def __init__(self, options: Sequence[str], auth: int, what: str, watch: Watch) -> None:
        """``options``: of the command, before and after its name; ``auth``: the descriptor of the auth file."""
        self._watch = watch
        self._what = what
        self._ready = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        try:
            with theirs:
                words = [*options, "--sockfd", str(theirs.fileno()), "--authfile", skopeo.fd_path(auth)]
                self._running = skopeo.Running(skopeo.argv(words), what, pass_fds=(theirs.fileno(), auth))
        except BaseException:
            ours.close()
            raise

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._running.__exit__()

    def open(self, image: str) -> int:
        """The proxy's number of ``docker://…``; of an index, its instance for the platform in the options."""
        if not self._ready:
            self._initialize()
        return int(self._call("OpenImage", image)[0])

    def _initialize(self) -> None:
        """Raises Unsupported for a skopeo that speaks another protocol."""
        version = str(self._call("Initialize")[0])
        if not version.startswith("0.2."):
            raise Unsupported(
                f"this skopeo's image proxy speaks version {version[:20]}, and 0.2 is required to pull images"
            )
        self._ready = True

    def manifest(self, image: int) -> tuple[str, bytes]:
        """The digest of the manifest as it is in the registry, and the manifest, which may be converted to OCI's."""
        digest, pipe_id, pipe = self._call("GetManifest", image)
        if pipe < 0:
            raise StoreError(f"{self._what}: skopeo sent no manifest", stage="skopeo")
        with open(pipe, "rb") as stream:
            self._send("FinishPipe", pipe_id)
            found = self._read(stream.fileno())
            self._receive()
        return str(digest), found

    def _read(self, pipe: int) -> bytes:
        """To the end, which comes once FinishPipe has been asked for."""
        found = b""
        while True:
            self._wait([pipe])
            chunk = os.read(pipe, _PACKET_BYTES)
            found += chunk
            if len(found) > DOCUMENT_BYTES_MAX:
                raise InvalidImage(f"{self._what}: the manifest is too large", stage="too-large")
            if not chunk:
                return found

    # Requests

    def _call(self, method: str, *args: object) -> tuple[Any, int, int]:
        self._send(method, *args)
        return self._receive()

    def _send(self, method: str, *args: object) -> None:
        try:
            self._socket.send(json.dumps({"method": method, "args": list(args)}).encode())
        except OSError:
            raise self._ended() from None

    def _receive(self) -> tuple[Any, int, int]:
        """Its answer: the value, the pipe's number, and the descriptor or -1."""
        self._wait([self._socket.fileno()])
        return self._answer()

    def _answer(self) -> tuple[Any, int, int]:
        data, ancillary, _, _ = self._socket.recvmsg(_PACKET_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, packed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
        pipe = fds[0] if fds else -1
        try:
            return self._parse(data, pipe)
        except BaseException:
            if pipe >= 0:
                os.close(pipe)
            raise

    def _parse(self, data: bytes, pipe: int) -> tuple[Any, int, int]:
        if not data:
            raise self._ended()
        try:
            answer = json.loads(data)
            success, pipe_id = bool(answer["success"]), int(answer.get("pipeid") or 0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self._what}: skopeo answered with something else", stage="skopeo") from error
        if not success:
            raise skopeo.told(str(answer.get("error")), self._what)
        return answer.get("value"), pipe_id, pipe

    def _ended(self) -> Exception:
        self._running.process.wait()
        return self._running.failure()

    def _wait(self, descriptors: Sequence[int]) -> list[int]:
        """Those of the descriptors that can be read."""
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        while True:
            self._watch.check()
            found = poll.poll(_TICK_MS)
            if found:
                return [descriptor for descriptor, _ in found]

    # Blobs

    def fetch(
        self,
        image: int,
        blobs: Sequence[Descriptor],
        make: Callable[[str], int],
        whole: Callable[[str], None],
        came: Callable[[int], None],
    ) -> None:
        """Bring blobs, the small ones first.

        ``make`` gives the descriptor of a new file for a digest, ``whole`` is told that it has all of it, verified;
        ``came`` how many more bytes are there.
        """
        waiting = deque(sorted(blobs, key=lambda blob: blob.size_bytes))
        streams: deque[_Stream] = deque()
        asked: Descriptor | _Stream | None = None  # what the one request under way is about
        try:
            while waiting or streams or asked is not None:
                if asked is None:
                    asked = self._ask(image, waiting, streams)
                ready = self._wait([self._socket.fileno() if asked else -1, *(one.pipe for one in streams)])
                for stream in [one for one in streams if one.pipe in ready]:
                    self._move(stream, came)
                if asked is not None and self._socket.fileno() in ready:
                    self._answered(asked, streams, make)
                    asked = None
                for stream in [one for one in streams if one.verified and not one.left]:
                    streams.remove(stream)
                    _close(stream)
                    self._watch.advanced()
                    whole(stream.blob.digest)
        finally:
            for stream in streams:
                _close(stream)

    def _ask(self, image: int, waiting: deque[Descriptor], streams: deque[_Stream]) -> Descriptor | _Stream | None:
        """Ask for one more blob while there is room; else for the word on the oldest, which the proxy waits for."""
        if waiting and len(streams) < AT_ONCE:
            blob = waiting.popleft()
            self._send("GetBlob", image, blob.digest, blob.size_bytes)
            return blob
        for stream in streams:
            if not stream.verified:
                self._send("FinishPipe", stream.pipe_id)
                return stream
        return None

    def _answered(self, asked: Descriptor | _Stream, streams: deque[_Stream], make: Callable[[str], int]) -> None:
        _, pipe_id, pipe = self._answer()
        if isinstance(asked, _Stream):
            asked.verified = True
            return
        if pipe < 0:
            raise StoreError(f"{self._what}: skopeo sent no blob", stage="skopeo")
        with contextlib.suppress(OSError):  # more than an unprivileged user's pipes may be: then it is as it was
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            target = make(asked.digest)
        except BaseException:
            os.close(pipe)
            raise
        streams.append(_Stream(asked, pipe, pipe_id, target, asked.size_bytes))

    def _move(self, stream: _Stream, came: Callable[[int], None]) -> None:
        """What the pipe holds goes into the file, without passing through this process."""
        if not stream.left:
            if os.read(stream.pipe, 1):
                raise InvalidImage(
                    f"{self._what}: the blob {stream.blob.digest} goes on after its {stream.blob.size_bytes} bytes",
                    stage="too-large",
                )
            return
        try:
            count = os.splice(stream.pipe, stream.target, min(stream.left, _PIPE_BYTES))
        except OSError as error:
            raise StoreError(
                f"{self._what}: a layer could not be written: {error.strerror}",
                stage="disk-full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "disk",
                errno=error.errno or 0,
            ) from error
        stream.left -= count
        self._watch.came(count)
        came(count)


def _close(stream: _Stream) -> None:
    os.close(stream.pipe)
    os.close(stream.target)
