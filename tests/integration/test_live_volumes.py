"""Live volumes of microVMs: what happens on one side is seen on the other, and nothing else is reached."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from isolat.errors import IsolatError, Unsupported, UsageError
from isolat.qemu.sharing import SERVERS
from tests.support import traces
from tests.support.microvms import children, link, spec, status
from tests.support.roots import Root
from tests.support.wires import Cut

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not any(os.access(path, os.X_OK) for path in SERVERS), reason="no virtiofsd"),
]

CALLER = 1234
BELIEVED_S = 1.0  # for so long a guest's kernel believes what it knows of a file
# CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP: virtiofsd's own choice
CAPABILITIES = 0x880000DB
SLEEP = ("sleep", "600")


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="isolat-v-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _service(volumes: Mapping[str, str], **keys: Any) -> dict[str, Any]:
    """``volumes``: target to source; a target that ends with ``:ro`` is only read."""
    shown = [
        {
            "type": "bind" if "/" in source else "volume",
            "source": source,
            "target": target.removesuffix(":ro"),
            "read_only": target.endswith(":ro"),
        }
        for target, source in volumes.items()
    ]
    keys.setdefault("x_microvm", {"volumes": "live"})
    return spec(*keys.pop("command", SLEEP), volumes=shown, **keys)


def _started(root: Root, volumes: Mapping[str, str], **keys: Any) -> str:
    opened = [os.open(source, os.O_PATH | os.O_CLOEXEC) for source in volumes.values() if "/" in source]
    try:
        return root.run_detached(_service(volumes, **keys), opened)
    finally:
        for fd in opened:
            os.close(fd)


def _in(root: Root, id: str, script: str) -> str:
    done = root.cli("exec", id, "sh", "-c", script)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def _servers(root: Root, id: str) -> list[int]:
    """Each is two processes, of which the second serves; of both, from the keeper on."""
    keeper = int(root.ask("inspect", {"env": id})["keeper_pid"])
    first = [pid for pid in children(keeper) if "virtiofsd" in Path(f"/proc/{pid}/cmdline").read_text()]
    return [*first, *(inner for pid in first for inner in children(pid))]


def _gone(root: Root, id: str) -> None:
    left = traces.settled(lambda: [str(pid) for pid in traces.processes(id) if pid != os.getpid()], 10)
    assert left == []


SEEN = """
    cat /v/in /named/seed; echo back > /v/out; echo kept > /named/new
    cat /v/link | head -1; cat /v/far 2>/dev/null || echo far is nowhere; echo x > /v/through 2>/dev/null || true
    touch /ro/x 2>/dev/null || echo closed; mount -o remount,rw /ro 2>/dev/null; touch /ro/x 2>/dev/null || echo still
    mkdir /again && mount -t virtiofs live-1 /again && cat /again/in && touch /again/x 2>/dev/null || echo by the host
    mknod /v/null c 1 3 2>/dev/null || echo no node; cat /v/device 2>/dev/null || echo no device
    cp /usr/bin/id /v/id; chmod 4755 /v/id; setpriv --reuid 1000 --regid 1000 --clear-groups /v/id -u
    mkdir -m 777 /v/d; setpriv --reuid 1000 --regid 1000 --clear-groups touch /v/d/theirs
