"""What a layer declares is what it does; what it does not declare it refuses before any effect."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.engine.paths import StateRoot
from isolat.errors import IsolatError, Unsupported
from isolat.layers.base import CanEnter, CanShow
from isolat.layers.files import CanCopy, CanKeep
from isolat.layers.registry import LAYERS
from tests.conformance.subject import Subject
from tests.support import traces
from tests.support.images import IMAGE
from tests.support.roots import Root

pytestmark = pytest.mark.root

MIB = 1 << 20
LIMITS: dict[str, dict[str, Any]] = {
    "memory": {"mem_limit": 64 * MIB},
    "cpus": {"cpus": 0.5},
    "pids": {"pids_limit": 77},
    "disk": {"storage_opt": {"size": 32 * MIB}},
}
REFUSABLE: dict[str, dict[str, Any]] = {
    "read_only": {"read_only": True},
    "users": {"user": "1000"},
    "hostname": {"hostname": "elsewhere"},
    "tmpfs": {"tmpfs": "/scratch:size=1m"},
}


def _refused(root: Root, spec: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Refused as Unsupported, and no environment was ever made for it."""
    with pytest.raises(Unsupported) as told:
        root.ask("run", {"spec": spec, "attach": False}, fds)
    assert told.value.hint
    assert root.environments() == []
    assert traces.none_of_environments(root.path, 0) == []


