"""A private state root: its daemon, its command line, and the proof that nothing is left when it is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from isolat.errors import IsolatError, NotFound
from tests.support import images, traces
from tests.support.wires import Conversation, Cut, Stream

REPOSITORY = Path(__file__).resolve().parents[2]


def program() -> str:
    """The command under test: of ``ISOLAT_BIN``, beside this Python, or of the source tree's virtual environment."""
    beside = Path(sys.executable).parent / "isolat"
    tree = REPOSITORY / ".venv" / "bin" / "isolat"
    return os.environ.get("ISOLAT_BIN") or str(beside if beside.exists() else tree)


def plain_environment() -> dict[str, str]:
    """This process's environment without anything that would change what Isolat does.

    No machines in advance: a test that proves that nothing is left would find them.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ISOLAT_")}
    libexec = os.environ.get("ISOLAT_LIBEXEC")
    return {**kept, "ISOLAT_WARM": "0", **({"ISOLAT_LIBEXEC": libexec} if libexec else {})}


class Root:
    """One state root below a short path of its own."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(tempfile.mkdtemp(prefix="isolat-t-", dir="/tmp"))
        self.path.chmod(0o711)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._opened: list[Conversation | Stream] = []

    # the daemon

    @property
    def socket(self) -> Path:
        return self.path / "daemon.sock"

    def start_daemon(self, *options: str, **env: str) -> int:
        """Start it as its client does, and wait until it answers. Its pid."""
        read, write = os.pipe()
        with (self.path / "daemon.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "isolat.daemon.main",
                    "--root",
                    str(self.path),
                    "--ready-fd",
                    str(write),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(write,),
                env={**plain_environment(), **env},
                start_new_session=True,
            )
        os.close(write)
        self._daemons.append(process)
        with open(read, "rb") as ready:
            line = ready.readline()
        if line != b"ok\n" and not env.get("ISOLAT_KILL_AT"):
            raise AssertionError(f"the daemon did not start: {line!r}\n{self.log()[-2000:]}")
        return process.pid

    def daemon_pid(self) -> int | None:
        """The pid of the daemon that answers now."""
        try:
            return int(self.ask("ping")["pid"])
        except (OSError, Cut):
            return None

    def ensure_daemon(self) -> int:
        return self.daemon_pid() or self.start_daemon()

    def kill_daemon(self) -> int | None:
        """SIGKILL to the daemon that answers now; returns once it is gone."""
        pid = self.daemon_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.daemon_gone(pid)
        return pid

    def daemon_gone(self, pid: int, seconds: float = 10) -> None:
        """Wait until this daemon has ended, reaping it when it is our child."""
        end = time.monotonic() + seconds
        while Path(f"/proc/{pid}").exists() and not self._reaped(pid):
            assert time.monotonic() < end, f"daemon {pid} did not end"
            time.sleep(0.01)

    def _reaped(self, pid: int) -> bool:
        return any(process.poll() is not None for process in self._daemons if process.pid == pid)

    def log(self) -> str:
        try:
            return (self.path / "daemon.log").read_text(errors="replace")
        except OSError:
            return ""

    # its interface

    def open(
        self, verb: str, args: Mapping[str, Any] = {}, fds: Sequence[int] = (), seconds: float = 60
    ) -> Conversation:
        conversation = Conversation(self.socket, verb, args, fds, seconds)
        self._opened.append(conversation)
        return conversation

    def ask(
        self, verb: str, args: Mapping[str, Any] = {}, fds: Sequence[int] = (), seconds: float = 60
    ) -> dict[str, Any]:
        """A request to its end. Raises the error of the tree; Cut when the daemon went away."""
        conversation = self.open(verb, args, fds, seconds)
        try:
            answer, got = conversation.end()
        finally:
            conversation.close()
        for fd in got:
            os.close(fd)
        return answer

    def run(
        self, spec: Mapping[str, Any], *, fds: Sequence[int] = (), rows: int = 0, cols: int = 0, seconds: float = 60
    ) -> tuple[Conversation, Stream, str]:
        """Run attached: the conversation that tells the end, the streams, the id."""
        args: dict[str, Any] = {"spec": spec, "attach": True, "rows": rows, "cols": cols}
        conversation = self.open("run", args, fds, seconds)
        try:
            told, stream = conversation.stream()
        except BaseException:
            conversation.close()
            raise
        self._opened.append(stream)
        return conversation, stream, str(told["id"])

    def run_detached(self, spec: Mapping[str, Any], fds: Sequence[int] = ()) -> str:
        return str(self.ask("run", {"spec": spec, "attach": False}, fds)["id"])

    def exec(self, env: str, command: Sequence[str], **args: Any) -> Stream:
        conversation = self.open("exec", {"env": env, "command": list(command), **args})
        try:
            stream = conversation.stream()[1]
        finally:
            conversation.close()
        self._opened.append(stream)
        return stream

    def environments(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("ps", {"all": True})["environments"]
        return found

    def state(self, env: str) -> str:
        return str(self.ask("inspect", {"env": env})["state"])

    def until_state(self, env: str, *states: str, seconds: float = 20) -> dict[str, Any]:
        """Wait until it is in one of these states; everything known of it."""
        end = time.monotonic() + seconds
        while True:
            known = self.ask("inspect", {"env": env})
            if known["state"] in states:
                return known
            assert time.monotonic() < end, f"{env} is {known['state']}, not {states}, after {seconds} s"
            time.sleep(0.02)

    def remove_all(self) -> None:
        for env in self.environments():
            with contextlib.suppress(NotFound):
                self.ask("rm", {"env": env["id"], "force": True})

    # its command line

    def argv(self, *words: str) -> list[str]:
        return [program(), "--root", str(self.path), *words]

    def cli(
        self, *words: str, input: bytes = b"", seconds: float = 60, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """One command to its end, with pipes."""
        return subprocess.run(
            self.argv(*words),
            input=input,
            capture_output=True,
            timeout=seconds,
            env={**plain_environment(), **(env or {})},
            check=False,
            **more,
        )

    def ok(self, *words: str, input: bytes = b"", seconds: float = 60) -> str:
        """What a command that must succeed prints, without the last newline."""
        done = self.cli(*words, input=input, seconds=seconds)
        assert done.returncode == 0, f"{words}: {done.returncode}: {done.stderr.decode()}"
        return done.stdout.decode().rstrip("\n")

    def popen(self, *words: str, **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*words), env=plain_environment(), **more)

    # its end

    def close_all(self) -> None:
        """Close every conversation and stream that a test left open."""
        while self._opened:
            self._opened.pop().close()

    def clean(self) -> list[str]:
        """Remove every environment; what is left of them."""
        self.close_all()
        self.ensure_daemon()
        self.remove_all()
        return traces.none_of_environments(self.path)

    def reset(self) -> list[str]:
        """``system reset``: the root itself is gone then. What is left of it on the machine."""
        self.close_all()
        done = self.cli("system", "reset", "--yes", seconds=120)
        said = done.stdout.decode() + done.stderr.decode()
        failed = [] if done.returncode == 0 else [f"system reset said {done.returncode}: {said}"]
        left = traces.settled(lambda: traces.of_root(self.path), 5)
        return [*failed, *left, *([f"directory {self.path}"] if self.path.exists() else [])]

    def destroy(self) -> None:
        """Whatever the test did to it: kill what is left, unmount, delete. For the ends that follow a failure too."""
        if traces.processes(str(self.path), f"/isolat/{_tag(self.path)}/"):
            with contextlib.suppress(OSError, IsolatError, Cut, AssertionError, TimeoutError):
                self.reset()
        for pid in traces.processes(str(self.path), f"/isolat/{_tag(self.path)}/"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        _unmount(self.path)
        for group in traces.cgroups(f"/isolat/{_tag(self.path)}"):
            for path in (*Path(group).iterdir(), Path(group)):
                with contextlib.suppress(OSError):
                    path.rmdir()
        shutil.rmtree(self.path, ignore_errors=True)


def _tag(path: Path) -> str:
    from isolat.engine.paths import StateRoot

    return StateRoot(path).tag


def _unmount(path: Path) -> None:
    """Everything mounted below the root, and the root itself, which its daemon makes a mount."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed([point for point in points if point == str(path) or point.startswith(f"{path}/")]):
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)


@contextlib.contextmanager
def private_root(*, image: bool = True) -> Iterator[Root]:
    """A root of its own, with the image, and the proof that nothing is left of it afterwards."""
    root = Root()
    try:
        if image:
            images.share(root.path)
            images.share_guest(root.path)
        yield root
        log = root.log()
        defects = [log[log.index("defect in") :][:4000]] if "defect in" in log else []
        left = root.reset()
        if left or defects:
            pytest.fail("left after system reset:\n" + "\n".join([*left, *defects]), pytrace=False)
    finally:
        root.destroy()


@contextlib.contextmanager
def clean_root(root: Root) -> Iterator[Root]:
    """A shared root for one test: nothing of any environment may be there before or after it."""
    root.ensure_daemon()
    seen = len(root.log())
    try:
        yield root
    finally:
        left = root.clean()
    defects = [line for line in root.log()[seen:].splitlines() if "defect in" in line]
    if left or defects:
        pytest.fail("left after the test:\n" + "\n".join([*left, *defects]), pytrace=False)
