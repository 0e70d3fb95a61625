"""What an environment has changed, told and kept: as Docker tells it, and exactly."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from isolat.client.sdk import Client
from tests.support import traces
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

SOAK = pytest.mark.soak
MACHINE = ("--layer", "microvm", "-m", "128m")
HOST = ("--layer", "host")
STACK = ("--layer", "microvm/container", "-m", "192m")

CHANGE = """
set -e
echo new > /new; chmod 4751 /new
mkdir -p /srv/deep; echo x > /srv/deep/file; ln -s ../deep /srv/deep/link; ln /srv/deep/file /srv/deep/second
echo more >> /etc/issue
rm /etc/debian_version
rm -r /etc/default; mkdir /etc/default; echo only > /etc/default/only
touch -d @1500000000.123456789 /srv/deep/file
mkdir /srv/theirs; chown 1000:2000 /srv/theirs
truncate -s 1G /srv/sparse
"""
LOOK = """
cat /new; stat -c %a /new
stat -c '%h %Y' /srv/deep/file; readlink /srv/deep/link
tail -n 1 /etc/issue
test ! -e /etc/debian_version && echo gone
ls /etc/default
stat -c %u:%g /srv/theirs
stat -c %s /srv/sparse
"""
SEEN = "new\n4751\n2 1500000000\n../deep\nmore\ngone\nonly\n1000:2000\n1073741824"


@pytest.mark.parametrize("state", ["running", "ended"])
def test_what_was_changed_is_in_the_new_image_and_nothing_else(fresh_root: Root, state: str) -> None:
    root = fresh_root
    root.ok("run", "-d", "--name", "it", "debian", "sh", "-c", f"{CHANGE}\necho ready; exec sleep 600")
    while "ready" not in root.ok("logs", "it"):
        pass
    if state == "ended":
        root.ok("kill", "it")
        root.ok("wait", "it")
    id = root.ok(
        "commit", "-q", "-m", "some words", "-a", "me", "-c", 'CMD ["cat", "/new"]', "-c", "ENV A=b", "it", "kept"
    )
    assert root.ok("run", "--rm", "kept") == "new"
    assert root.ok("run", "--rm", "kept", "sh", "-c", LOOK) == SEEN
    assert root.ok("run", "--rm", "kept", "sh", "-c", "echo $A; cat /etc/hostname | wc -l") == "b\n1"
    (told,) = json.loads(root.ok("image", "inspect", "kept"))
    assert told["id"] == f"sha256:{id}"
    history = json.loads(root.ok("image", "history", "--json", "kept"))
    assert history[0]["comment"] == "some words"
    assert len(history) == 2
    if state == "running":
        assert root.ok("exec", "it", "echo", "goes on") == "goes on"
    assert root.ok("system", "check", "--deep") == "all is well"
    root.ok("rm", "-f", "it")
    root.ok("rmi", "debian")  # what stands on it keeps its layers
    assert root.ok("run", "--rm", "kept") == "new"


def test_a_committed_image_can_be_committed_again(fresh_root: Root) -> None:
    root = fresh_root
    root.ok("run", "--name", "one", "debian", "sh", "-c", "echo 1 > /one")
    root.ok("commit", "one", "first")
    root.ok("run", "--name", "two", "first", "sh", "-c", "rm /one; echo 2 > /two")
    root.ok("commit", "two", "second")
    assert root.ok("run", "--rm", "second", "sh", "-c", "cat /two; test -e /one || echo none") == "2\nnone"
    assert root.ok("run", "--rm", "first", "cat", "/one") == "1"


def test_differences_are_told_as_docker_tells_them(root: Root) -> None:
    root.ok("run", "--name", "it", "debian", "sh", "-c", CHANGE)
    found = {path: kind for kind, path in (line.split(" ", 1) for line in root.ok("diff", "it").splitlines())}
    assert found["/new"] == "A"
    assert (found["/srv"], found["/srv/deep"], found["/srv/deep/file"]) == ("C", "A", "A")
    assert (found["/etc"], found["/etc/issue"], found["/etc/debian_version"]) == ("C", "C", "D")
    assert (found["/etc/default"], found["/etc/default/only"]) == ("C", "A")
    assert {
        kind for path, kind in found.items() if path.startswith("/etc/default/") and path != "/etc/default/only"
    } <= {"D"}
    assert not {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"} & set(found)
    assert json.loads(root.ok("diff", "--json", "it"))[0]["kind"] in "ACD"
    root.ok("rm", "it")


def test_what_can_not_be_committed_is_refused_with_its_reason(root: Root) -> None:
    root.ok("run", "--name", "it", "debian", "true")
    for words, reason in (
        (("-c", "RUN x", "it", "name"), b"--change"),
        (("it", "BAD NAME"), b"can't be the name"),
        (("nobody", "name"), b"no environment"),
    ):
        done = root.cli("commit", *words)
        assert done.returncode == 125 and reason in done.stderr, done.stderr
    root.ok("rm", "it")


@pytest.mark.parametrize("layer", [MACHINE, pytest.param(STACK, marks=SOAK), pytest.param(HOST, marks=SOAK)])
def test_what_a_machine_has_changed_is_kept_too(fresh_root: Root, layer: tuple[str, ...]) -> None:
    """Running, and when it has ended; in the machine it lies on a disk that only guests read."""
    root = fresh_root
    script = f"{CHANGE}\necho ready; exec sleep 600"
    scratch = () if "host" in layer else ("--tmpfs", "/scratch")
    root.ok("run", "-d", "--name", "it", *layer, *scratch, "debian", "sh", "-c", script)
    while "ready" not in root.ok("logs", "it"):
        time.sleep(0.05)
    running = root.ok("diff", "it").splitlines()
    assert {"A /new", "C /etc/issue", "D /etc/debian_version", "C /etc/default", "A /srv/deep/link"} <= set(running)
    assert not [line for line in running if line.endswith(("/hostname", "/hosts", "/machine-id", "/scratch", "/dev"))]
    root.ok("commit", "-q", "-c", 'CMD ["cat", "/new"]', "it", "one")
    assert root.ok("exec", "it", "echo", "goes on") == "goes on"
    root.ok("kill", "it")
    root.ok("wait", "it")
    root.ok("commit", "-q", "it", "two")
    for name in ("one", "two"):
        assert root.ok("run", "--rm", name, "sh", "-c", LOOK) == SEEN
    assert root.ok("run", "--rm", "one") == "new"
    one, two = (json.loads(root.ok("image", "inspect", name))[0]["layers"] for name in ("one", "two"))
    assert (len(one), one[:-1]) == (len(two), two[:-1])
    if layer != MACHINE:
        assert root.ok("diff", "it").splitlines() == running
        assert root.ok("system", "check", "--deep") == "all is well"


CAPABLE = r"""
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>
int main(int argc, char **argv)
{
    static const unsigned value[5] = {0x02000001, 1 << 10, 0, 0, 0};
    unsigned char found[64];
    if (argc > 2)
        return setxattr(argv[2], "security.capability", value, sizeof value, 0) ? 1 : 0;
    ssize_t n = getxattr(argv[1], "security.capability", found, sizeof found);
    for (ssize_t i = 0; i < n; i++)
        printf("%02x", found[i]);
    return n < 0;
}
"""


@pytest.fixture
def capable(tmp_path: Path) -> Path:
    """A program that gives a file a capability (`capable set FILE`), or prints those that it has."""
    (tmp_path / "capable.c").write_text(CAPABLE)
    compiler = shutil.which("musl-gcc") or "gcc"
    subprocess.run([compiler, "-static", "-o", tmp_path / "capable", tmp_path / "capable.c"], check=True)
    return tmp_path / "capable"


@pytest.mark.parametrize("layer", [(), pytest.param(MACHINE, marks=SOAK), pytest.param(STACK, marks=SOAK)])
def test_capabilities_and_owners_are_those_of_the_inside(root: Root, capable: Path, layer: tuple[str, ...]) -> None:
    """Outside they are kept with the environment's own ids, and nobody else's image has those."""
    root.ok("run", "-d", "--name", "it", *layer, "debian", "sleep", "600")
    root.ok("cp", str(capable), "it:/capable")
    root.ok("exec", "it", "sh", "-c", "cp /bin/true /able; /capable set /able; touch /theirs; chown 1000:2000 /theirs")
    value = root.ok("exec", "it", "/capable", "/able")
    assert value == "0100000200040000" + "00" * 12
    root.ok("commit", "-q", "it", "kept")
    script = "/capable /able; stat -c ' %u:%g' /theirs /able"
    assert root.ok("run", "--rm", "kept", "sh", "-c", script) == f"{value} 1000:2000\n 0:0"
    saved = root.cli("save", "--format", "oci-archive", "kept")
    with tarfile.open(fileobj=io.BytesIO(saved.stdout)) as tar:
        assert sum(member.size for member in tar if "blobs/sha256/" in member.name) > 1 << 20
    root.ok("rm", "-f", "it")
    root.ok("rmi", "kept")


def test_what_is_in_volumes_and_memory_is_not_kept(root: Root, tmp_path: Path) -> None:
    options = ("-v", f"{tmp_path}:/data/mine", "--tmpfs", "/scratch/fast")
    script = "echo x > /data/mine/x; echo x > /scratch/fast/x; echo x > /own; exec sleep 600"
    root.ok("run", "-d", "--name", "it", *options, "debian", "sh", "-c", script)
    while root.cli("exec", "it", "test", "-e", "/own").returncode:
        time.sleep(0.05)
    assert root.ok("diff", "it") == "A /own"
    root.ok("commit", "-q", "it", "kept")
    assert root.ok("run", "--rm", "kept", "sh", "-c", "ls -d /own /data /scratch 2>/dev/null || true") == "/own"
    root.ok("rm", "-f", "it")
    root.ok("rmi", "kept")


@pytest.mark.soak
def test_of_one_that_is_in_another(root: Root) -> None:
    root.ok("run", "-d", "--name", "outer", *MACHINE, "debian", "sleep", "600")
    root.ok("run", "-d", "--name", "inner", "--in", "outer", "debian", "sh", "-c", "echo own > /own; exec sleep 600")
    while root.cli("exec", "inner", "test", "-e", "/own").returncode:
        time.sleep(0.05)
    with_sdk = Client(root.path).get("inner").commit("kept", message="from inside")
    assert with_sdk["digest"]
    assert root.ok("run", "--rm", "kept", "cat", "/own") == "own"
    root.ok("rm", "-f", "outer")
    root.ok("rm", "-f", "inner")
    root.ok("rmi", "kept")


def _frozen(id: str) -> bool:
    groups = Path("/sys/fs/cgroup")
    found = [*groups.glob(f"*/isolat/*/{id}/freezer.state"), *groups.glob(f"isolat/*/{id}/cgroup.freeze")]
    assert found
    return any(path.read_text().strip() in ("FROZEN", "FREEZING", "1") for path in found)


def test_a_killed_daemon_leaves_nobody_frozen_and_nothing_half(fresh_root: Root) -> None:
    root = fresh_root
    root.start_daemon()
    script = "head -c 100000000 /dev/urandom > /big; echo ready; exec sleep 600"
    id = root.ok("run", "-d", "debian", "sh", "-c", script)
    while "ready" not in root.ok("logs", id):
        time.sleep(0.05)
    with root.popen("commit", id, "half", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 20
        while not _frozen(id):
            assert time.monotonic() < end
        root.kill_daemon()
        assert process.wait(30) == 125
    end = time.monotonic() + 20
    while _frozen(id):  # nobody has to come for that
        assert time.monotonic() < end
        time.sleep(0.05)
    root.start_daemon()
    assert root.ok("exec", id, "echo", "goes on") == "goes on"
    assert "half" not in root.ok("images")
    assert [path.name for path in (root.path / "images/tmp").iterdir()] == []
    assert root.ok("system", "check") == "all is well"
    root.ok("commit", "-q", id, "whole")
    assert not _frozen(id)


def test_a_killed_keeper_leaves_nobody_frozen_either(root: Root) -> None:
    """What is frozen can't even die: it has to be thawed first, by whoever ends it."""
    script = "head -c 60000000 /dev/urandom > /big; echo ready; exec sleep 600"
    id = root.ok("run", "-d", "debian", "sh", "-c", script)
    while "ready" not in root.ok("logs", id):
        time.sleep(0.05)
    keeper = int(root.ask("inspect", {"env": id})["keeper_pid"])
    with root.popen("commit", id, "unmade", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not _frozen(id):
            pass
        os.kill(keeper, signal.SIGKILL)
        assert process.wait(30) == 125
    root.until_state(id, "lost")
    root.ok("rm", id)
    assert "unmade" not in root.ok("images")


def test_who_does_not_wait_for_it_gets_none(root: Root) -> None:
    script = "head -c 90000000 /dev/urandom > /big; echo ready; exec sleep 600"
    id = root.ok("run", "-d", "debian", "sh", "-c", script)
    while "ready" not in root.ok("logs", id):
        time.sleep(0.05)
    with root.popen("commit", id, "unmade", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not _frozen(id):
            pass
        process.kill()
    end = time.monotonic() + 20
    while _frozen(id) or traces.processes("--freeze"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert root.ok("exec", id, "echo", "goes on") == "goes on"
    assert "unmade" not in root.ok("images")
