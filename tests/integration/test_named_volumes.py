"""Named volumes: bounded, shared with right owners, kept until they are removed, and never half there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.client.sdk import Client
from isolat.errors import Conflict, IsolatError, NotFound, StoreError
from tests.support.images import IMAGE
from tests.support.microvms import spec as machine
from tests.support.roots import Root, plain_environment
from tests.support.wires import Cut

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20
CALLER = 1234
MACHINE = ("--layer", "microvm", "-m", "128m")
MAKE_SUBVOLUME = """
import fcntl, os, struct
try:
    fcntl.ioctl(os.open("/data", os.O_RDONLY), 0x5000940E, bytearray(struct.pack("<q4088s", 0, b"nested")))
except OSError as error:
    print(error.strerror)
"""


@pytest.fixture
def root(root: Root) -> Iterator[Root]:
    """The shared root; afterwards nothing is left of volumes either."""
    yield root
    _nothing_left(root)


def _nothing_left(root: Root) -> None:
    root.close_all()
    root.remove_all()
    assert root.ask("check")["problems"] == []
    root.ask("volume_prune")
    assert root.ask("volumes")["volumes"] == []
    assert not _entries(root.path / "volumes") | _entries(root.path / "pool/volumes")


def _names(root: Root) -> list[str]:
    return [row["name"] for row in root.ask("volumes")["volumes"]]


def _run(root: Root, *words: str, code: int = 0) -> str:
    done = root.cli("run", "--rm", *words)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode()


def _shell(root: Root, volume: str, script: str, *options: str, code: int = 0) -> str:
    return _run(root, "-v", volume, *options, "debian", "sh", "-c", script, code=code)


def _on_disk(root: Root, name: str) -> Path:
    return root.path / "pool" / "volumes" / name


# made, looked at, removed


def test_made_used_and_removed(root: Root) -> None:
    assert root.ok("volume", "create", "data", "--size", "32m", "--label", "of=test", "--label", "bare") == "data"
    assert _shell(root, "data:/data", "echo kept > /data/x; stat -c '%u %g %a' /data") == "0 0 755\n"
    assert _shell(root, "data:/data:ro", "cat /data/x; touch /data/y 2>/dev/null || echo closed") == "kept\nclosed\n"
    (found,) = json.loads(root.ok("volume", "inspect", "data"))
    assert (found["size_bytes"], found["labels"], found["used_by"]) == (32 * MIB, {"of": "test", "bare": ""}, [])
    assert 0 < found["used_bytes"] < MIB
    assert root.ok("volume", "ls", "-q") == "data"
    assert "32.0 MiB" in root.ok("volume", "ls")
    assert root.ok("volume", "rm", "data") == "data"
    assert root.cli("volume", "rm", "data").returncode == 125
    assert root.ok("volume", "rm", "-f", "data") == "data"
    assert not _on_disk(root, "data").exists()


def test_without_a_name_it_has_one_and_the_same_name_again_is_the_same_volume(root: Root) -> None:
    name = root.ok("volume", "create")
    assert _names(root) == [name]
    assert root.ok("volume", "create", name) == root.ok("volume", "create", name, "--size", "10g") == name
    done = root.cli("volume", "create", name, "--size", "1g")
    assert (done.returncode, b"10737418240 bytes" in done.stderr) == (125, True)
    for words in (("../x",), (".x",), ("x" * 129,), ("x", "--size", "1k"), ("x", "--size", "much")):
        assert root.cli("volume", "create", *words).returncode == 125
    assert _names(root) == [name]


def test_prune_removes_what_nobody_uses_and_asks_first(root: Root) -> None:
    for name in ("used", "idle"):
        root.ok("volume", "create", name)
    root.ok("run", "--name", "user", "-v", "used:/data", "debian", "true")
    assert root.cli("volume", "prune").returncode == 125
    assert _names(root) == ["idle", "used"]
    assert json.loads(root.ok("volume", "prune", "-y", "--json"))["removed"][0]["name"] == "idle"
    assert _names(root) == ["used"]


def test_from_python(root: Root) -> None:
    client = Client(root.path)
    assert client.create_volume("data", size="32m", labels={"a": "b"})["labels"] == {"a": "b"}
    with client.run(IMAGE, ["sleep", "600"], detach=True, volumes={"data": "/data"}) as env:
        env.exec(["sh", "-c", "echo in > /data/x"]).check()
        assert [user["id"] for user in client.volume("data")["used_by"]] == [env.id]
        with pytest.raises(IsolatError, match="is used by the environment"):
            client.remove_volume("data")
    assert [row["name"] for row in client.volumes()] == ["data"]
    assert [row["name"] for row in client.prune_volumes()] == ["data"]
    client.remove_volume("data", force=True)


# its first use


def test_it_is_made_at_its_first_use_and_stays(root: Root) -> None:
    assert root.cli("run", "--plan", "-v", "new:/data", "debian", "true").returncode == 0
    assert root.cli("run", "--pull", "never", "-v", "new:/data", "nosuchimage", "true").returncode == 125
    assert root.cli("run", "--layer", "fake", "-v", "new:/data", "debian", "true").returncode == 125
    assert _names(root) == []
    assert root.cli("run", "-v", "new:/data", "debian", "/no/such/command").returncode == 127
    (found,) = root.ask("volumes")["volumes"]
    assert (found["name"], found["size_bytes"], found["used_by"]) == ("new", 10 << 30, [])


@pytest.mark.parametrize("layer", ["container", "host", "microvm"])
def test_an_empty_one_gets_what_the_image_has_there(root: Root, layer: str) -> None:
    script = "cd /etc; find . -printf '%p %y %#m %U %G %l\n' | sort"
    plain = _run(root, "debian", "sh", "-c", script).splitlines()
    ours = {"./hostname", "./hosts", "./resolv.conf", "./machine-id"}  # of each environment, not of the image
    seen = _shell(root, "etc:/etc", script, "--layer", layer, "-m", "128m").splitlines()
    assert {line for line in plain if line.split()[0] not in ours} <= set(seen)


def test_only_an_empty_one_gets_it(root: Root) -> None:
    _shell(root, "apt:/etc/apt", "rm -r /etc/apt/*; touch /etc/apt/mark")
    assert _shell(root, "apt:/etc/apt", "ls -A /etc/apt") == "mark\n"
    _shell(root, "apt:/etc/apt", "rm /etc/apt/mark")
    assert _shell(root, "apt:/else", "ls -A /else") == ""
    assert "sources.list" in _shell(root, "apt:/etc/apt", "ls -A /etc/apt")


def test_owner_and_mode_of_the_place_come_along_and_its_links_lead_nowhere_else(root: Root) -> None:
    assert _shell(root, "tmp:/var/tmp", "stat -c '%u %a' /var/tmp") == "0 1777\n"
    plain = _run(root, "debian", "sh", "-c", "readlink /sbin; ls /usr/sbin")
    assert _shell(root, "sbin:/sbin", "readlink /sbin; ls /usr/sbin") == plain


def test_what_does_not_fit_leaves_it_empty_and_is_said(root: Root) -> None:
    root.ok("volume", "create", "small", "--size", "16m")
    done = root.cli("run", "--rm", "-v", "small:/usr", "debian", "true")
    assert done.returncode == 125
    assert b"can't be put into the volume small" in done.stderr
    assert list(_on_disk(root, "small").iterdir()) == []
    assert root.environments() == []


# sharing and bounds


def test_two_containers_at_once_share_it_with_right_owners(root: Root) -> None:
    one, two = (
        root.ok("run", "-d", "-v", "data:/data", "debian", "sleep", "600"),
        root.ok("run", "-d", "-v", "data:/there", "debian", "sleep", "600"),
    )
    root.ok("exec", one, "sh", "-c", "echo one > /data/x; chown 33:44 /data/x; mkdir -m 700 /data/d")
    assert root.ok("exec", two, "sh", "-c", "cat /there/x; stat -c '%u %g' /there/x /there/d") == "one\n33 44\n0 0"
    root.ok("exec", "-u", "33", two, "sh", "-c", "echo two >> /there/x")
    assert root.ok("exec", one, "cat", "/data/x") == "one\ntwo"
    st = (_on_disk(root, "data") / "x").stat()
    assert (st.st_uid, st.st_gid) == (33, 44)
    assert _on_disk(root, "data").parent.stat().st_mode & 0o777 == 0o700


def test_the_quota_stops_its_writers_and_nobody_else(root: Root) -> None:
    for name in ("full", "other"):
        root.ok("volume", "create", name, "--size", "16m")
    fill = "head -c 32M /dev/zero > /full/x; wc -c < /full/x; echo more > /full/y && cat /full/y"
    words = ("run", "--rm", "-v", "full:/full", "-v", "other:/other", "debian", "sh", "-c")
    done = root.cli(*words, f"{fill}; head -c 8M /dev/zero > /other/x && head -c 8M /dev/zero > /x && echo fine")
    assert b"Disk quota exceeded" in done.stderr
    assert done.stdout.splitlines()[-1] == b"fine"
    assert 12 * MIB < int(done.stdout.splitlines()[0]) <= 16 * MIB
    assert _shell(root, "full:/full", "rm /full/x && echo again > /full/y && cat /full/y") == "again\n"


def test_nobody_inside_makes_a_subvolume_without_a_limit(root: Root) -> None:
    assert (
        _run(root, "-v", "data:/data", "debian", "python3", "-c", MAKE_SUBVOLUME) == "Inappropriate ioctl for device\n"
    )


def test_one_with_subvolumes_in_it_is_removed_as_well(root: Root) -> None:
    root.ok("run", "--rm", "--layer", "host", "-v", "data:/data", "debian", "python3", "-c", MAKE_SUBVOLUME)
    assert (_on_disk(root, "data") / "nested").is_dir()
    root.ok("volume", "rm", "data")


def test_what_is_used_is_not_removed_and_it_is_said_by_whom(root: Root) -> None:
    root.ok("run", "-d", "--name", "alive", "-v", "data:/data", "debian", "sleep", "600")
    root.ok("run", "--name", "ended", "-v", "data:/data:ro", "debian", "true")
    for env, state in (("alive", "running"), ("ended", "exited")):
        with pytest.raises(Conflict, match=rf"the environment {env} \({state}\)"):
            root.ask("volume_rm", {"volume": "data"})
        root.ok("rm", "-f", env)
    assert root.ask("volume_rm", {"volume": "data"})["bytes"] > 0


# machines


def test_a_machine_works_on_a_copy_that_comes_back(root: Root) -> None:
    _shell(root, "data:/data", "echo told > /data/x; chown 33:44 /data/x; touch /data/gone")
    script = "cat /data/x; stat -c '%u %g' /data/x; rm /data/gone; echo back > /data/y; chown 7:8 /data/y"
    assert _shell(root, "data:/data", script, *MACHINE) == "told\n33 44\n"
    assert _shell(root, "data:/data", "cd /data; stat -c '%n %u %g' *; cat y") == "x 33 44\ny 7 8\nback\n"
    assert _shell(root, "data:/data", "cat /data/y; stat -c %u /data/y", "--layer", "microvm/container") == "back\n7\n"


def test_who_writes_it_with_a_machine_about_has_it_alone(root: Root) -> None:
    root.ok("run", "-d", "--name", "first", *MACHINE, "-v", "data:/data", "debian", "sleep", "600")
    for layer in (MACHINE, ("--layer", "container")):
        done = root.cli("run", "--rm", *layer, "-v", "data:/data", "debian", "true")
        assert (done.returncode, b"is written by the environment first" in done.stderr) == (125, True)
        assert _shell(root, "data:/data:ro", "echo seen", *layer) == "seen\n"
    root.ok("rm", "-f", "first")
    root.ok("run", "-d", "--name", "second", "-v", "data:/data", "debian", "sleep", "600")
    done = root.cli("run", "--rm", *MACHINE, "-v", "data:/data", "debian", "true")
    assert (done.returncode, b"is written by the environment second" in done.stderr) == (125, True)
    done = root.cli("run", "--rm", *MACHINE, "-v", "data:/a", "-v", "data:/b", "debian", "true")
    assert (done.returncode, b"twice" in done.stderr) == (125, True)


def test_what_a_machine_writes_keeps_to_the_quota_and_is_never_half_there(root: Root) -> None:
    root.ok("volume", "create", "data", "--size", "16m")
    _shell(root, "data:/data", "head -c 10M /dev/urandom > /data/x; md5sum < /data/x > /data/sum")
    replace = "head -c 10M /dev/urandom > /data/x; md5sum < /data/x > /data/sum"  # both together would not fit
    assert _shell(root, "data:/data", replace, *MACHINE) == ""
    before = _shell(root, "data:/data", "cd /data; md5sum < x | cmp - sum && cat sum")
    too_much = f"{replace}; rm /data/sum; head -c 10M /dev/urandom > /data/y"
    done = root.cli("run", "--rm", *MACHINE, "-v", "data:/data", "debian", "sh", "-c", too_much)
    assert (done.returncode, b"could not be carried back" in done.stderr) == (0, True), done.stderr
    (env,) = root.environments()
    assert (root.path / "envs" / env["id"] / "volumes.tar").exists()
    assert _shell(root, "data:/data", "cd /data; ls; md5sum < x | cmp - sum && cat sum") == f"sum\nx\n{before}"


def test_another_callers_machine_writes_it_with_its_own_numbers_and_the_directory_with_the_callers(root: Root) -> None:
    mode = root.socket.stat().st_mode & 0o777
    with tempfile.TemporaryDirectory(prefix="isolat-v-", dir="/tmp") as directory:
        os.chown(directory, CALLER, CALLER)
        root.socket.chmod(0o666)
        try:
            script = "for d in /data /mine; do echo x > $d/x; stat -c '%u %g' $d/x; done; chown 33:44 /data/x"
            words = ("-v", f"{directory}:/mine", "-v", "data:/data", "debian", "sh", "-c", script)
            for layer in (MACHINE, ("--layer", "container")):
                done = root.cli("run", "--rm", *layer, *words, user=CALLER, group=CALLER, extra_groups=[])
                assert (done.returncode, done.stdout) == (0, b"0 0\n0 0\n"), done.stderr
                st, mine = (_on_disk(root, "data") / "x").stat(), (Path(directory) / "x").stat()
                assert ((st.st_uid, st.st_gid), mine.st_uid) == ((33, 44), CALLER)
                (_on_disk(root, "data") / "x").unlink()
        finally:
            root.socket.chmod(mode)


def test_a_machine_that_was_to_come_back_still_does_under_the_next_daemon(root: Root) -> None:
    root.ask("volume_create", {"name": "data", "size": "32m"})
    id = root.run_detached(machine("sh", "-c", "echo back > /data/x; exec sleep 600", volumes=["data:/data"]))
    assert root.exec(id, ["sh", "-c", "until test -s /data/x; do sleep 0.1; done"]).ended() == 0
    root.kill_daemon()
    root.start_daemon()
    done = root.cli("run", "--rm", "-v", "data:/data", "debian", "true")
    assert b"is written by" in done.stderr
    root.ok("stop", "-t", "1", id)
    assert _shell(root, "data:/data", "cat /data/x") == "back\n"


# kills


def test_it_outlives_environments_and_daemons(fresh_root: Root) -> None:
    root = fresh_root
    root.start_daemon()
    root.ok("volume", "create", "data", "--size", "16m")
    id = root.ok("run", "-d", "-v", "data:/data", "debian", "sh", "-c", "echo kept > /data/x; sleep 600")
    root.kill_daemon()
    root.start_daemon()
    with pytest.raises(Conflict, match="is used by"):
        root.ask("volume_rm", {"volume": "data"})
    assert root.ok("exec", id, "cat", "/data/x") == "kept"
    root.ok("rm", "-f", id)
    root.kill_daemon()
    subprocess.run(["umount", "-l", str(root.path / "pool")], check=True)  # as after a boot
    root.start_daemon()
    assert _shell(root, "data:/data", "cat /data/x; head -c 32M /dev/zero > /data/y || echo full") == "kept\nfull\n"
    _nothing_left(root)


def _killed_at_each(root: Root, what: Callable[[], None]) -> Iterator[int]:
    """After a daemon that was killed at this checkpoint of ``what`` a new one answers; ends once one lived."""
    for kill_at in range(1, 40):
        pid = root.start_daemon(ISOLAT_KILL_AT=str(kill_at))
        lived = False
        with contextlib.suppress(Cut):
            what()
            lived = True
        root.kill_daemon() if lived else root.daemon_gone(pid)
        root.start_daemon()
        yield kill_at
        root.kill_daemon()
        if lived:
            assert kill_at > 3
            root.start_daemon()
            return
    pytest.fail("no end")


def _entries(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def _whole_or_none(root: Root, kill_at: int) -> list[dict[str, Any]]:
    assert root.ask("check")["problems"] == [], f"killed at {kill_at}"
    found: list[dict[str, Any]] = root.ask("volumes")["volumes"]
    there = _entries(root.path / "pool/volumes")
    assert there == {row["name"] for row in found}, f"killed at {kill_at}"
    assert _entries(root.path / "volumes") == {f"{name}.json" for name in there}, f"killed at {kill_at}"
    return found


def test_a_daemon_killed_at_any_step_of_making_and_removing_leaves_one_or_none(fresh_root: Root) -> None:
    root = fresh_root

    def both() -> None:
        root.ask("volume_create", {"name": "data", "size": "32m", "labels": {"a": "b"}})
        (root.path / "pool/volumes/data/x").write_text("x")
        root.ask("volume_rm", {"volume": "data"})

    for kill_at in _killed_at_each(root, both):
        for row in _whole_or_none(root, kill_at):
            assert (row["size_bytes"], row["labels"]) == (32 * MIB, {"a": "b"})
            root.ask("volume_rm", {"volume": "data"})
        assert _whole_or_none(root, kill_at) == []


ENGINE = """
import sys
from contextlib import ExitStack
from pathlib import Path
from isolat.deadline import Deadline
from isolat.engine.paths import StateRoot
from isolat.engine.volumes import Volumes
from isolat.images.pool import Pool
from isolat.linux import mounts
from isolat.spec.model import Volume

