"""Processes in namespaces of their own: started by clone, without a program in between."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.wireside import AGENT, Controller, Held, Refused, alive, spawn_fields, start_keeper, wait_for

from isolat.wire import codec
from isolat.wire import kinds as k

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.getuid() != 0, reason="namespaces need root")]

SH = "/bin/sh"
NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
ALL = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
NAMES = ("mnt", "uts", "ipc", "pid", "net")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root made of this machine's own directories, without a /proc."""
    root = tmp_path / "root"
    names = [n for n in ("bin", "usr", "lib", "lib64") if Path("/", n).exists()]
    for name in names:
        (root / name).mkdir(parents=True)
        subprocess.run(["mount", "--bind", f"/{name}", root / name], check=True)
    (root / "proc").mkdir()
    yield root
    for name in names:
        subprocess.run(["umount", root / name], check=True)


@pytest.fixture
def keeper(tmp_path: Path, root: Path) -> Iterator[Held]:
    held = start_keeper(tmp_path / "env")  # after the mounts: it may not see later ones
    yield held
    held.stop()


@pytest.fixture(params=["", "guest"])
def to(request: pytest.FixtureRequest, c: Controller) -> str:
    if request.param:
        shared = ["unshare", "--mount", "--propagation", "shared"]  # as in a machine
        c.spawn("guest", [*shared, str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    return str(request.param)


def links(text: bytes) -> set[str]:
    return set(text.decode().split())


def ours() -> set[str]:
    return {str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMES}


SHOW = "readlink " + " ".join(f"/proc/self/ns/{name}" for name in NAMES)


def test_every_namespace_is_its_own(c: Controller, to: str, root: Path) -> None:
    more: codec.Fields = [(k.T_SPACES, ALL), (k.T_ROOT, bytes(root))]
    result = c.run("p", [SH, "-c", SHOW], to=to, more=more)
    assert len(links(result.stdout)) == len(NAMES)
    assert not links(result.stdout) & ours()


def test_only_those_asked_for(c: Controller, to: str) -> None:
    with_uts = links(c.run("p", [SH, "-c", SHOW + "; hostname inside"], to=to, more=[(k.T_SPACES, NEWUTS)]).stdout)
    without = links(c.run("q", [SH, "-c", SHOW], to=to).stdout)
    assert len(with_uts - without) == 1
    assert os.uname().nodename != "inside"


def test_a_process_is_pid_1_and_sees_its_own_proc(c: Controller, to: str, root: Path) -> None:
    more: codec.Fields = [(k.T_SPACES, NEWPID | NEWNS), (k.T_ROOT, bytes(root))]
    result = c.run("p", [SH, "-c", "echo $$; ls -d /proc/[0-9]*; exit 3"], to=to, more=more)
    assert result.stdout.split()[:2] == [b"1", b"/proc/1"]
    assert result.code == 3
    assert not list((root / "proc").iterdir())
    assert c.run("q", ["ls", str(root / "proc")], to=to).stdout == b""  # nobody else sees that mount


def test_it_gains_no_privileges_and_needs_no_passwd(c: Controller, to: str, root: Path) -> None:
    assert not (root / "etc/passwd").exists()
    more: codec.Fields = [(k.T_SPACES, NEWPID | NEWNS), (k.T_ROOT, bytes(root)), (k.T_USER, "4242:4343")]
    script = "id -u; id -g; grep NoNewPrivs /proc/self/status"
    words = c.run("p", [SH, "-c", script], to=to, more=more).stdout.split()
    assert words == [b"4242", b"4343", b"NoNewPrivs:", b"1"]
    plain = c.run("q", ["grep", "NoNewPrivs", "/proc/self/status"], to=to).stdout.split()
    assert plain == [b"NoNewPrivs:", b"0"]


def test_its_children_end_with_it(c: Controller, to: str, root: Path) -> None:
    more: codec.Fields = [(k.T_SPACES, NEWPID | NEWNS), (k.T_ROOT, bytes(root))]
    result = c.run("p", [SH, "-c", "sleep 60 & exit 2"], to=to, more=more)
    assert result.code == 2


def test_a_terminal_and_signals(c: Controller, to: str) -> None:
    client = c.adopt(f"{to}/p" if to else "p", stdin=True)
    script = "trap 'exit 9' TERM; tty; echo ready; while :; do sleep 0.05; done"
    c.spawn("p", [SH, "-c", script], to=to, flags=k.F_TTY | k.F_STDIN, more=[(k.T_SPACES, NEWPID | NEWIPC)])
    client.read_until(b"ready")
    client.send(k.SIGNAL, [(k.T_SIGNAL, 15)])
    assert client.finish().code == 9
    client.close()


def test_failures_have_their_stage(c: Controller, to: str, tmp_path: Path) -> None:
    both: codec.Fields = [(k.T_SPACES, NEWPID | NEWNS)]
    for stage, more in (("proc", [*both, (k.T_ROOT, bytes(tmp_path))]), ("exec", both)):
        with pytest.raises(Refused) as info:
            c.spawn("p", ["/no/such"], to=to, more=more)
        assert info.value.stage == stage
    assert c.run("p", ["true"], to=to, more=both).code == 0


@pytest.mark.parametrize("spaces", [NEWPID, ALL])
def test_it_dies_with_its_keeper(keeper: Held, root: Path, spaces: int) -> None:
    """PID 1 of a namespace is spared most signals, but not its parent's last one."""
    more: codec.Fields = [(k.T_SPACES, spaces), (k.T_USER, "4242:4343")]
    if spaces & NEWNS:
        more.append((k.T_ROOT, bytes(root)))
    pid = keeper.c.spawn("p", [SH, "-c", "trap '' TERM; sleep 60; true"], more=more)
    assert alive(pid)
    keeper.kill()
    wait_for(lambda: not alive(pid), "its end")


def test_it_is_not_started_when_its_keeper_has_died_meanwhile(keeper: Held, tmp_path: Path) -> None:
    """It sees no parent in its namespace whose change it could notice."""
    fifo = tmp_path / "fifo"  # where a control group's file is expected: its opening lasts until somebody reads
    os.mkfifo(fifo)
    keeper.c.hello()
    more: codec.Fields = [(k.T_SPACES, NEWPID), (k.T_CGROUP, bytes(fifo))]
    keeper.c.send(k.SPAWN, spawn_fields("p", ["sleep", "60"], more=more))
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
    wait_for(children.read_text, "the child")
    pid = int(children.read_text())
    keeper.kill()
    assert alive(pid)
    assert fifo.read_bytes() == b"0"
    wait_for(lambda: not alive(pid), "its end")
