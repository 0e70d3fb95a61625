"""Forks and snapshots of real microVMs: what goes on, what differs, what the parent notices of it (nothing)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from isolat import Client
from isolat.errors import Conflict, IllegalState, IsolatError, NotFound, Unsupported, UsageError
from tests.support.images import IMAGE
from tests.support.logs import read_log
from tests.support.microvms import MEMORY, memory_of, qemu, spec, until_parked
from tests.support.roots import Root, clean_root, private_root
from tests.support.wires import Cut

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

STOPPED_MS = 50.0
CLOCK_S = 1.0
MIB = 1 << 20
# A number in a shell's memory, told to an open file and to standard output
COUNT = "exec 3>>/root/count; i=0; while :; do echo $i >&3; echo $i; i=$((i+1)); sleep 0.05; done"
WAIT = "echo begin; while [ ! -e /root/go ]; do sleep 0.05; done; echo end $(cat /root/go); exit 7"
IDENTITY = (
    "od -An -tx1 -N16 /dev/urandom; cat /proc/sys/kernel/random/uuid /etc/machine-id; "
    "cat /proc/sys/kernel/hostname; cat /sys/class/net/eth0/address; cat /etc/hostname; date +%s.%N"
)


@pytest.fixture(scope="module")
def module_root() -> Iterator[Root]:
    with private_root() as root:
        root.start_daemon()
        yield root


@pytest.fixture
def root(module_root: Root) -> Iterator[Root]:
    with clean_root(module_root) as found:
        yield found
        for row in found.ask("snapshots")["snapshots"]:
            found.ask("snapshot_rm", {"snapshot": row["name"]})


def inside(root: Root, env: str, script: str) -> str:
    stream = root.exec(env, ["sh", "-c", script])
    code = stream.ended(60)
    assert code == 0, stream.err
    return stream.out.decode().rstrip("\n")


def fork(root: Root, env: str, count: int = 1, **more: Any) -> list[str]:
    answer = root.ask("fork", {"env": env, "count": count, **more})
    return [str(child["id"]) for child in answer["environments"]]


def counted(root: Root, env: str) -> list[int]:
    return [int(line) for line in inside(root, env, "cat /root/count 2>/dev/null || true").split()]


def counts_on(root: Root, env: str, seconds: float = 20) -> list[int]:
    """All that it has counted, once it has counted further; nothing is missing in between."""
    before = counted(root, env)
    end = time.monotonic() + seconds
    while len(now := counted(root, env)) <= len(before):
        assert time.monotonic() < end, f"{env} counts no more"
    assert now == list(range(len(now)))
    return now


@pytest.fixture
def counter(root: Root) -> str:
    env = root.run_detached(spec("sh", "-c", COUNT, tmpfs="/mem"))
    counts_on(root, env)
    return env


# forks


def test_a_child_goes_on_where_its_parent_was(root: Root, counter: str) -> None:
    inside(root, counter, "echo tmpfs >/mem/note; echo disk >/root/note; head -c 3000000 /dev/urandom >/root/big")
    digest = inside(root, counter, "sha256sum /root/big")
    before = len(counted(root, counter))
    (child,) = fork(root, counter)
    after = len(counted(root, counter))
    inside(root, counter, "echo parent >>/root/note; rm /mem/note")
    assert inside(root, child, "cat /mem/note /root/note; sha256sum /root/big") == f"tmpfs\ndisk\n{digest}"
    inside(root, child, "echo child >>/root/note")
    assert inside(root, counter, "cat /root/note") == "disk\nparent"
    assert len(counts_on(root, child)) > before
    assert len(counts_on(root, counter)) > after
    said = [int(line) for line in read_log(root.path / "envs" / child / "log", 1).split()]
    assert said == list(range(said[0], said[0] + len(said)))
    assert before <= said[0] <= after + 1


def test_children_have_their_own_identity_and_the_right_time(root: Root, counter: str) -> None:
    seen: list[list[str]] = [inside(root, counter, IDENTITY).split("\n")]
    for child in fork(root, counter, 3):
        begun = time.time()
        told = inside(root, child, IDENTITY).split("\n")
        assert begun - CLOCK_S < float(told[-1]) < time.time() + CLOCK_S
        assert told[3] == told[5] == child[:12]
        seen.append(told)
    for n, what in enumerate(("randomness", "uuid", "machine-id", "host name", "address")):
        assert len({told[n] for told in seen}) == len(seen), what


def test_a_child_is_named_in_its_hosts_file_and_keeps_what_was_added_there(root: Root, counter: str) -> None:
    inside(root, counter, "echo 10.0.0.1 other >> /etc/hosts")
    (child,) = fork(root, counter, 1)
    told = inside(root, child, "cat /etc/hosts")
    assert f"127.0.1.1\t{child[:12]}\n" in told
    assert counter[:12] not in told
    assert "10.0.0.1 other" in told
    assert counter[:12] in inside(root, counter, "cat /etc/hosts")


def test_a_machine_with_a_root_that_is_only_read_can_be_forked(root: Root) -> None:
    id = root.run_detached(spec("sleep", "600", read_only=True))
    (child,) = fork(root, id, 1)
    assert inside(root, child, "cat /etc/hostname /proc/sys/kernel/hostname").split() == [id[:12], child[:12]]


def test_a_parent_is_not_disturbed(root: Root) -> None:
    """Twenty megabytes go through it while it is forked; none is lost, doubled or cut."""
    data = random.Random(3).randbytes(MIB) * 20
    argv = root.argv("run", "-i", "--rm", "--name", "pipe", "--layer", "microvm", "-m", MEMORY, IMAGE, "cat")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(data[:1000])
        process.stdin.flush()
        digest = hashlib.sha256(process.stdout.read(1000))
        feeding = threading.Thread(target=_feed, args=(process, data[1000:]))
        feeding.start()
        children = [child for _ in range(3) for child in fork(root, "pipe")]
        digest.update(process.stdout.read())
        feeding.join()
        assert process.wait(60) == 0
    assert digest.digest() == hashlib.sha256(data).digest()
    for child in children:
        assert inside(root, child, "echo here") == "here"


def _feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    process.stdin.write(data)
    process.stdin.close()


def test_exec_sessions_go_on_in_the_parent_and_stay_in_the_child(root: Root, counter: str) -> None:
    session = root.exec(
        counter, ["sh", "-c", "echo $$; i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo $i; sleep 0.05; done"]
    )
    session.until_out(b"\n")
    pid = int(session.out.split()[0])
    (child,) = fork(root, counter)
    assert inside(root, child, f"tr '\\0' ' ' </proc/{pid}/cmdline").startswith("sh -c echo")
    assert session.ended(60) == 0
    assert session.out.split()[1:] == [b"%d" % n for n in range(1, 41)]
    again = root.exec(child, ["sh", "-c", "cat; exit 3"], stdin=True)
    again.write(b"from outside")
    again.close_stdin()
    assert again.ended(60) == 3
    assert again.out == b"from outside"


def test_a_child_has_its_own_end_and_its_own_log(root: Root) -> None:
    env = root.run_detached(spec("sh", "-c", WAIT))
    _until(lambda: root.ok("logs", env) == "begin")
    (child,) = fork(root, env)
    inside(root, child, "echo child >/root/go.new; mv /root/go.new /root/go")
    assert root.ask("wait", {"env": child})["code"] == 7
    assert root.ok("logs", child) == "end child"
    assert root.state(env) == "running"
    inside(root, env, "echo parent >/root/go.new; mv /root/go.new /root/go")
    assert root.ask("wait", {"env": env})["code"] == 7
    assert root.ok("logs", env) == "begin\nend parent"


def test_a_child_can_be_attached_to_and_typed_to(root: Root) -> None:
    env = root.run_detached(spec("sh", "-c", "read a; echo got $a; read b; echo and $b", stdin_open=True))
    inside(root, env, "true")
    (child,) = fork(root, env)
    done = root.cli("attach", child, input=b"one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, b"got one\nand two\n")


def test_forks_of_forks(root: Root, counter: str) -> None:
    env = counter
    for n in range(3):
        inside(root, env, f"echo {n} >>/mem/generations")
        (env,) = fork(root, env, name=f"generation-{n}")
        assert root.ask("inspect", {"env": env})["name"] == f"generation-{n}"
    assert inside(root, env, "cat /mem/generations") == "0\n1\n2"
    root.ask("rm", {"env": counter, "force": True})
    counts_on(root, env)


def test_a_parked_machine_is_forked_and_parks_again(root: Root) -> None:
    service = spec("sh", "-c", "mkfifo /root/f; cat /root/f", x_microvm={"park_s": 0.5})
    env = root.run_detached(service)
    until_parked(qemu(root, env))
    (child,) = fork(root, env)
    until_parked(qemu(root, env))
    assert inside(root, child, "echo here") == "here"
    until_parked(qemu(root, child))
    assert inside(root, env, "echo here") == "here"


def test_a_child_uses_its_parents_memory(root: Root, counter: str) -> None:
    """And another template is no matter: this machine's may be gone."""
    root.ask("template_prune")
    (child,) = fork(root, counter)
    assert memory_of(qemu(root, child)).stat().st_ino == memory_of(qemu(root, counter)).stat().st_ino
    counts_on(root, child)