"""
TOLD = "told\nseed\n{host}\nfar is nowhere\nclosed\nstill\nonly read\nby the host\nno node\nno device\n1000\n"


def test_both_sides_see_what_the_other_does_and_no_more(root: Root, directory: Path) -> None:
    (directory / "rw").mkdir()
    (directory / "ro").mkdir()
    rw = directory / "rw"
    (rw / "in").write_text("told\n")
    (directory / "ro" / "in").write_text("only read\n")
    (directory / "secret").write_text("of the host\n")
    (rw / "link").symlink_to("/etc/hostname")
    (rw / "far").symlink_to(directory / "secret")
    (rw / "through").symlink_to(directory / "written")
    os.mknod(rw / "device", 0o20666, os.makedev(1, 5))
    root.ok("volume", "create", "live")
    root.ok("run", "--rm", "-v", "live:/named", "debian", "sh", "-c", "echo seed > /named/seed")

    id = _started(root, {"/v": str(rw), "/ro:ro": str(directory / "ro"), "/named": "live"}, hostname="inside")
    assert _in(root, id, SEEN) == TOLD.format(host="inside")
    assert (rw / "out").read_text() == "back\n"
    assert not (directory / "written").exists() and not list((directory / "ro").glob("x"))
    assert ((rw / "out").stat().st_uid, (rw / "d" / "theirs").stat().st_uid) == (0, 1000)
    assert root.ok("run", "--rm", "-v", "live:/named:ro", "debian", "cat", "/named/new") == "kept"

    (rw / "out").write_text("changed outside\n")
    (rw / "later").write_text("new\n")
    time.sleep(BELIEVED_S)
    assert _in(root, id, "cat /v/out /v/later") == "changed outside\nnew\n"

    with pytest.raises(Unsupported, match="can't be copied"):
        root.ask("fork", {"env": id, "names": ["copy"]})

    root.kill_daemon()
    (rw / "between").touch()
    root.start_daemon()
    assert _in(root, id, "ls /v/between; echo after > /v/after; sleep 1") == "/v/between\n"
    assert (rw / "after").read_text() == "after\n"
    root.ok("stop", "-t", "1", id)
    _gone(root, id)
    assert root.ask("inspect", {"env": id})["reason"] == ""
    root.ok("rm", id)
    assert traces.of_environment(root.path, id) == []
    root.ok("volume", "rm", "live")


def test_a_server_is_nobody_outside_and_its_end_is_the_machines_and_said(root: Root, directory: Path) -> None:
    id = _started(root, {"/v": str(directory)})
    outer, server = _servers(root, id)
    for pid in (outer, server):
        found = status(pid)
        assert min(map(int, found["Uid"].split())) >= 0x4000_0000 and found["Uid"].split() == found["Gid"].split()
        assert found["NoNewPrivs"] == "1" and found["Groups"] == ""
        for space in ("user", "mnt", "pid", "net", "ipc", "uts"):
            assert link(pid, f"ns/{space}") not in (link("self", f"ns/{space}"), link(qemu_of(root, id), f"ns/{space}"))
        assert id in Path(f"/proc/{pid}/cgroup").read_text()
    assert status(server)["Seccomp"] == "2"
    assert int(status(server)["CapEff"], 16) | CAPABILITIES == CAPABILITIES
    seen = [line.split()[4] for line in Path(f"/proc/{server}/mountinfo").read_text().splitlines()]
    assert seen == ["/"], "it sees something else than its volume"

    (directory / "in").write_text("told\n")
    os.kill(server, signal.SIGKILL)
    known = root.until_state(id, "exited", "lost")
    assert "live-0 ended with" in known["reason"]
    assert known["exit"]["code"] == 137
    _gone(root, id)


def qemu_of(root: Root, id: str) -> int:
    keeper = int(root.ask("inspect", {"env": id})["keeper_pid"])
    (pid,) = [pid for pid in children(keeper) if "qemu-system" in Path(f"/proc/{pid}/cmdline").read_text()]
    return pid


@pytest.mark.parametrize("victim", ["qemu", "keeper"])
def test_no_server_outlives_its_machine(root: Root, directory: Path, victim: str) -> None:
    id = _started(root, {"/v": str(directory)})
    servers = _servers(root, id)
    assert len(servers) == 2
    pid = qemu_of(root, id) if victim == "qemu" else int(root.ask("inspect", {"env": id})["keeper_pid"])
    assert _in(root, id, "echo kept > /v/kept") == ""
    os.kill(pid, signal.SIGKILL)
    known = root.until_state(id, "exited", "lost")
    assert "live-0" not in known["reason"]
    _gone(root, id)
    assert (directory / "kept").read_text() == "kept\n"


AS_CALLER = """
import sys, isolat
client = isolat.Client(sys.argv[1], start=False)
found = client.run("debian", ["sh", "-c", sys.argv[3]], layer="microvm", memory="128m", remove=True,
                   volumes={sys.argv[2]: "/v"}, options={"microvm": {"volumes": "live"}})
print(found.stdout.decode(), end="")
print(found.stderr.decode(), end="", file=sys.stderr)
sys.exit(found.code)
"""


def test_another_caller_has_its_own_files_and_no_more(root: Root, directory: Path) -> None:
    for name, owner, mode in (("mine", CALLER, 0o600), ("roots", 0, 0o600), ("all", 0, 0o644)):
        (directory / name).write_text(f"{name}\n")
        (directory / name).chmod(mode)
        os.chown(directory / name, owner, owner)
    os.chown(directory, CALLER, CALLER)
    script = "cat /v/mine /v/all; cat /v/roots 2>/dev/null || echo denied; stat -c %u /v/mine; echo x > /v/new; id -u"
    root.socket.chmod(0o666)
    try:
        done = subprocess.run(
            [sys.executable, "-c", AS_CALLER, str(root.path), str(directory), script],
            user=CALLER, group=CALLER, extra_groups=(), cwd="/",
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        root.socket.chmod(0o600)
    assert (done.stdout, done.stderr) == ("mine\nall\ndenied\n0\n0\n", "")
    made = (directory / "new").stat()
    assert (made.st_uid, made.st_gid) == (CALLER, CALLER)


def test_what_can_not_be_is_refused_before_anything_starts(root: Root, directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(UsageError, match="is no directory"):
        _started(root, {"/v": f"{directory}/file"})
    with pytest.raises(Unsupported, match="layer in the machine"):
        _started(root, {"/v": str(directory)}, runtime="microvm/container")
    with pytest.raises(Unsupported, match="template is true"):
        _started(root, {"/v": str(directory)}, x_microvm={"volumes": "live", "template": True})
    assert root.environments() == []


@pytest.mark.soak
def test_a_daemon_killed_at_any_step_of_the_start_leaves_no_server(fresh_root: Root, directory: Path) -> None:
    root = fresh_root
    for n in range(1, 40):
        root.start_daemon(ISOLAT_KILL_AT=str(n))
        with contextlib.suppress(Cut, IsolatError, OSError):
            _started(root, {"/v": str(directory)})
        lived = root.daemon_pid() is not None
        root.kill_daemon()  # it would die of the next step otherwise
        root.start_daemon()
        assert root.clean() == [], n
        root.kill_daemon()
        if lived:
            break
    assert 3 < n < 40
    root.start_daemon()
