"""A hostile Containerfile, context or base image reaches nothing outside of its build, and harms nobody.

A RUN step is held to the very probe that the container layer is held to (test_probe.py).
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.deadline import Deadline
from isolat.images.building.sandbox import Sandbox, Settings, View
from isolat.images.image import Image, ImageConfig
from isolat.images.oci import CONFIG, LAYER, Descriptor, digest_of, dump, own_platform, write_manifest
from isolat.images.store import ImageStore
from tests.security import test_probe as container
from tests.support import builds, traces
from tests.support.builds import BASE, SMALL, build, built
from tests.support.images import IMAGE
from tests.support.roots import Root

pytestmark = pytest.mark.root

probe = container.probe
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def builder_root() -> Iterator[Root]:
    with builds.shared_root() as root:
        yield root


@pytest.fixture
def root(builder_root: Root) -> Iterator[Root]:
    """With a neighbour that must notice nothing."""
    builder_root.ensure_daemon()
    neighbour = builder_root.run_detached({"image": IMAGE, "command": ["sleep", "600"]})
    before = builder_root.daemon_pid()
    yield builder_root
    assert builder_root.state(neighbour) == "running"
    assert builder_root.daemon_pid() == before
    builder_root.remove_all()
    assert builds.left(builder_root) == []


# what a RUN step can see and do


@pytest.fixture(scope="module", params=["root", "user"])
def facts(
    builder_root: Root, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, probe: bytes
) -> Facts:
    """What the probe found in a RUN step, as root and as an unprivileged user."""
    context = tmp_path_factory.mktemp("context")
    (context / "probe.py").write_bytes(probe)
    markers = " ".join(container._markers(tmp_path_factory.mktemp("host")))
    user = "USER 1000:1000\n" if request.param == "user" else ""
    text = f"FROM {BASE}\nCOPY --chmod=644 probe.py /\n{user}RUN python3 /probe.py {markers} > /tmp/facts\n"
    os.environ["ISOLAT_TEST_SECRET"] = "of the daemon"
    image = built(builder_root, text, context=context).digest
    del os.environ["ISOLAT_TEST_SECRET"]
    found: Facts = ast.literal_eval(builder_root.ok("run", "--rm", image, "cat", "/tmp/facts"))
    found["how"] = request.param
    return found


def test_a_step_sees_no_process_but_its_own(facts: Facts) -> None:
    words = facts["processes"].values()
    assert all(word.startswith(("/bin/sh -c python3", "python3 /probe.py")) for word in words), words


def test_a_step_sees_no_file_of_the_host(facts: Facts) -> None:
    assert facts["marked"] == []


@pytest.mark.parametrize(
    "holds",
    [
        container.test_no_knob_of_proc_and_sys_can_be_written,
        container.test_devices_are_the_harmless_ones,
        container.test_seccomp_and_no_new_privs_are_on,
        container.test_capabilities_are_at_most_dockers,
        container.test_the_calls_that_escapes_are_made_of_are_refused_before_the_kernel_looks,
        container.test_there_is_no_network_but_its_own_loopback,
        container.test_what_is_masked_tells_nothing,
        container.test_proc_and_sys_are_mounted_without_rights,
        container.test_the_control_group_shows_nothing_of_the_host,
    ],
)
def test_a_step_is_held_to_what_a_container_is(facts: Facts, holds: Any) -> None:
    holds(facts)


def test_an_unprivileged_step_has_no_capability(facts: Facts) -> None:
    if facts["how"] == "user":
        assert {int(facts["status"][name], 16) for name in ("CapPrm", "CapEff")} == {0}


def test_a_steps_uids_are_nobodys_outside(facts: Facts) -> None:
    for name in ("uid_map", "gid_map"):
        inside, outside, count = (int(word) for word in facts[name])
        assert (inside, count) == (0, 65536)
        assert outside >= 0x40000000


def test_a_step_has_two_filters_and_only_its_streams(facts: Facts) -> None:
    assert int(facts["status"]["Seccomp_filters"]) >= 2
    assert set(facts["descriptors"]) == {"0", "1", "2"}
    assert set(facts["environment"]) <= {"PATH", "HOME", "HOSTNAME", "PWD", "TERM", "LC_CTYPE"}


# what it can not do

ATTEMPTS = f"""\
FROM {SMALL}
RUN for n in 1 2 3; do echo attempt; done; \\
    mount -t tmpfs x /mnt && echo BAD mounted; \\
    unshare -U true && echo BAD user; unshare -m true && echo BAD mounts; unshare -n true && echo BAD net; \\
    mknod /disk b 254 0 && echo BAD disk; mknod /kmem c 1 2 && echo BAD kmem; \\
    kill -9 -1; \\
    cat /proc/1/root/storage/graph/storage.lock /proc/1/cwd/../work 2> /dev/null && echo BAD out; \\
    echo 1 > /proc/sys/kernel/sysrq && echo BAD sysctl; echo x > /sys/kernel/mm/ksm/run && echo BAD sys; \\
    ls /isolat /work /bases && echo BAD sandbox; \\
    test -S /run/docker.sock -o -e /var/run/isolat && echo BAD socket; \\
    hostname changed && echo BAD name; true