def test_a_parent_stands_still_for_a_moment_only(root: Root, counter: str) -> None:
    least = min(float(root.ask("fork", {"env": counter})["stopped_ms"]) for _ in range(4))
    assert least <= STOPPED_MS


def test_what_can_not_be_forked_is_refused_with_its_reason(root: Root, counter: str) -> None:
    others = [
        root.run_detached({"image": IMAGE, "command": ["sleep", "600"]}),
        root.run_detached(spec("sleep", "600", mem_limit="256m", x_microvm={"template": False})),
    ]
    for env in others:
        with pytest.raises(Unsupported, match="can't be copied"):
            fork(root, env)
        with pytest.raises(Unsupported, match="can't be copied"):
            root.ask("snapshot", {"env": env, "name": "never"})
    with pytest.raises(UsageError, match="one child"):
        fork(root, counter, 2, name="two")
    name = root.ask("inspect", {"env": counter})["name"]
    with pytest.raises(Conflict, match="is taken"):
        fork(root, counter, name=name)
    root.ask("kill", {"env": counter})
    root.until_state(counter, "exited")
    with pytest.raises(IllegalState):
        fork(root, counter)
    assert len(root.environments()) == 3
    assert root.ask("snapshots")["snapshots"] == []


# snapshots


@pytest.mark.soak
def test_a_snapshot_outlives_everything_that_it_is_of(root: Root, counter: str) -> None:
    inside(root, counter, "echo tmpfs >/mem/note; echo disk >/root/note")
    root.ok("snapshot", counter, "one")
    count = len(counted(root, counter))
    root.ask("rm", {"env": counter, "force": True})
    root.ask("template_prune")
    root.kill_daemon()
    root.start_daemon()
    seen = set()
    for name in ("first", "second"):
        env = root.ok("run", "-d", "--from-snapshot", "one", "--name", name)
        assert inside(root, name, "cat /mem/note /root/note") == "tmpfs\ndisk"
        assert len(counts_on(root, env)) < count + 100
        seen.add(inside(root, env, "cat /etc/machine-id"))
    assert len(seen) == 2
    assert memory_of(qemu(root, "first")).stat().st_ino == memory_of(qemu(root, "second")).stat().st_ino
    (child,) = fork(root, "first")
    counts_on(root, child)
    (row,) = root.ask("snapshots")["snapshots"]
    assert (row["name"], row["image"], row["layer"]) == ("one", IMAGE, "microvm")
    root.ok("snapshot", "rm", "one")
    assert inside(root, "second", "cat /mem/note") == "tmpfs"