def _output(root: Root, spec: dict[str, Any], fds: tuple[int, ...] = ()) -> str:
    conversation, stream, _ = root.run(spec, fds=fds)
    code = stream.ended()
    stream.close()
    assert code == 0, bytes(stream.err)
    conversation.end()  # by then it is settled: volumes that are no live ones are written
    return stream.out.decode()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A directory of the host with one file in it, and its descriptor."""
    (tmp_path / "told").write_text("from the host\n")
    fd = os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)
    yield str(tmp_path), fd
    os.close(fd)


def test_only_what_can_be_entered_declares_it(subject: Subject) -> None:
    for layer in subject.layers:
        assert isinstance(layer, CanEnter) == layer.capabilities.enter, layer.name


def test_only_what_has_a_screen_declares_it(subject: Subject) -> None:
    for layer in subject.layers:
        assert isinstance(layer, CanShow) == layer.capabilities.screen, layer.name


def test_only_what_has_files_of_its_own_declares_it(subject: Subject) -> None:
    for layer in subject.layers:
        assert isinstance(layer, CanCopy) == layer.capabilities.copies, layer.name
        assert isinstance(layer, CanKeep) == layer.capabilities.apart, layer.name


@pytest.mark.parametrize("verb", ["copy_out", "export", "diff", "commit"])
@pytest.mark.applies(to=lambda s, verb: not (s.can.copies if verb in ("copy_out", "export") else s.can.apart))
def test_what_has_no_files_of_its_own_says_so(root: Root, subject: Subject, verb: str) -> None:
    id = root.run_detached(subject.spec("sleep", "600"))
    more = {"path": "/", "name": "0"} if verb == "copy_out" else {}
    with pytest.raises(Unsupported) as told:
        root.ask(verb, {"env": id, **more})
    assert told.value.hint


@pytest.mark.applies(to=lambda s: not s.can.screen)
def test_what_has_no_screen_says_so(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.spec("sleep", "600"))
    with pytest.raises(Unsupported) as told:
        root.ask("screenshot", {"env": id})
    assert told.value.hint


@pytest.mark.applies(to=lambda s: s.can.boots)
def test_an_image_that_cannot_boot_is_refused(root: Root, subject: Subject) -> None:
    _refused(root, {**subject.spec("true"), "image": IMAGE})


def test_what_is_not_implemented_is_not_declared(subject: Subject) -> None:
    for layer in subject.layers:
        can = layer.capabilities
        for name in ("pause", "snapshot", "resize"):
            assert getattr(can, name) == hasattr(layer, name), f"{layer.name}: {name}"


def test_the_layer_is_in_the_registry_under_its_own_name(subject: Subject) -> None:
    for layer in subject.layers:
        assert LAYERS[layer.name] is layer


@pytest.mark.parametrize("name", sorted(REFUSABLE))
@pytest.mark.applies(to=lambda s, name: not getattr(s.can, name))
def test_what_is_not_declared_is_refused_before_any_effect(root: Root, subject: Subject, name: str) -> None:
    _refused(root, subject.spec("true", **REFUSABLE[name]))


@pytest.mark.applies(to=lambda s: not s.can.volumes)
def test_volumes_that_are_not_declared_are_refused(root: Root, subject: Subject, directory: tuple[str, int]) -> None:
    path, fd = directory
    _refused(root, subject.spec("true", volumes=[f"{path}:/vol"]), (fd,))


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.applies(to=lambda s, name: name not in s.can.limits)
def test_a_limit_that_is_not_declared_is_refused(root: Root, subject: Subject, name: str) -> None:
    _refused(root, subject.spec("true", **LIMITS[name]))


@pytest.mark.parametrize("network", ["none", "host"])
def test_networks_are_as_declared(root: Root, subject: Subject, network: str) -> None:
    spec = subject.shell("ls /sys/class/net", network_mode=network)
    if network not in subject.can.networks:
        _refused(root, spec)
    elif network == "none" and subject.layers[-1].capabilities.machine:
        # A machine has a card at which nothing is plugged: no route, and down. A slow system may not know it yet.
        script = "cat /proc/net/route; cat /sys/class/net/[!l]*/flags 2>/dev/null; true"
        heading, *flags = _output(root, subject.shell(script)).splitlines()
        assert heading.startswith("Iface") and set(flags) <= {"0x1002"}
    elif network == "none" and subject.can.boundary != "none":
        assert _output(root, spec) == "lo\n"
    elif network == "host":
        assert _output(root, spec).split() == sorted(path.name for path in Path("/sys/class/net").iterdir())


def test_an_option_that_the_layer_does_not_know_is_refused(root: Root, subject: Subject) -> None:
    for layer in subject.layers:
        with pytest.raises(IsolatError):
            root.ask("run", {"spec": {**subject.spec("true"), f"x-{layer.name}": {"nosuchoption": 1}}})
    assert root.environments() == []


@pytest.mark.applies(to=lambda s: s.can.read_only)
def test_a_read_only_root_cannot_be_written(root: Root, subject: Subject) -> None:
    script = "for d in / /usr /etc /var; do touch $d/x 2>/dev/null && echo wrote $d; done; echo tried"
    assert _output(root, subject.shell(script, read_only=True)) == "tried\n"


@pytest.mark.applies(to=lambda s: s.outer.capabilities.images)
def test_a_writable_root_is_the_environments_own(root: Root, subject: Subject) -> None:
    assert _output(root, subject.shell("echo mine > /usr/mark && cat /usr/mark")) == "mine\n"
    assert _output(root, subject.shell("test -e /usr/mark || echo absent")) == "absent\n"


@pytest.mark.applies(to=lambda s: s.can.hostname)
def test_the_host_name(root: Root, subject: Subject) -> None:
    script = "cat /proc/sys/kernel/hostname"
    assert _output(root, subject.shell(script, hostname="elsewhere")) == "elsewhere\n"


@pytest.mark.applies(to=lambda s: s.can.tmpfs)
def test_a_tmpfs_has_its_size(root: Root, subject: Subject) -> None:
    script = "echo x > /scratch/x && dd if=/dev/zero of=/scratch/y bs=64k count=64 2>/dev/null || wc -c < /scratch/y"
    written = int(_output(root, subject.shell(script, tmpfs="/scratch:size=1m")))
    assert 900_000 < written <= MIB


@pytest.mark.applies(to=lambda s: s.can.volumes)
def test_a_volume_is_seen_and_written_with_the_callers_ownership(
    root: Root, subject: Subject, directory: tuple[str, int]
) -> None:
    path, fd = directory
    spec = subject.shell("cat /vol/told; echo answer > /vol/answer; stat -c %u /vol/answer", volumes=[f"{path}:/vol"])
    assert _output(root, spec, (fd,)) == "from the host\n0\n"
    answer = Path(path) / "answer"
    assert answer.read_text() == "answer\n"
    assert answer.stat().st_uid == os.getuid()


@pytest.mark.applies(to=lambda s: s.can.volumes)
def test_a_volume_is_live_or_copied_as_declared(root: Root, subject: Subject, directory: tuple[str, int]) -> None:
    """Live: both sides see at once what the other does. Copied: outside sees it at the end, inside never."""
    path, fd = directory
    script = "touch /vol/inside; until test -e /vol/outside || test -e /tmp/go; do sleep 0.02; done; ls /vol"
    conversation, stream, id = root.run(subject.shell(script, volumes=[f"{path}:/vol"]), fds=(fd,))
    inside = Path(path) / "inside"
    end = time.monotonic() + (20 if subject.can.volumes_live else 1)
    while not inside.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert inside.exists() == subject.can.volumes_live
    (Path(path) / "outside").touch()
    if not subject.can.volumes_live:
        root.exec(id, ["touch", "/tmp/go"])
    assert stream.ended() == 0
    conversation.end()
    expected = b"inside\noutside\ntold\n" if subject.can.volumes_live else b"inside\ntold\n"
    assert bytes(stream.out) == expected
    assert sorted(entry.name for entry in Path(path).iterdir()) == ["inside", "outside", "told"]


@pytest.mark.applies(to=lambda s: s.can.volumes)
def test_a_read_only_volume_cannot_be_written(root: Root, subject: Subject, directory: tuple[str, int]) -> None:
    path, fd = directory
    spec = subject.shell("cat /vol/told; touch /vol/x 2>/dev/null || echo refused", volumes=[f"{path}:/vol:ro"])
    assert _output(root, spec, (fd,)) == "from the host\nrefused\n"


def _control(root: Root, id: str, name: str) -> str:
    """The value of a control group's file, of whichever hierarchy has it."""
    for group in traces.cgroups(f"{StateRoot(root.path).cgroup}/{id}"):
        for path in (Path(group) / name, Path(group) / "container" / name):
            if path.exists():
                return path.read_text().strip()
    raise AssertionError(f"{name} is in no control group of {id}")