root, image, *verbs = sys.argv[1:]
mounts.share(root)  # as the daemon does
pool = Pool(Path(root))
volumes = Volumes(StateRoot(Path(root)), pool, tuple)
pool.ensure()
volumes.start()
assert volumes.check() == [], volumes.check()
assert all(len(list(volumes.store.path(one.name).iterdir())) in (0, 200) for one in volumes.list())
for verb in verbs:
    if verb == "create":
        volumes.create("data", 32 << 20)
    elif verb == "remove":
        volumes.remove("data")
    elif verb == "full":
        assert len(list(volumes.store.path("data").iterdir())) == 200
    else:
        with volumes.claim([Volume("data", "/data")], copies=False) as claim, ExitStack() as opened:
            volumes.open(claim, (), image, Deadline(30), opened)
"""


def test_one_who_is_killed_at_any_step_of_a_first_use_leaves_no_half_of_the_images_content(fresh_root: Root) -> None:
    """The engine alone, without the environment and its many other steps."""
    root, image = fresh_root, fresh_root.path / "images" / "tree"
    (image / "data").mkdir(parents=True)
    for n in range(200):
        (image / "data" / f"{n}").write_text(f"{n}")

    def engine(*verbs: str, **env: str) -> int:
        argv = [sys.executable, "-c", ENGINE, str(root.path), str(image), *verbs]
        done = subprocess.run(argv, env={**plain_environment(), **env}, check=False, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        return done.returncode

    for before in ((), ("create",)):
        for kill_at in range(1, 20):
            engine(*before) if before else None
            code = engine("use", ISOLAT_KILL_AT=str(kill_at))
            engine("use", "full", "remove")
            if not code:
                break
        assert 3 < kill_at < 19
    shutil.rmtree(image)


def test_damage_is_told_and_the_rest_goes_on(fresh_root: Root) -> None:
    root = fresh_root
    root.start_daemon()
    for name in ("whole", "mad", "lost"):
        root.ask("volume_create", {"name": name})
    (root.path / "volumes/mad.json").write_text("{}")
    (root.path / "volumes/lost.json").unlink()
    (_on_disk(root, "lost") / "x").touch()
    root.kill_daemon()
    root.start_daemon()
    assert _names(root) == ["whole"]
    problems = "\n".join(root.ask("check")["problems"])
    assert "the description of the volume mad can't be read" in problems
    assert f"{_on_disk(root, 'lost')} has no description" in problems
    assert (_on_disk(root, "lost") / "x").exists()  # nobody's data is removed for want of a description
    with pytest.raises(StoreError, match="can't be read"):
        root.ask("volume_inspect", {"volume": "mad"})
    root.ask("volume_rm", {"volume": "mad"})
    with pytest.raises(NotFound):
        root.ask("volume_rm", {"volume": "lost"})
    (_on_disk(root, "lost") / "x").unlink()
    subprocess.run(["btrfs", "subvolume", "delete", str(_on_disk(root, "lost"))], check=True)
    _nothing_left(root)