def test_run_from_a_snapshot_is_a_run(root: Root) -> None:
    env = root.run_detached(spec("sh", "-c", WAIT))
    _until(lambda: root.ok("logs", env) == "begin")
    root.ok("snapshot", env, "one")
    with subprocess.Popen(
        root.argv("run", "--rm", "--name", "again", "--from-snapshot", "one"), stdout=subprocess.PIPE
    ) as process:
        _until(lambda: root.state("again") == "running")
        inside(root, "again", "echo here >/root/go.new; mv /root/go.new /root/go")
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (7, b"end here\n")
    with pytest.raises(NotFound):
        root.ask("inspect", {"env": "again"})


def _until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(NotFound):
            if true():
                return
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_python_client_forks_and_keeps(root: Root, counter: str) -> None:
    client = Client(root.path)
    env = client.get(counter)
    children = env.fork(2)
    assert [child.exec(["cat", "/proc/sys/kernel/hostname"]).text for child in children] == [
        f"{child.id[:12]}\n" for child in children
    ]
    assert env.snapshot("kept")["name"] == "kept"
    assert [row["name"] for row in client.snapshots()] == ["kept"]
    with client.restore("kept", name="restored", remove=True) as restored:
        assert restored.exec(["true"]).code == 0
    client.remove_snapshot("kept")
    assert client.snapshots() == []