"""


def test_what_escapes_are_made_of_fails(root: Root) -> None:
    found = build(root, ATTEMPTS)
    assert [line for line in found.lines if line.startswith("BAD")] == []


def test_a_mount_of_a_step_reaches_no_further_than_the_context(root: Root, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the context\n")
    for source in ("/etc", "../../../../etc", "/isolat", "/proc/1/root"):
        found = build(root, f"FROM {SMALL}\nRUN --mount=type=bind,source={source},target=/m ls -la /m && cat /m/*\n",
                      context=tmp_path)  # fmt: skip
        assert "root:x:0:0" not in found.text
        assert "seccomp" not in found.text
    found = built(
        root, f"FROM {SMALL}\nRUN --mount=type=bind,source=file,target=/m cat /m; ! echo x > /m\n", context=tmp_path
    )
    assert "of the context" in found.lines
    assert (tmp_path / "file").read_text() == "of the context\n"


def accept_one(server: socket.socket) -> None:
    server.accept()[0].close()


def test_no_network_unless_it_is_asked_for(root: Root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept_one, args=(server,), daemon=True).start()
        port = server.getsockname()[1]
        text = f"FROM {SMALL}\nRUN nc -w 2 127.0.0.1 {port} < /dev/null\n"
        refused = build(root, text)
        assert refused.code == 1
        assert "Connection refused" in refused.text
        assert any("hint: if it needs the network" in line for line in refused.lines)
        assert build(root, text, "--network", "host").code == 0


def test_an_add_from_elsewhere_needs_the_network_too(root: Root) -> None:
    found = build(root, "FROM scratch\nADD http://192.0.2.1/file /file\n")
    assert found.code == 1
    assert "network is unreachable" in found.text.lower()


# contexts


def test_links_in_a_context_lead_nowhere_outside_of_it(root: Root, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host\n")
    context = tmp_path / "context"
    context.mkdir()
    (context / "shadow").symlink_to("/etc/shadow")
    (context / "up").symlink_to("../secret")
    (context / "directory").symlink_to("/etc")
    (context / "machine").symlink_to("/proc/1/root/etc/shadow")
    (context / "fine").write_text("fine\n")
    hashes = Path("/etc/shadow").read_text()
    for words in ("shadow", "directory/shadow", "../../../../etc/shadow"):
        found = build(root, f"FROM {SMALL}\nCOPY {words} /got\nRUN cat /got\n", context=context)
        assert found.code != 0
        assert not any(line in hashes.splitlines() for line in found.lines)
    whole = build(
        root, f"FROM {SMALL}\nCOPY . /all/\nRUN cat /all/fine /all/up; ls /all/directory/; true\n", context=context
    )
    assert "fine" in whole.lines
    assert "of the host" not in whole.text


def test_a_context_is_only_read(root: Root, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    before = (tmp_path / "file").stat()
    built(root, f"FROM {SMALL}\nCOPY . /c/\nRUN rm /c/file\n", context=tmp_path)
    after = (tmp_path / "file").stat()
    assert (after.st_mtime_ns, after.st_uid) == (before.st_mtime_ns, before.st_uid)


def test_what_is_mounted_below_a_context_is_not_seen(root: Root) -> None:
    found = build(root, f"FROM {SMALL}\nCOPY proc /p/\nRUN ls /p | wc -l\n", context=Path("/"))
    assert "0" in found.lines, found.text


def hostile_archive() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more: int) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = kind, link, 0o6777
            entry.devmajor, entry.devminor = more.get("major", 0), more.get("minor", 0)
            tar.addfile(entry)

        add("Containerfile")
        add("../../../../../../tmp/isolat-hostile-up")
        add("/tmp/isolat-hostile-absolute")
        add("link", tarfile.SYMTYPE, "/tmp")
        add("link/isolat-hostile-through")
        add("hard", tarfile.LNKTYPE, "/etc/shadow")
        add("disk", tarfile.BLKTYPE, major=254)
        add("kmem", tarfile.CHRTYPE, major=1, minor=2)
    return target.getvalue()


def test_a_hostile_archive_is_unpacked_where_it_harms_nobody(root: Root) -> None:
    found = builds.finished(root.cli("build", "-", input=hostile_archive()))
    assert found.code != 0
    assert list(Path("/tmp").glob("isolat-hostile-*")) == []


# base images


def hostile_base(store: ImageStore) -> str:
    """An image as nobody's tool makes it: in the store as if it had been taken in, because nothing of ours does."""
    layer = hostile_archive()
    config = dump({
        "os": "linux", "architecture": own_platform().architecture, "config": {"Env": ["LD_PRELOAD=/x", "PATH=/no"]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
    })  # fmt: skip
    raw = write_manifest(
        Descriptor(CONFIG, store.blobs.put(config), len(config)),
        [Descriptor(LAYER, store.blobs.put(layer), len(layer))],
    )
    digest = hashlib.sha256(config).hexdigest()
    image = Image(digest, ImageConfig("oci"), 0, time.time_ns(), manifest=store.blobs.put(raw))
    store.file(digest).write_bytes(b"")
    (store.dir / f"{digest}.json").write_text(dump(image.description()).decode())
    store.tag(digest, ["hostile"])
    return digest


def test_a_hostile_base_harms_nobody(root: Root) -> None:
    hostile_base(ImageStore(root.path))
    found = build(root, "FROM hostile\nRUN true\n")
    assert found.code != 0
    assert list(Path("/tmp").glob("isolat-hostile-*")) == []
    root.ok("rmi", "hostile")


# taking too much


def harm(root: Root, step: str, *options: str) -> tuple[builds.Built, float]:
    """A build that takes what it can, while a neighbour is asked again and again; its slowest answer."""
    slowest = 0.0
    done: list[builds.Built] = []
    thread = threading.Thread(target=lambda: done.append(build(root, f"FROM {SMALL}\nRUN {step}\n", *options)))
    thread.start()
    neighbour = root.environments()[0]["id"]
    while thread.is_alive():
        begun = time.monotonic()
        stream = root.exec(neighbour, ["true"])
        assert stream.ended(30) == 0
        stream.close()
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.1)
    thread.join()
    return done[0], slowest


