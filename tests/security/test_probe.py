"""From inside a default container an attacker finds nothing of the host and no call that escapes are made of."""

from __future__ import annotations

import ast
import base64
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.images import IMAGE
from tests.support.roots import Root

pytestmark = pytest.mark.root

HERE = Path(__file__).parent
REFUSED = {"EPERM", "ENOSYS"}
INIT = "/dev/.isolat/isolat-init"
DEVICES = {"1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:2"}
DOCKERS = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
    "NET_BIND_SERVICE": 10, "NET_RAW": 13, "SYS_CHROOT": 18, "MKNOD": 27, "AUDIT_WRITE": 29, "SETFCAP": 31,
}  # fmt: skip
DOCKER_MASK = sum(1 << number for number in DOCKERS.values())
Facts = dict[str, Any]


def _markers(directory: Path) -> list[str]:
    """The host's own root file system, whole, and a file that this test has placed on it."""
    secret = directory / "secret"
    secret.write_text("of the host\n")
    device = os.lstat("/").st_dev
    return [f"{device}:0", *(f"{os.lstat(p).st_dev}:{os.lstat(p).st_ino}" for p in (secret, Path("/etc/shadow")))]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The whole program that runs inside: Python, with the compiled attempts in it."""
    binary = tmp_path_factory.mktemp("attempts") / "attempts"
    flags = ["-static", "-O1", "-D_GNU_SOURCE", "-Wall", "-Wno-missing-field-initializers"]
    subprocess.run(["gcc", *flags, "-o", str(binary), str(HERE / "attempts.c")], check=True, timeout=60)
    inserted = f"ATTEMPTS = {base64.b64encode(binary.read_bytes()).decode()!r}\n"
    return (HERE / "probe.py").read_text().replace('ATTEMPTS = ""', inserted, 1).encode()


@pytest.fixture(scope="module", params=["run", "exec", "user"])
def facts(
    session_root: Root, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, probe: bytes
) -> Iterator[Facts]:
    """What the probe found as the application, by exec beside another one, and as an unprivileged user."""
    root, command = session_root, ["python3", "-", *_markers(tmp_path_factory.mktemp("host"))]
    base: dict[str, Any] = {"image": IMAGE, "command": command, "stdin_open": True}
    if request.param == "exec":
        id = root.run_detached({**base, "command": ["sleep", "600"]})
        stream = root.exec(id, command, stdin=True)
    else:
        base |= {"user": "1000:1000"} if request.param == "user" else {}
        conversation, stream, id = root.run(base)
        conversation.close()
    stream.write(probe)
    stream.close_stdin()
    assert stream.ended(60) == 0, bytes(stream.err)
    found: Facts = ast.literal_eval(stream.out.decode())
    found["id"], found["how"] = id, request.param
    yield found
    root.clean()


def test_no_process_of_the_host_is_visible(facts: Facts) -> None:
    words = facts["processes"].values()
    assert all(word.startswith(("python3 -", "sleep 600", INIT)) or word == "" for word in words), words
    assert len(facts["processes"]) <= 4


def test_no_file_of_the_host_is_visible_but_the_init(facts: Facts) -> None:
    assert [path for path in facts["marked"] if path != INIT] == []


def test_no_knob_of_proc_and_sys_can_be_written(facts: Facts) -> None:
    assert facts["writable"] == []


def test_devices_are_the_harmless_ones(facts: Facts) -> None:
    unusual = []
    for line in facts["devices"]:
        path, kind, numbers = line.split()
        if kind == "c" and (numbers in DEVICES or numbers.startswith("136:") or path.startswith("/dev/pts/")):
            continue
        if numbers == "0:0":  # a whiteout of the overlay
            continue
        unusual.append(line)
    assert unusual == []


def test_its_uids_are_nobodys_outside(facts: Facts, session_root: Root) -> None:
    for name in ("uid_map", "gid_map"):
        inside, outside, count = (int(word) for word in facts[name])
        assert (inside, count) == (0, 65536)
        assert outside >= 0x40000000


def test_seccomp_and_no_new_privs_are_on(facts: Facts) -> None:
    assert facts["status"]["Seccomp"] == "2"
    assert facts["status"]["NoNewPrivs"] == "1"


def test_capabilities_are_at_most_dockers(facts: Facts) -> None:
    for name in ("CapBnd", "CapPrm", "CapEff"):
        assert int(facts["status"][name], 16) & ~DOCKER_MASK == 0, name
    for name in ("CapInh", "CapAmb"):
        assert int(facts["status"][name], 16) == 0, name


def test_an_unprivileged_user_has_no_capability(facts: Facts) -> None:
    if facts["how"] == "user":
        assert {int(facts["status"][name], 16) for name in ("CapPrm", "CapEff")} == {0}
        assert facts["status"]["Groups"] in ("", "1000")


def test_only_its_streams_are_open(facts: Facts) -> None:
    assert set(facts["descriptors"]) == {"0", "1", "2"}
    assert all(target.startswith(("pipe:", "/dev/null")) for target in facts["descriptors"].values())


def test_the_calls_that_escapes_are_made_of_are_refused_before_the_kernel_looks(facts: Facts) -> None:
    said = facts["syscalls"]
    assert {name: answer for name, answer in said.items() if answer not in REFUSED} == {}
    assert len(said) >= 45


def test_there_is_no_network_but_its_own_loopback(facts: Facts) -> None:
    assert facts["networks"] == ["lo"]
    assert facts["unix"] == []


def test_what_is_masked_tells_nothing(facts: Facts) -> None:
    for path, text in facts["masked"].items():
        assert text in ("", "(EACCES)", "(EPERM)", "(ENOENT)", "(EIO)"), path


def test_the_hosts_environment_does_not_leak(facts: Facts) -> None:
    assert set(facts["environment"]) <= {"PATH", "HOME", "HOSTNAME", "TERM", "LC_CTYPE"}


def test_proc_and_sys_are_mounted_without_rights(facts: Facts) -> None:
    options = {line.split()[4]: set(line.split()[5].split(",")) for line in facts["mounts"]}
    assert {"nosuid", "nodev", "noexec"} <= options["/proc"] & options["/sys"]
    read_only = ("/sys", "/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus")
    assert all("ro" in options[path] for path in read_only if path in options)
    assert "/proc/sys" in options


def test_the_control_group_shows_nothing_of_the_host(facts: Facts) -> None:
    assert all(line.split(":", 2)[2].count("/") == 1 or "isolat" not in line for line in facts["cgroup"])


def test_no_two_environments_share_a_uid(root: Root) -> None:
    spec = {"image": IMAGE, "command": ["sleep", "600"]}
    bases = [root.ask("inspect", {"env": root.run_detached(spec)})["uid_base"] for _ in range(4)]
    assert len({base // 65536 for base in bases}) == 4
