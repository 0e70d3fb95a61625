"""The Python SDK: environments as objects.

Every method is one request on a connection of its own, so a ``Client`` may be used by several threads, and nothing
needs closing. Output and input go between this process and the environment's keeper: a daemon that is restarted cuts
nothing off.
"""

from __future__ import annotations

import _socket
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

from isolat.client import archives, connect, logs, registries, streams
from isolat.client import build as sources
from isolat.client.build import BuildOptions
from isolat.client.files import HasFiles
from isolat.client.service import Options, service
from isolat.client.times import NS
from isolat.errors import DeadlineExceeded, ImageNotFound, IsolatError, Lost, ProtocolError, StartFailed

OnOutput = Callable[[str, bytes], None]
Pull = Literal["missing", "always", "never"]
_STREAMS = {1: "stdout", 2: "stderr"}


class CommandFailed(IsolatError):
    """A command ended with another code than 0, and ``Result.check`` was asked to mind."""

    code = "command-failed"


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote. ``signal`` is 0, or what ended it; ``code`` is then 128 + signal."""

    code: int
    stdout: bytes = b""
    stderr: bytes = b""
    signal: int = 0

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode("utf-8", "replace")

    def check(self) -> Result:
        """Raise CommandFailed, with the end of standard error, unless the code is 0."""
        if self.code:
            tail = tuple(self.stderr.decode("utf-8", "replace").splitlines()[-20:])
            raise CommandFailed(f"the command ended with {self.code}", details=tail)
        return self


@dataclass(frozen=True)
class Exit:
    """How an environment ended. ``code`` is None where nobody knows (LOST)."""

    code: int | None
    signal: int = 0
    forced: bool = False
    oom: bool = False
    reason: str = ""


class Environment(HasFiles):
    """One environment. As a context manager it is removed at the end, whatever it does."""

    def __init__(self, client: Client, id: str, name: str, row: Mapping[str, Any] | None = None) -> None:
        self.client = client
        self.id = id
        self.name = name
        self.row: Mapping[str, Any] = dict(row or {})  # what ``ps`` told: image, layer, state, status, …

    def __repr__(self) -> str:
        return f"<Environment {self.name} {self.id}>"

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self.rm(force=True)

    def exec(
        self,
        command: Sequence[str],
        *,
        input: bytes | None = None,
        environment: Mapping[str, str] | None = None,
        working_dir: str = "",
        user: str = "",
        timeout_s: float | None = None,
        on_output: OnOutput | None = None,
    ) -> Result:
        """Run a command inside and wait for its end. With ``on_output`` output goes there instead of the result.

        Raises CommandNotFound and NotExecutable where it never ran, DeadlineExceeded after ``timeout_s`` (it is
        then killed), Lost where the environment died meanwhile.
        """
        args = {
            "env": self.id,
            "command": list(command),
            "environment": [f"{name}={value}" for name, value in (environment or {}).items()],
            "working_dir": working_dir,
            "user": user,
            "stdin": input is not None,
        }
        with self.client._call("exec", args) as request:
            return _pumped(request, input, timeout_s, on_output)

    def stop(self, grace_s: float | None = None) -> Exit:
        """Ask it to end, and kill it when its grace has passed."""
        return _exit(self.client._ask("stop", {"env": self.id, "grace_s": grace_s}))

    def kill(self, signal: int | str = "KILL") -> None:
        self.client._ask("kill", {"env": self.id, "signal": signal})

    def wait(self) -> Exit:
        """Wait for its end."""
        return _exit(self.client._ask("wait", {"env": self.id}))

    def rm(self, *, force: bool = False) -> None:
        """Remove it; with ``force`` also while it runs, and what is gone already is fine."""
        try:
            self.client._ask("rm", {"env": self.id, "force": force})
        except IsolatError as error:
            if not (force and error.code == "not-found"):
                raise

    def inspect(self) -> dict[str, Any]:
        """Everything known of it."""
        found: dict[str, Any] = self.client._ask("inspect", {"env": self.id})
        return found

    def screenshot(self) -> bytes:
        """What its screen shows, as PNG. Raises Unsupported where it has none."""
        return screenshot(self.client, self.id)

    def fork(self, count: int = 1, *, name: str = "") -> list[Environment]:
        """Make others that go on where this one is, with all its processes. ``name`` is for a single one."""
        found = self.client._ask("fork", {"env": self.id, "count": count, "name": name})["environments"]
        return [Environment(self.client, child["id"], child["name"]) for child in found]

    def snapshot(self, name: str) -> dict[str, Any]:
        """Keep it as it is now, with all its processes; ``Client.restore`` goes on from there."""
        found: dict[str, Any] = self.client._ask("snapshot", {"env": self.id, "name": name})
        return found

    def logs(
        self, *, follow: bool = False, tail: int | None = None, since_s: float | None = None
    ) -> Iterator[logs.LogRecord]:
        """What it has written. ``since_s`` is seconds since the epoch; ``tail`` the last so many lines."""
        return self.client._logs(self.id, follow, tail, int((since_s or 0) * NS))


class Client:
    """The environments of one state root. The daemon is started by the first request that needs it."""

    def __init__(self, root: str | os.PathLike[str] | None = None, *, start: bool = True) -> None:
        self.root = connect.find_root(os.fspath(root) if root is not None else os.environ.get("ISOLAT_ROOT"))
        self._start = start

    def _call(self, verb: str, args: Mapping[str, Any], fds: Sequence[int] = ()) -> connect.Call:
        return connect.call(self.root, verb, args, fds, start=self._start)

    def _ask(self, verb: str, args: Mapping[str, Any], fds: Sequence[int] = ()) -> Any:
        with self._call(verb, args, fds) as request:
            return request.result()

    @overload
    def run(
        self,
        image: str,
        command: Sequence[str] | str = (),
        *,
        detach: Literal[True],
        pull: Pull = "missing",
        **options: Unpack[Options],
    ) -> Environment: ...

    @overload
    def run(
        self,
        image: str,
        command: Sequence[str] | str = (),
        *,
        detach: Literal[False] = False,
        pull: Pull = "missing",
        input: bytes | None = None,
        on_output: OnOutput | None = None,
        **options: Unpack[Options],
    ) -> Result: ...

    def run(
        self,
        image: str,
        command: Sequence[str] | str = (),
        *,
        detach: bool = False,
        pull: Pull = "missing",
        input: bytes | None = None,
        on_output: OnOutput | None = None,
        **options: Unpack[Options],
    ) -> Environment | Result:
        """Run a command in a new environment: to its end, or with ``detach`` leave it running.

        To its end it is removed afterwards unless ``remove=False``; after ``timeout_s`` it is killed. ``pull``: whether
        the image comes from its registry. Raises ImageNotFound where it is not here, and not there.
        """
        if not detach:
            options.setdefault("remove", True)
        missing = None
        if pull != "always":
            try:
                return self._run(image, command, detach, input, on_output, options)
            except ImageNotFound as error:
                if pull == "never":
                    raise
                missing = error
        registries.pull_to_run(self._call, _watching(None), image, missing)
        return self._run(image, command, detach, input, on_output, options)

    def _run(
        self,
        image: str,
        command: Sequence[str] | str,
        detach: bool,
        input: bytes | None,
        on_output: OnOutput | None,
        options: Options,
    ) -> Environment | Result:
        data, fds = service(image, command, stdin=input is not None, **options)
        try:
            request = self._call("run", {"spec": data, "attach": not detach}, fds)
        finally:
            for fd in fds:
                os.close(fd)
        with request:
            if detach:
                found = request.result()
                return Environment(self, found["id"], found["name"])
            result = _pumped(request, input, None, on_output)
            request.result()
            return result

    def get(self, env: str) -> Environment:
        """The environment of this id, name, or unambiguous beginning of an id. Raises NotFound."""
        found = self._ask("inspect", {"env": env})
        return Environment(self, found["id"], found["name"])

    def ps(self, *, all: bool = True) -> list[Environment]:
        rows = self._ask("ps", {"all": all})["environments"]
        return [Environment(self, row["id"], row["name"], row) for row in rows]

    def plan(self, image: str, command: Sequence[str] | str = (), **options: Unpack[Options]) -> dict[str, Any]:
        """Every effect that ``run`` would have: ``plan`` (data) and ``text``."""
        data, fds = service(image, command, **options)
        for fd in fds:
            os.close(fd)
        found: dict[str, Any] = self._ask("plan", {"spec": data})
        return found

    def restore(self, snapshot: str, *, name: str = "", remove: bool = False) -> Environment:
        """A new environment that goes on where the snapshot was, in the background."""
        found = self._ask("restore", {"snapshot": snapshot, "name": name, "remove": remove})
        return Environment(self, found["id"], found["name"])

    def snapshots(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("snapshots", {})["snapshots"]
        return found

    def remove_snapshot(self, snapshot: str) -> None:
        """What was made from it goes on."""
        self._ask("snapshot_rm", {"snapshot": snapshot})

    def create_volume(
        self, name: str = "", *, size: int | str | None = None, labels: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A named volume; the one that is there already, where it has this size. ``size``: bytes, or ``10g``."""
        args = {"name": name, "size": size, "labels": dict(labels or {})}
        found: dict[str, Any] = self._ask("volume_create", args)
        return found

    def volumes(self) -> list[dict[str, Any]]:
        """Every named volume: what it may hold and holds, and who uses it."""
        found: list[dict[str, Any]] = self._ask("volumes", {})["volumes"]
        return found

    def volume(self, name: str) -> dict[str, Any]:
        """One of them. Raises NotFound."""
        found: dict[str, Any] = self._ask("volume_inspect", {"volume": name})
        return found

    def remove_volume(self, name: str, *, force: bool = False) -> None:
        """Remove it with all that is in it; with ``force`` what is not there is fine.

        Raises Conflict while it is used.
        """
        try:
            self._ask("volume_rm", {"volume": name})
        except IsolatError as error:
            if not (force and error.code == "not-found"):
                raise

    def prune_volumes(self) -> list[dict[str, Any]]:
        """Remove those that nobody uses; each with the bytes that are free again."""
        found: list[dict[str, Any]] = self._ask("volume_prune", {})["removed"]
        return found

    def images(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("images", {})["images"]
        return found

    def rmi(self, image: str, *, force: bool = False) -> None:
        """``force``: a digest with all its names."""
        self._ask("rmi", {"image": image, "force": force})

    def pull(
        self,
        image: str,
        *,
        platform: str = "",
        tls_verify: bool | None = None,
        on_progress: registries.OnProgress | None = None,
    ) -> dict[str, Any]:
        """Fetch an image from a registry, with the credentials that `isolat login` has kept; or from another place:
        ``oci:DIR[:TAG]``, ``dir:DIR``, ``oci-archive:FILE[:NAME]``, ``docker-archive:FILE[:NAME]``.

        Raises NotFound, Refused, InvalidImage, StoreError.
        """
        return registries.pull(self._call, _watching(on_progress), image, platform, tls_verify)

    def push(
        self,
        image: str,
        target: str = "",
        *,
        tls_verify: bool | None = None,
        on_progress: registries.OnProgress | None = None,
    ) -> dict[str, Any]:
        """Send an image to a registry, or to another place as ``pull`` names them. ``digest``: its manifest's."""
        return registries.push(self._call, _watching(on_progress), image, target, tls_verify)

    def tag(self, image: str, *names: str) -> None:
        """Give an image further names."""
        self._ask("tag", {"image": image, "names": list(names)})

    def inspect_image(self, image: str) -> dict[str, Any]:
        """Everything known of it."""
        found: dict[str, Any] = self._ask("image_inspect", {"images": [image]})["images"][0]
        return found

    def history(self, image: str) -> list[dict[str, Any]]:
        """How it was made, the newest step first."""
        found: list[dict[str, Any]] = self._ask("history", {"image": image})["history"]
        return found

    def save(self, images: Sequence[str], file: str | os.PathLike[str], *, format: str = "docker-archive") -> None:
        """Write images into a file, which is there whole or not at all. ``format``: or oci-archive."""
        names = [images] if isinstance(images, str) else list(images)
        with archives.target(os.fspath(file)) as descriptor:
            self._ask("save", {"images": names, "format": format}, [descriptor])

    def load(self, file: str | os.PathLike[str], *, platform: str = "") -> list[dict[str, Any]]:
        """Take in the images of an archive, Docker's or OCI's. Raises InvalidImage."""
        with archives.source(os.fspath(file)) as descriptor:
            found: list[dict[str, Any]] = self._ask("load", {"platform": platform}, [descriptor])["images"]
        return found

    def import_image(
        self,
        file: str | os.PathLike[str],
        name: str = "",
        *,
        changes: Sequence[str] = (),
        message: str = "",
        platform: str = "",
    ) -> dict[str, Any]:
        """Make an image of an archive of a root file system. ``changes``: as ``CMD ["sh"]``. Raises InvalidImage."""
        args = {"name": name, "changes": list(changes), "message": message, "platform": platform}
        with archives.source(os.fspath(file)) as descriptor:
            found: dict[str, Any] = self._ask("import", args, [descriptor])
        return found

    def bootstrap(self, image: str, *, include: Sequence[str] = (), arch: str = "") -> dict[str, Any]:
        """Make a base image."""
        found: dict[str, Any] = self._ask("bootstrap", {"image": image, "include": list(include), "arch": arch})
        return found

    def build(
        self,
        context: str | os.PathLike[str],
        *,
        file: str = "",
        on_line: Callable[[str], None] | None = None,
        **options: Unpack[BuildOptions],
    ) -> dict[str, Any]:
        """Build an image from a directory with a Containerfile; its lines go to ``on_line`` as they come.

        Raises BuildFailed, whose ``details`` are the last lines of the step that failed.
        """
        return build(self, os.fspath(context), file, on_line, options)

    def events(self, *, since_s: float | None = None, follow: bool = True) -> Iterator[dict[str, Any]]:
        """What happens, as it happens; with ``since_s`` (seconds since the epoch) beginning with the past."""
        with self._call("events", {"since_ns": int((since_s or 0) * NS), "follow": follow}) as request:
            kind, content, _ = request.next()
            while kind != "ok":
                yield content
                kind, content, _ = request.next()

    def ping(self) -> dict[str, Any]:
        """Version, process and root of the daemon."""
        found: dict[str, Any] = self._ask("ping", {})
        return found

    def shutdown(self) -> None:
        """End the daemon; environments go on."""
        self._ask("shutdown", {})

    def _logs(self, env: str, follow: bool, tail: int | None, since_ns: int) -> Iterator[logs.LogRecord]:
        directory, running = open_logs(self, env)
        ended = None
        try:
            if follow and running:
                ended = self._call("wait", {"env": env})
            fd = ended.sock.fileno() if ended else -1
            yield from logs.read(directory, follow=fd >= 0, ended=fd, lines=tail, since_ns=since_ns)
        finally:
            if ended is not None:
                ended.close()
            os.close(directory)


def open_logs(client: Client, env: str) -> tuple[int, bool]:
    """The descriptor of the environment's directory, and whether it still runs."""
    with client._call("logs", {"env": env}) as request:
        kind, content, fds = request.next()
    if kind != "ok" or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ProtocolError("the daemon did not answer with the environment's directory")
    return fds[0], bool(content.get("running"))


def build(
    client: Client, context: str, file: str, on_line: Callable[[str], None] | None, options: BuildOptions
) -> dict[str, Any]:
    """``Client.build``."""
    source = sources.source(context, file, sys.stdin.buffer)
    try:
        with client._call("build", {**sources.request(options), **source.args}, source.descriptors) as request:
            kind, content, _ = request.next()
            while kind != "ok":
                if kind == "row" and on_line is not None:
                    on_line(str(content.get("line", "")))
                kind, content, _ = request.next()
            found: dict[str, Any] = content
            return found
    finally:
        source.close()


def screenshot(client: Client, env: str) -> bytes:
    """What the environment's screen shows, as PNG."""
    with client._call("screenshot", {"env": env}) as request:
        return connect.picture(request)


def run(
    image: str, command: Sequence[str] | str = (), *, input: bytes | None = None, **options: Unpack[Options]
) -> Result:
    """Run a command in a new environment of the default root to its end, and remove that."""
    return Client().run(image, command, input=input, **options)


def _watching(on_progress: registries.OnProgress | None) -> registries.Watch:
    def watch(request: connect.Call) -> Any:
        while True:
            kind, content, _ = request.next()
            if kind == "ok":
                return content
            if kind == "progress" and on_progress is not None:
                on_progress(str(content["text"]), int(content["done"]), int(content["total"]))

    return watch


def _exit(found: Mapping[str, Any]) -> Exit:
    return Exit(
        found.get("code"),
        found.get("signal") or 0,
        bool(found.get("forced")),
        bool(found.get("oom")),
        str(found.get("reason") or ""),
    )


def _pumped(request: connect.Call, input: bytes | None, timeout_s: float | None, on_output: OnOutput | None) -> Result:
    """Wait for the stream and pump it to its end. Leaving it by an exception kills the process inside."""
    kind, content, fds = request.next()
    while kind == "progress":
        kind, content, fds = request.next()
    if kind != "stream" or len(fds) != 1:
        raise ProtocolError(f"the daemon answered with {kind} instead of a stream")
    found: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

    def take(stream: int, data: bytes) -> None:
        if on_output is not None:
            on_output(_STREAMS[stream], data)
        else:
            found[stream] += data

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fds[0])
    pump = streams.Pump(sock, key=content.get("key", ""), source=input, on_output=take, timeout_s=timeout_s)
    try:
        ending = pump.run()
    except BaseException:
        pump.signal(9, streams.SCOPE_GROUP)
        raise
    finally:
        if pump.ending is not None and pump.ending.kind == "timeout":
            pump.signal(9, streams.SCOPE_GROUP)
        sock.close()
    return _result(ending, found, timeout_s)


def _result(ending: streams.Ending, found: Mapping[int, bytearray], timeout_s: float | None) -> Result:
    if ending.kind == "timeout":
        raise DeadlineExceeded(f"the command did not end within {timeout_s:g} s and was killed", stage="exec")
    if ending.kind == "lost":
        raise Lost(ending.message)
    if ending.kind == "failed":
        raise StartFailed(ending.message)
    return Result(ending.code, bytes(found[1]), bytes(found[2]), ending.signal)