def test_a_fork_bomb_meets_its_limit(root: Root) -> None:
    found, slowest = harm(root, "f() { f & f & }; (f); sleep 2; true")
    assert slowest < 10
    assert "can't fork" in found.text or "it met its limit of processes" in found.text  # buildah may want one, too


def test_who_takes_too_much_memory_is_killed_inside(root: Root) -> None:
    found, _ = harm(root, "tail /dev/zero", "--memory", "256m")
    assert found.code == 1
    assert "was ended by a signal: killed" in found.text
    assert "memory limit of 256 MiB" in found.text


def test_who_writes_too_much_is_told_so_inside(root: Root) -> None:
    found, _ = harm(root, "cat /dev/zero > /big", "--disk", "200m")
    assert found.code == 1
    assert "quota exceeded" in found.text
    assert "200 MiB of disk" in found.text


@pytest.mark.soak
def test_who_says_too_much_is_bounded_in_memory(root: Root) -> None:
    found = build(root, f"FROM {SMALL}\nRUN head -c 20000000 /dev/zero | tr '\\\\0' x; echo; echo said\n", "--quiet")
    assert found.code == 0


# the sandbox itself, if buildah were taken over

INSIDE = r"""
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(what, result):
    if result >= 0: print("BAD", what)
def mount(source, target, kind, flags): return libc.mount(source, target, kind, flags, None)
tried("user namespace", libc.unshare(0x10000000))
tried("network namespace", libc.unshare(0x40000000))
tried("clone3", libc.syscall(435, None, 0))
tried("usr writable", mount(b"", b"/usr", None, 32 | 0x1000))
tried("root writable", mount(b"", b"/", None, 32 | 0x1000))
tried("uncovered", libc.umount2(b"/sys/fs/cgroup", 0))
tried("proc uncovered", libc.umount2(b"/proc", 2))
tried("disk", mount(b"/dev/vda", b"/tmp", b"ext4", 0))
tried("cgroup", mount(b"none", b"/tmp", b"cgroup", 0))
tried("cgroup2", mount(b"none", b"/tmp", b"cgroup2", 0))
tried("debugfs", mount(b"none", b"/tmp", b"debugfs", 0))
tried("ptrace", libc.ptrace(16, 1, 0, 0))
tried("keyring", libc.syscall(250, 1, 0))
tried("bpf", libc.syscall(321, 0, 0, 0))
tried("io_uring", libc.syscall(425, 1, 0))
tried("perf", libc.syscall(298, 0, 0, -1, -1, 0))
tried("handle", libc.syscall(304, -100, 0, 0))
for path in ("/etc/shadow", "/root/.ssh", "/home", "/var/lib/dpkg", "/boot", "/dev/vda", "/dev/kvm", "/dev/mem"):
    tried(path, 0 if os.path.exists(path) else -1)
for path in ("/proc/1/environ", "/proc/1/mem"):
    try: open(path).close(); print("BAD", path)
    except OSError: pass
for path in ("/isolat/runtime", "/etc/passwd", "/usr/bin/env", "/context/file", "/proc/sys/kernel/core_pattern"):
    try: open(path, "a").close(); print("BAD", path)
    except OSError: pass
try: os.kill(1, 9); os.kill(1, 19)
except OSError: pass
for name in ("AF_PACKET", "AF_INET"):
    try:
        sock = socket.socket(getattr(socket, name), socket.SOCK_RAW, 1); print("BAD raw", name)
    except OSError: pass
names = sorted(int(n) for n in os.listdir("/proc/self/fd"))
print("fds", names)
print("pids", sum(n.isdigit() for n in os.listdir("/proc")))
words = [l.split() for l in open("/proc/self/status")]
print({w[0][:-1]: w[1] for w in words if w[0] in ("CapBnd:", "NoNewPrivs:", "Seccomp:")})
"""