V1 = {
    "memory": ("memory.limit_in_bytes", str(64 * MIB)),
    "pids": ("pids.max", "77"),
    "cpus": ("cpu.cfs_quota_us", "50000"),
}
V2 = {"memory": ("memory.max", str(64 * MIB)), "pids": ("pids.max", "77"), "cpus": ("cpu.max", "50000 100000")}


@pytest.mark.parametrize("name", sorted(V1))
@pytest.mark.applies(to=lambda s, name: name in s.can.limits and (not s.outer.capabilities.machine or name == "cpus"))
def test_a_declared_limit_is_the_kernels(root: Root, subject: Subject, name: str) -> None:
    id = root.run_detached(subject.spec("sleep", "600", **LIMITS[name]))
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    file, value = (V2 if unified else V1)[name]
    assert _control(root, id, file) == value


@pytest.mark.applies(to=lambda s: "memory" in s.can.limits and s.outer.capabilities.machine)
def test_a_machine_has_the_memory_that_it_was_given(root: Root, subject: Subject) -> None:
    """Inside no more than was asked for; outside that and what the machine itself needs."""
    id = root.run_detached(subject.spec("sleep", "600", mem_limit=160 * MIB))
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    assert 160 * MIB < int(_control(root, id, (V2 if unified else V1)["memory"][0])) <= 400 * MIB
    total = _output(root, subject.shell("grep MemTotal /proc/meminfo", mem_limit=160 * MIB)).split()
    assert 80 * MIB < int(total[1]) * 1024 <= 160 * MIB


@pytest.mark.applies(to=lambda s: "pids" in s.can.limits and s.outer.capabilities.machine)
def test_a_machine_bounds_its_processes(root: Root, subject: Subject) -> None:
    script = "i=0; while [ $i -lt 60 ]; do sleep 60 & i=$((i+1)); done 2>/dev/null; echo unbounded"
    conversation, stream, _ = root.run(subject.shell(f"({script}); ls -d /proc/[0-9]* | wc -l", pids_limit=20))
    stream.ended()
    conversation.close()
    assert b"unbounded" not in stream.out
    stream.close()


@pytest.mark.applies(to=lambda s: "pids" in s.can.limits and not s.outer.capabilities.machine)
def test_the_limits_count_what_runs_inside(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.spec("sleep", "600"))
    before = int(_control(root, id, "pids.current"))
    assert before >= 1
    if subject.can.enter:
        stream = root.exec(id, ["sleep", "600"])
        assert int(_control(root, id, "pids.current")) == before + 1
        stream.close()


@pytest.mark.applies(to=lambda s: "disk" in s.can.limits and not s.can.boots)
def test_a_disk_limit_bounds_what_is_written(root: Root, subject: Subject) -> None:
    script = "dd if=/dev/zero of=/var/big bs=1M count=64 2>/dev/null && sync && echo unbounded; wc -c < /var/big"
    written = int(_output(root, subject.shell(script, **LIMITS["disk"])))
    assert 16 * MIB <= written <= 33 * MIB


@pytest.mark.applies(to=lambda s: "disk" in s.can.limits and s.can.boots)
def test_a_disk_is_as_large_as_was_asked_for(root: Root, subject: Subject) -> None:
    """The image is on it, so what can be written is less."""
    script = "fallocate -l 1G /var/big 2>/dev/null && echo unbounded; stat -f -c '%b %S' /; cat /sys/block/vda/size"
    blocks, size, sectors = _output(root, subject.shell(script, storage_opt={"size": 1 << 30})).split()
    assert int(sectors) * 512 == 1 << 30
    assert 900 * MIB < int(blocks) * int(size) < 1 << 30
