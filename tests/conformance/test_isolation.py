"""The isolation table: what is visible from inside is what the declared boundary says, no less and no more."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from isolat.layers.base import Boundary
from tests.conformance.subject import Subject
from tests.support import traces
from tests.support.roots import Root

pytestmark = pytest.mark.root

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
UID_FIRST = 0x40000000


def _inside(root: Root, subject: Subject, script: str, **keys: object) -> str:
    conversation, stream, _ = root.run(subject.shell(script, **keys))
    assert stream.ended() == 0, bytes(stream.err)
    conversation.close()
    stream.close()
    return stream.out.decode().strip()


def test_processes_of_the_host(root: Root, subject: Subject) -> None:
    words = _inside(root, subject, f"tr '\\0' ' ' < /proc/{os.getpid()}/cmdline 2>/dev/null; true")
    mine = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    assert (words == mine) == (subject.can.boundary == Boundary.NONE)


@pytest.mark.applies(to=lambda s: s.can.boundary in (Boundary.NAMESPACES, Boundary.KERNEL))
def test_only_its_own_processes_are_visible(root: Root, subject: Subject) -> None:
    pids = [int(word) for word in _inside(root, subject, "cd /proc && echo [0-9]*").split()]
    assert 1 in pids
    if subject.can.boundary == Boundary.NAMESPACES:
        assert len(pids) <= 3 + len(subject.layers)


@pytest.mark.applies(to=lambda s: s.can.boundary == Boundary.NAMESPACES)
def test_namespaces(root: Root, subject: Subject) -> None:
    script = "; ".join(f"readlink /proc/self/ns/{kind}" for kind in NAMESPACES)
    found = _inside(root, subject, script).splitlines()
    for kind, inside in zip(NAMESPACES, found, strict=True):
        assert inside != str(Path(f"/proc/self/ns/{kind}").readlink()), kind


def test_the_kernel(root: Root, subject: Subject) -> None:
    """A kernel of its own has another boot id; without one it is the host's."""
    inside = _inside(root, subject, "cat /proc/sys/kernel/random/boot_id")
    same = inside == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert same == (subject.can.boundary != Boundary.KERNEL)


def test_root_inside_is_nobody_outside(root: Root, subject: Subject) -> None:
    root.run_detached(subject.spec("sleep", "86399"))
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in traces.processes("sleep 86399")}
    if subject.can.boundary == Boundary.KERNEL:
        assert owners == set()
    elif subject.can.own_uids:
        assert min(owners) >= UID_FIRST
    else:
        assert owners == {0}


@pytest.mark.applies(to=lambda s: s.outer.capabilities.machine)
def test_no_two_machines_share_a_uid(root: Root, subject: Subject) -> None:
    """The program that a machine is outside runs under a uid that nobody else has."""
    ids = [root.run_detached(subject.spec("sleep", "600")) for _ in range(2)]
    owners = []
    for id in ids:
        base = root.ask("inspect", {"env": id})["uid_base"]
        group = traces.processes("nothing of this name", f"/{id}")
        owners.append({Path(f"/proc/{pid}").stat().st_uid for pid in group})
        assert owners[-1] == {base}
        assert base >= UID_FIRST
    assert not owners[0] & owners[1]


@pytest.mark.applies(to=lambda s: not s.outer.capabilities.machine)
def test_no_two_environments_share_a_uid(root: Root, subject: Subject) -> None:
    running = root.run_detached(subject.spec("sleep", "600"))
    inside, outside, count = _inside(root, subject, "cat /proc/self/uid_map").split()
    if not subject.can.own_uids:
        assert (inside, outside) == ("0", "0")
        return
    taken = root.ask("inspect", {"env": running})["uid_base"]
    assert min(int(outside), taken) >= UID_FIRST
    assert abs(int(outside) - taken) >= int(count) == 65536


def test_the_host_name_is_its_own(root: Root, subject: Subject) -> None:
    inside = _inside(root, subject, "cat /proc/sys/kernel/hostname")
    assert (inside == socket.gethostname()) == (subject.can.boundary == Boundary.NONE)


def test_files_of_the_host(root: Root, subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    found = _inside(root, subject, f"cat {tmp_path}/secret 2>/dev/null || echo absent")
    assert (found == "secret") == (not subject.outer.capabilities.images)


@pytest.mark.applies(to=lambda s: s.can.boundary == Boundary.NAMESPACES)
def test_disks_of_the_host(root: Root, subject: Subject) -> None:
    assert _inside(root, subject, "find /dev -type b") == ""


@pytest.mark.applies(to=lambda s: s.can.boundary in (Boundary.NAMESPACES, Boundary.KERNEL))
def test_the_state_root_is_not_visible_inside(root: Root, subject: Subject) -> None:
    assert _inside(root, subject, f"ls -d {root.path} 2>/dev/null; true") == ""
