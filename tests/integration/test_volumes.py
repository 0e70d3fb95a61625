"""Directories and files of the host made visible inside: as the caller sees them, no more."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.roots import Root

pytestmark = pytest.mark.root


@pytest.fixture
def directory() -> Iterator[Path]:
    """Below /tmp and open to all, since callers other than root go there too."""
    path = Path(tempfile.mkdtemp(prefix="isolat-v-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _run(root: Root, volume: str, script: str, *options: str, code: int = 0) -> str:
    done = root.cli("run", "--rm", "-v", volume, *options, "debian", "sh", "-c", script)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode()


def test_what_is_written_inside_belongs_to_the_caller_outside(root: Root, directory: Path) -> None:
    (directory / "in").write_text("told\n")
    said = _run(root, f"{directory}:/v", "cat /v/in; echo back > /v/out; mkdir /v/d; stat -c '%u %g' /v/in /v/out")
    assert said == "told\n0 0\n0 0\n"
    assert (directory / "out").read_text() == "back\n"
    assert {(p.stat().st_uid, p.stat().st_gid) for p in (directory / "out", directory / "d")} == {(0, 0)}


def test_read_only_means_it(root: Root, directory: Path) -> None:
    (directory / "in").write_text("told\n")
    script = (
        "cat /v/in; for c in 'touch /v/x' 'rm /v/in' 'chmod 777 /v/in'; do $c 2>/dev/null && echo did $c; done; true"
    )
    assert _run(root, f"{directory}:/v:ro", script) == "told\n"
    assert [path.name for path in directory.iterdir()] == ["in"]


def test_a_single_file(root: Root, directory: Path) -> None:
    (directory / "one").write_text("alone\n")
    assert _run(root, f"{directory}/one:/etc/one", "cat /etc/one; echo more >> /etc/one") == "alone\n"
    assert (directory / "one").read_text() == "alone\nmore\n"


def test_a_link_is_followed_when_it_is_given_and_not_later(root: Root, directory: Path) -> None:
    (directory / "real").mkdir()
    (directory / "real" / "x").write_text("real\n")
    (directory / "link").symlink_to(directory / "real")
    assert _run(root, f"{directory}/link:/v", "cat /v/x") == "real\n"


def test_a_link_inside_leads_nowhere_outside(root: Root, directory: Path) -> None:
    (directory / "escape").symlink_to("/etc/shadow")
    inside = _run(root, f"{directory}:/v", "readlink -f /v/escape; cat /v/escape")
    assert inside.splitlines()[0] == "/etc/shadow"
    assert Path("/etc/shadow").read_text() not in inside or Path("/etc/shadow").stat().st_size == 0


def test_what_does_not_exist_is_refused_before_any_effect(root: Root) -> None:
    done = root.cli("run", "-v", "/no/such/place:/v", "debian", "true")
    assert done.returncode == 125
    assert b"/no/such/place" in done.stderr
    assert root.environments() == []


def test_set_user_id_and_devices_are_powerless_in_a_volume(root: Root, directory: Path) -> None:
    shutil.copy("/usr/bin/id", directory / "id")
    (directory / "id").chmod(0o4755)
    os.mknod(directory / "null", 0o666 | 0o020000, os.makedev(1, 3))
    script = "/v/id -u; echo x > /v/null || echo no device"
    said = _run(root, f"{directory}:/v", f"{script} 2>/dev/null", "-u", "1234")
    assert said == "1234\nno device\n"


def test_a_working_directory_and_files_of_other_users_stay_theirs(root: Root, directory: Path) -> None:
    other = directory / "others"
    other.write_text("x")
    os.chown(other, 4321, 4321)
    assert _run(root, f"{directory}:/v", "stat -c %u /v/others", "-w", "/v") == "4321\n"


@pytest.fixture
def open_root(root: Root) -> Iterator[Root]:
    """A root whose socket everybody may use for a moment, as members of the group isolat may."""
    mode = root.socket.stat().st_mode & 0o777
    root.socket.chmod(0o666)
    yield root
    root.socket.chmod(mode)


CALLER = 1234


def test_an_unprivileged_callers_volume_is_theirs_on_both_sides(open_root: Root, directory: Path) -> None:
    os.chown(directory, CALLER, CALLER)
    script = "echo back > /v/out; stat -c %u /v /v/out"
    words = ("run", "--rm", "-v", f"{directory}:/v", "debian", "sh", "-c", script)
    done = open_root.cli(*words, user=CALLER, group=CALLER, extra_groups=[])
    assert (done.returncode, done.stdout) == (0, b"0\n0\n"), done.stderr
    assert (directory / "out").stat().st_uid == CALLER


def test_what_the_caller_may_not_open_is_not_opened_for_them(open_root: Root, directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir()
    (closed / "secret").write_text("secret")
    closed.chmod(0o700)
    words = ("run", "--rm", "-v", f"{closed}/secret:/v", "debian", "cat", "/v")
    done = open_root.cli(*words, user=CALLER, group=CALLER, extra_groups=[])
    assert done.returncode == 125
    assert b"secret" not in done.stdout


def test_files_of_root_stay_closed_to_an_unprivileged_caller(open_root: Root, directory: Path) -> None:
    (directory / "roots").write_text("of root")
    (directory / "roots").chmod(0o600)
    script = "cat /v/roots 2>/dev/null || echo closed; touch /v/new 2>/dev/null || echo closed"
    words = ("run", "--rm", "-v", f"{directory}:/v", "debian", "sh", "-c", script)
    done = open_root.cli(*words, user=CALLER, group=CALLER, extra_groups=[])
    assert (done.returncode, done.stdout) == (0, b"closed\nclosed\n"), done.stderr
