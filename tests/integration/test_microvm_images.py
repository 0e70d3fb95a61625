"""Templates of images: made behind the first run, cloned by the next, and nobody's but the image's."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_microvm import IDENTITY, LAYER, differ, told_right
from tests.support.microvms import children, machines, memory_of, qemu, spec, status, template_memory
from tests.support.roots import Root, clean_root, private_root
from tests.support.traces import processes

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def module_root() -> Iterator[Root]:
    with private_root() as root:
        root.start_daemon()
        yield root


@pytest.fixture
def root(module_root: Root) -> Iterator[Root]:
    with clean_root(module_root) as found:
        yield found


def of_images(root: Root) -> list[dict[str, Any]]:
    return [row for row in root.ask("templates")["templates"] if row["image"]]


def _made(row: dict[str, Any]) -> tuple[str, int]:
    """One that is made anew has the same id."""
    return row["id"], row["created_ns"]


def until_made(root: Root, *more: str, seconds: float = 40) -> dict[str, Any]:
    """Run it until there is a template of it, and tell which one that is."""
    before = {_made(row) for row in of_images(root)}
    root.ok("run", "--rm", *LAYER, *more, "debian", "true")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [row for row in of_images(root) if _made(row) not in before]
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"no template of the image after {seconds} s\n{root.log()[-2000:]}")


@pytest.fixture
def template(root: Root) -> dict[str, Any]:
    return next(iter(of_images(root)), None) or until_made(root)


def _exec(root: Root, id: str, script: str) -> str:
    stream = root.exec(id, ["sh", "-c", script])
    assert stream.ended() == 0, bytes(stream.err)
    stream.close()
    return stream.out.decode()


def _is_clone_of(root: Root, id: str, template: dict[str, Any]) -> bool:
    return memory_of(qemu(root, id)).stat().st_ino == template_memory(root, template["key"]).stat().st_ino


def test_it_is_made_under_a_uid_of_its_own() -> None:
    with private_root() as root:
        root.start_daemon()
        makers: set[str] = set()
        with ThreadPoolExecutor() as beside:
            running = beside.submit(root.run_detached, spec("sleep", "600"))
            while not running.done():
                makers |= _makers(root)
        assert makers - {"0\t0\t0\t0"}
        assert status(qemu(root, running.result()))["Uid"] not in makers


def _makers(root: Root) -> set[str]:
    """The uids of the QEMUs of which a template is being made just now."""
    found = set()
    for keeper in processes(f"{root.path}/templates/"):
        with contextlib.suppress(OSError):
            told = [status(pid) for pid in children(keeper)]
            found |= {one["Uid"] for one in told if one["Name"].startswith("qemu")}
    return found


def test_the_next_run_is_a_clone_of_it(root: Root, template: dict[str, Any]) -> None:
    id = root.run_detached(spec("sleep", "600"))
    assert _is_clone_of(root, id, template)
    assert _exec(root, id, "cat /etc/hostname; tail -1 /etc/hosts; cat /etc/resolv.conf").split() == [
        id[:12], "127.0.1.1", id[:12],
    ]  # fmt: skip


def test_clones_of_it_differ_and_have_the_right_time(root: Root, template: dict[str, Any]) -> None:
    ids = [root.run_detached(spec("sleep", "600")) for _ in range(2)]
    assert all(_is_clone_of(root, id, template) for id in ids)
    said = [_exec(root, id, IDENTITY) for id in ids]
    for one in said:
        told_right(one)
    differ(*said)


def test_each_writes_to_a_disk_of_its_own(root: Root, template: dict[str, Any]) -> None:
    one, two = (root.run_detached(spec("sleep", "600")) for _ in range(2))
    _exec(root, one, "echo mine > /root/mine; echo changed > /etc/hostname; rm /etc/debian_version; sync")
    look = "ls /root; ls /etc/debian_version; cat /etc/hostname; true"
    assert _exec(root, two, look).split() == ["/etc/debian_version", two[:12]]
    assert _exec(root, one, look).split() == ["mine", "changed"]


def test_nothing_of_its_making_is_left_in_a_clone(root: Root, template: dict[str, Any]) -> None:
    """No process, and no file that the image does not have but where things are mounted, and the names."""
    id = root.run_detached(spec("sleep", "600"))
    users = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done"
    said = [line.split()[0] for line in _exec(root, id, users).splitlines() if line]
    assert said == ["/init", "sleep", "sh", "tr"] or sorted(said) == ["/init", "sh", "sleep"], said
    new = _exec(root, id, "find / -xdev -newermt '-2 hours' ! -type d").split()
    assert sorted(new) == [f"/etc/{name}" for name in NAMES]


NAMES = ("hostname", "hosts", "machine-id", "resolv.conf")


def test_a_killed_daemon_leaves_it_and_the_next_one_lends_it(root: Root, template: dict[str, Any]) -> None:
    root.kill_daemon()
    root.start_daemon()
    assert template["id"] in [row["id"] for row in of_images(root)]
    assert _is_clone_of(root, root.run_detached(spec("sleep", "600")), template)


def test_another_file_of_the_same_image_is_not_taken_for_it(root: Root, template: dict[str, Any]) -> None:
    """What was read of the one is at other places in the other."""
    (file,) = (root.path / "images").glob("*.erofs")
    beside = file.with_name("beside")
    shutil.copyfile(file, beside)
    os.utime(beside, ns=(1, 1))
    beside.rename(file)
    made = until_made(root)
    assert _made(template) not in [_made(row) for row in of_images(root)]
    assert _is_clone_of(root, root.run_detached(spec("sleep", "600")), made)


def test_roots_that_differ_have_templates_that_differ(root: Root, template: dict[str, Any]) -> None:
    """A root that is only read has its names all the same, and a tmpfs its place."""
    made = until_made(root, "--read-only", "--tmpfs", "/scratch", "--hostname", "first")
    assert made["id"] != template["id"]
    script = "cat /etc/hostname; touch /x || echo refused; touch /scratch/x && ls /scratch"
    service = spec("sleep", "600", read_only=True, tmpfs=["/scratch"], hostname="second")
    id = root.run_detached(service)
    assert _is_clone_of(root, id, made)
    assert _exec(root, id, script).split() == ["second", "refused", "x"]


def test_none_is_made_where_none_are_wanted(fresh_root: Root) -> None:
    fresh_root.start_daemon(ISOLAT_IMAGE_TEMPLATES="0")
    for _ in range(2):
        fresh_root.ok("run", "--rm", *LAYER, "debian", "true")
    time.sleep(2)
    assert of_images(fresh_root) == []
    assert [row["image"] for row in fresh_root.ask("templates")["templates"]] == [""]
    assert machines(fresh_root) == []


def test_one_more_than_are_kept_lets_the_oldest_go(fresh_root: Root) -> None:
    fresh_root.start_daemon(ISOLAT_IMAGE_TEMPLATES="1")
    first = until_made(fresh_root)
    second = until_made(fresh_root, "--read-only")
    end = time.monotonic() + 10
    while [row["id"] for row in of_images(fresh_root)] != [second["id"]]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not list(Path(fresh_root.path, "templates").glob(f"{first['key'][:32]}*"))