def test_a_snapshot_of_another_machine_is_refused(root: Root, counter: str) -> None:
    root.ok("snapshot", counter, "one")
    record = root.path / "snapshots/one/snapshot.json"
    good = json.loads(record.read_text())
    for change, error, words in (
        (("copy_key", "0" * 64), Unsupported, "another QEMU or other devices"),
        (("tsc_khz", 1), Unsupported, "clock counts"),
    ):
        bad = json.loads(record.read_text())
        options = dict(bad["handle"]["frames"][0]["options"]) | {change[0]: change[1]}
        bad["handle"]["frames"][0]["options"] = list(options.items())
        record.write_text(json.dumps(bad))
        with pytest.raises(error, match=words):
            root.ask("restore", {"snapshot": "one"})
        record.write_text(json.dumps(good))
    record.write_text(json.dumps({**good, "handle": {**good["handle"], "digest": "0" * 64}}))
    with pytest.raises(NotFound, match="image that is gone"):
        root.ask("restore", {"snapshot": "one"})
    record.write_text("{")
    with pytest.raises(IsolatError, match="can't be read"):
        root.ask("restore", {"snapshot": "one"})
    assert root.ask("snapshots")["snapshots"] == []
    record.write_text(json.dumps(good))
    assert len(root.environments()) == 1


def test_names_and_images_of_snapshots(root: Root, counter: str) -> None:
    root.ok("snapshot", counter, "one")
    with pytest.raises(Conflict, match="there is a snapshot"):
        root.ask("snapshot", {"env": counter, "name": "one"})
    for name in ("", "x", "../x", ".new-1", "a/b", "a" * 129):
        with pytest.raises((UsageError, NotFound)):
            root.ask("snapshot", {"env": counter, "name": name})
        with pytest.raises((UsageError, NotFound)):
            root.ask("restore", {"snapshot": name})
        with pytest.raises((UsageError, NotFound)):
            root.ask("snapshot_rm", {"snapshot": name})
    root.ask("rm", {"env": counter, "force": True})
    with pytest.raises(Conflict, match="in use"):
        root.ask("rmi", {"image": IMAGE})
    for file in (root.path / "snapshots/one").iterdir():
        assert file.stat().st_mode & 0o077 == 0
    assert (root.path / "snapshots").stat().st_mode & 0o077 == 0
    done = root.cli("run", "--from-snapshot", "one", "-m", "1g")
    assert done.returncode == 125
    assert b"can't be chosen" in done.stderr


# a daemon that is killed meanwhile


def _parent(root: Root) -> str:
    root.start_daemon()
    env = root.run_detached(spec("sh", "-c", COUNT))
    counts_on(root, env)
    return env


def _killed_at(root: Root, n: int, verb: str, args: dict[str, Any]) -> bool:
    """Ask a daemon that is killed at its nth checkpoint. False: it was not killed any more."""
    root.kill_daemon()
    root.start_daemon(ISOLAT_KILL_AT=str(n))
    try:
        root.ask(verb, args)
    except (Cut, ConnectionError, FileNotFoundError):
        root.start_daemon()
        return True
    root.kill_daemon()
    root.start_daemon()
    return False


def test_a_daemon_killed_while_it_forks_leaves_the_parent_and_whole_children(fresh_root: Root) -> None:
    root = fresh_root
    env = _parent(root)
    n = 1
    while _killed_at(root, n, "fork", {"env": env}):
        counts_on(root, env)
        for other in root.environments():
            if other["id"] != env:
                assert other["state"] == "running"
                counts_on(root, other["id"])
                root.ask("rm", {"env": other["id"], "force": True})
        assert not (root.path / "envs" / env / "copying").exists()
        n += 1
    assert n > 5
    counts_on(root, env)


@pytest.mark.soak
def test_a_daemon_killed_while_it_takes_a_snapshot_leaves_it_whole_or_nothing(fresh_root: Root) -> None:
    root = fresh_root
    env = _parent(root)
    n = 1
    while _killed_at(root, n, "snapshot", {"env": env, "name": "one"}):
        counts_on(root, env)
        directory = root.path / "snapshots"
        assert not directory.exists() or list(directory.iterdir()) == []
        n += 1
    assert n > 2
    assert [row["name"] for row in root.ask("snapshots")["snapshots"]] == ["one"]
    counts_on(root, env)


@pytest.mark.soak
def test_a_daemon_killed_by_hand_while_it_copies_much(fresh_root: Root) -> None:
    """In the middle of copying, the machine may stand still: the next daemon lets it go on."""
    root = fresh_root
    env = _parent(root)
    inside(root, env, "head -c 40000000 /dev/urandom >/dev/shm/big")
    for wait_s in (0.02, 0.06, 0.1, 0.15, 0.2):
        asking = threading.Thread(target=_ask_quietly, args=(root, env))
        asking.start()
        time.sleep(wait_s)
        root.kill_daemon()
        asking.join()
        root.start_daemon()
        counts_on(root, env)
        for other in root.environments():
            if other["id"] != env:
                root.ask("rm", {"env": other["id"], "force": True})


def _ask_quietly(root: Root, env: str) -> None:
    with contextlib.suppress(Exception):
        fork(root, env)
