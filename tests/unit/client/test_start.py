"""Starting the daemon: readiness by a pipe, one winner, and what is said when it does not start."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from isolat.client import connect, start
from isolat.errors import DaemonUnavailable, Refused

SOURCE = Path(__file__).parents[3] / "src"
# A daemon of a few lines: it holds the root's lock, answers pings, and says when it is ready.
FAKE = f"""
import fcntl, os, socket, sys, threading, time
sys.path.insert(0, {str(SOURCE)!r})
if os.fork():
    os._exit(0)
from isolat.wire import api
root, fd = sys.argv[2], int(sys.argv[4])
with open(root + "/started", "a") as file:
    file.write(str(os.getpid()) + "\\n")
time.sleep(0.1)
lock = open(root + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
listener = socket.socket(socket.AF_UNIX)
os.chdir(root)
listener.bind("daemon.sock")
listener.listen(64)
os.write(fd, b"ok\\n")
os.close(fd)
listener.settimeout(20)
while True:
    sock, _ = listener.accept()
    message, _ = api.Receiver(sock).receive()
    api.send(sock, {{"ok": {{"pid": os.getpid(), "fds": sorted(os.listdir("/proc/self/fd")), "sid": os.getsid(0),
                            "environ": sorted(os.environ)}}}})
    sock.close()
    if message["verb"] == "shutdown":
        break
"""


def use(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(start, "command", lambda root: [sys.executable, "-I", "-S", "-c", program, "--root", root])
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_the_first_command_starts_it_and_it_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FAKE)
    monkeypatch.setenv("ISOLAT_SOMETHING", "1")
    monkeypatch.setenv("SECRET", "1")
    root = str(tmp_path / "root")
    found = connect.ask(root, "ping", {})
    assert found["sid"] != os.getsid(0)
    assert "ISOLAT_SOMETHING" in found["environ"]
    assert "SECRET" not in found["environ"]
    status = Path(f"/proc/{found['pid']}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" not in status
    assert connect.ask(root, "shutdown", {})["pid"] == found["pid"]


def test_many_at_once_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FAKE)
    root = str(tmp_path / "root")
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(connect.ask(root, "ping", {})["pid"])) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connect.ask(root, "shutdown", {})
    assert len(found) == 12
    assert len(set(found)) == 1
    assert (tmp_path / "root" / "started").read_text().split() == [str(found[0])]


def test_a_daemon_that_is_just_being_started_by_others_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loser = (
        'import os, sys; os.write(int(sys.argv[4]), b\'{"code":"conflict","message":"another daemon holds it"}\\n\')'
    )
    use(monkeypatch, loser)
    root = tmp_path / "root"
    root.mkdir()
    (root / "fake.py").write_text(FAKE)
    other = threading.Timer(
        0.3, lambda: subprocess.run([sys.executable, root / "fake.py", "--root", root, "-", "2"], check=False)
    )
    other.start()
    assert connect.ask(str(root), "ping", {})["pid"]
    connect.ask(str(root), "shutdown", {})
    other.join()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            'import os, sys; os.write(int(sys.argv[4]), b\'{"code":"refused","message":"no space","hint":"x"}\\n\')',
            "the daemon could not start: no space",
        ),
        ("raise SystemExit('broken installation')", "the daemon died while it started"),
        ("import os; os.write(3, b'nonsense\\n')", "the daemon died while it started"),
    ],
)
def test_a_daemon_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    use(monkeypatch, program)
    with pytest.raises(DaemonUnavailable) as caught:
        connect.ask(str(tmp_path / "root"), "ping", {})
    assert caught.value.message == message
    if "broken" in program:
        assert "broken installation" in caught.value.details


def test_a_daemon_that_is_late_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "import os, time; os.fork() or time.sleep(2)")
    monkeypatch.setattr(start, "START_S", 0.3)
    began = time.monotonic()
    with pytest.raises(DaemonUnavailable, match="not ready within"):
        connect.ask(str(tmp_path / "root"), "ping", {})
    assert time.monotonic() - began < 2


def test_without_root_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match="only root can start it") as caught:
        connect.ask(str(tmp_path / "root"), "ping", {})
    assert "sudo" in caught.value.hint
    assert not (tmp_path / "root").exists()


def test_a_socket_that_is_not_for_us_is_told_with_the_remedy() -> None:
    error = start.unreachable("/r", PermissionError(13, "Permission denied"))
    assert error.exit_code == 125
    assert error.message == "no right to use the daemon of /r"
    assert "group isolat" in error.hint


def test_start_false_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises((DaemonUnavailable, Refused), match="no daemon runs"):
        connect.ask(str(tmp_path), "ping", {}, start=False)


def test_a_root_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(DaemonUnavailable):
        connect.ask("/proc/nothing/here", "ping", {})


def test_long_roots_are_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FAKE)
    root = tmp_path / ("x" * 100) / ("y" * 100)
    assert connect.ask(str(root), "ping", {})["pid"]
    connect.ask(str(root), "shutdown", {})


def test_the_root_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert connect.find_root("/r") == "/r"
    assert connect.find_root("r") == f"{tmp_path}/r"
    monkeypatch.setattr("posix.environ", {b"ISOLAT_ROOT": b"/from/environment"})
    assert connect.find_root() == "/from/environment"
    monkeypatch.setattr("posix.environ", {})
    assert connect.find_root() == "/var/lib/isolat"