def test_in_the_sandbox_root_is_nobody(root: Root, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    fd = os.open(tmp_path, os.O_PATH)
    settings = Settings(
        root=str(root.path / "builder"), uid_base=0x7FFF0000, uid_count=65536, join=(), host_network=False,
        views=(View("/usr", "/usr"), View("context", "/context", shifted=True, descriptor=fd)),
        files={"/isolat/runtime": ("x", 0o755), "/etc/passwd": ("root:x:0:0::/:\n", 0o644)},
        environment={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    lines: list[str] = []
    with Sandbox(settings, lambda: False) as sandbox:
        code = sandbox.run(["python3", "-I", "-S", "-c", INSIDE], Deadline(30), lines.append)
        again = sandbox.run(["true"], Deadline(30), lines.append)
    os.close(fd)
    assert [line for line in lines if line.startswith("BAD")] == []
    assert (code, again) == (0, 0), lines
    assert "fds [0, 1, 2, 3]" in lines
    assert "pids 2" in lines
    status = ast.literal_eval(lines[-1])
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for number in (12, 13, 16, 17, 19, 22, 24, 25, 39):  # NET_ADMIN NET_RAW MODULE RAWIO PTRACE BOOT RESOURCE TIME BPF
        assert not int(status["CapBnd"], 16) >> number & 1
    assert (tmp_path / "file").read_text() == "x"


def tell(writing: int) -> None:
    os.write(writing, b"up")


def test_a_sandbox_whose_daemon_is_killed_is_gone_at_once(tmp_path: Path) -> None:
    """The daemon here is a process of this test's own, so that only the kernel can do it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        settings = Settings(
            root=str(tmp_path), uid_base=0x7FFE0000, uid_count=65536, join=(), host_network=False,
            views=(View("/usr", "/usr"),), files={}, environment={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        try:
            with Sandbox(settings, lambda: False) as sandbox:
                sandbox.run(["sh", "-c", "setsid sleep 7654 & setsid sleep 7654 & echo up; sleep 7654"], Deadline(60),
                            lambda line: tell(writing))  # fmt: skip
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 2) == b"up"
    os.close(reading)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert traces.settled(lambda: [str(found) for found in traces.processes("sleep 7654")], 5) == []
    assert traces.processes("isolat/images/building/inside.py") == {}
