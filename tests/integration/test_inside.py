"""Environments in environments: several containers in one microVM, each with everything that an environment has."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import isolat
from isolat.errors import CommandNotFound, Conflict, IllegalState, IsolatError, NotFound, Refused, Unsupported
from tests.support import traces
from tests.support.images import IMAGE, add_small
from tests.support.logs import read_log
from tests.support.microvms import children, qemu, spec, until_parked
from tests.support.roots import Root, clean_root, private_root
from tests.support.terminal import Terminal
from tests.support.wires import Cut, Stream

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

MEMORY = "256m"
FAKE = {"image": IMAGE, "runtime": "fake", "command": ["sleep", "3600"], "container_name": "outer"}
IMAGES = ("small-a", "small-b", "small-c", "small-d", "small-e")
AGENT_ROOT = "/proc/1/root"  # the machine's own, seen by its application


@pytest.fixture(scope="module")
def module_root() -> Iterator[Root]:
    """One root for this module, so that its template is booted once; no machines in advance."""
    with private_root() as root:
        for name in IMAGES:
            add_small(root.path, name)
        root.start_daemon()
        yield root


@pytest.fixture
def root(module_root: Root) -> Iterator[Root]:
    with clean_root(module_root) as found:
        yield found


@pytest.fixture
def machine(root: Root) -> str:
    """A machine in which nothing else is."""
    return root.run_detached(spec("sleep", "3600", mem_limit=MEMORY, container_name="outer"))


def inner(*command: str, within: str = "outer", **keys: Any) -> dict[str, Any]:
    """A container in a machine."""
    more = {name.replace("x_", "x-", 1) if name.startswith("x_") else name: v for name, v in keys.items()}
    return {"image": IMAGE, "command": list(command), "x-in": within, **more}


def shell(script: str, **keys: Any) -> dict[str, Any]:
    return inner("sh", "-c", script, **keys)


def output(root: Root, service: dict[str, Any]) -> tuple[int, str]:
    """How it ended, and what it wrote to its standard output."""
    conversation, stream, _ = root.run(service)
    code = stream.ended()
    stream.close()
    conversation.close()
    return code, stream.out.decode()


def exec_(root: Root, env: str, script: str) -> str:
    stream = root.exec(env, ["sh", "-c", script])
    code = stream.ended()
    stream.close()
    assert code == 0, f"{script}: {code}: {bytes(stream.err)!r}"
    return stream.out.decode()


def logged(root: Root, id: str, stream: int = 1) -> str:
    directory = root.path / "envs" / id / "log"
    return read_log(directory, stream).decode() if directory.exists() else ""


def ready(root: Root, service: dict[str, Any]) -> str:
    """A detached environment that has said that it is ready."""
    id, end = root.run_detached(service), time.monotonic() + 20
    while "ready" not in logged(root, id):
        assert time.monotonic() < end, f"{id} is not ready"
        time.sleep(0.02)
    return id


def left_inside(root: Root, machine: str, id: str) -> str:
    """Everything in the machine that bears this id, seen from its own root."""
    places = ("run/isolat/environments", "run/isolat/runtime", "run/isolat/disk", "sys/fs/cgroup/isolat")
    listing = " ".join(f"{AGENT_ROOT}/{place}" for place in places)
    return exec_(root, machine, f"ls -d $(ls -d {listing} 2>/dev/null | sed 's|$|/{id}|') 2>/dev/null; "
                                f"grep {id} {AGENT_ROOT}/proc/1/mounts; true")  # fmt: skip


def within(root: Root, machine: str) -> set[str]:
    """What is on the machine's disk, and what inner environments have in its memory."""
    return set(exec_(root, machine, f"ls {AGENT_ROOT}/run/isolat/disk; ls {AGENT_ROOT}/run/isolat/environments; true")
               .split())  # fmt: skip


# what an environment has


def test_three_at_once_are_apart(root: Root, machine: str) -> None:
    commands = {
        0: "echo zero; echo err zero >&2; sleep 1; exit 0",
        3: "echo three; sleep 0.5; exit 3",
        137: "echo killed; kill -9 $$",
    }
    ids = {code: root.run_detached(shell(script)) for code, script in commands.items()}
    for code, id in ids.items():
        assert root.ask("wait", {"env": id})["code"] == code
    assert [logged(root, id) for id in ids.values()] == ["zero\n", "three\n", "killed\n"]
    assert logged(root, ids[0], 2) == "err zero\n"
    known = root.ask("inspect", {"env": ids[137]})
    assert (known["exit"]["signal"], known["reason"], known["layer"]) == (9, "", "microvm/container")
    assert root.state(machine) == "running"


def test_ps_shows_where_it_is(root: Root, machine: str) -> None:
    id = root.run_detached(inner("sleep", "600", container_name="within"))
    rows = {row["id"]: row for row in root.environments()}
    assert (rows[id]["layer"], rows[id]["in"], rows[id]["state"]) == ("microvm/container", "outer", "running")
    assert (rows[machine]["layer"], rows[machine]["in"]) == ("microvm", "")
    lines = root.ok("ps").splitlines()
    assert lines[0].split()[:5] == ["ID", "NAME", "IMAGE", "LAYER", "IN"]
    assert any(re.search(r"within +debian +microvm/container +outer +sleep 600", line) for line in lines)
    assert root.ok("ps", "-q", "--filter", "in=outer") == id[:12]
    known = json.loads(root.ok("inspect", "within", "outer"))
    assert (known[0]["around"]["id"], known[1]["inside"]) == (machine, [id])


def test_exec_attach_kill_and_the_neighbours(root: Root, machine: str) -> None:
    counting = "echo ready; n=0; while read line; do n=$((n+1)); echo $n $line; done; exit 6"
    one = ready(root, shell(counting, stdin_open=True))
    two = ready(root, shell("echo ready; sleep 600"))
    assert exec_(root, one, "hostname").strip() == one[:12]
    assert exec_(root, two, "cat /proc/1/cmdline").startswith("/dev/.isolat/isolat-init")
    assert root.exec(two, ["sh", "-c", "exit 44"]).ended() == 44
    conversation = root.open("attach", {"env": one, "stdin": True})
    _, stream = conversation.stream()
    stream.write(b"line\n")
    stream.until_out(b"1 line")
    root.ask("kill", {"env": two, "signal": "KILL"})
    assert root.ask("wait", {"env": two})["code"] == 137
    stream.write(b"another\n")
    stream.until_out(b"2 another")
    stream.close_stdin()
    assert stream.ended() == 6
    stream.close()
    conversation.close()
    assert exec_(root, machine, "echo well") == "well\n"


def test_pipes_a_terminal_and_removal(root: Root, machine: str) -> None:
    data = os.urandom(3 << 20)
    done = root.cli("run", "-i", "--rm", "--in", "outer", IMAGE, "sh", "-c", "cat; exit 9", input=data)
    assert (done.returncode, done.stdout == data) == (9, True)
    argv = root.argv("run", "-it", "--rm", "--in", "outer", IMAGE, "sh")
    with Terminal(argv, dict(os.environ), 31, 91) as terminal:
        terminal.until("#")
        terminal.type("stty size; tty; exit 5\n")
        terminal.until("31 91")
        terminal.until("/dev/")
        assert terminal.ended() == 5
    assert [env["id"] for env in root.environments()] == [machine]


def test_stop_asks_first(root: Root, machine: str) -> None:
    obeys = ready(root, shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"))
    ignores = ready(root, shell("trap '' TERM; echo ready; while :; do sleep 0.2; done"))
    told = root.ask("stop", {"env": obeys, "grace_s": 10})
    assert (told["code"], told["forced"]) == (7, False)
    told = root.ask("stop", {"env": ignores, "grace_s": 0.5})
    assert (told["code"], told["forced"]) == (137, True)
    assert root.state(machine) == "running"


def test_a_time_limit(root: Root, machine: str) -> None:
    id = root.run_detached(inner("sleep", "600", x_timeout="1s", stop_grace_period="1s"))
    known = root.until_state(id, "exited")
    assert "--timeout" in known["reason"]


def test_limits_are_its_own(root: Root, machine: str) -> None:
    hungry = "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo $?"
    id = root.run_detached(shell(hungry, mem_limit="32m"))
    told = root.ask("wait", {"env": id})
    assert told["oom"] is True
    code, out = output(root, shell("cat /sys/fs/cgroup/pids.max; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max",
                                   pids_limit=33, mem_limit="64m", cpus=0.5))  # fmt: skip
    assert (code, out.split()) == (0, ["33", str(64 << 20), "50000", "100000"])
    code, out = output(root, shell("cat /sys/fs/cgroup/memory.max"))
    assert (code, out.strip()) == (0, "max")


def test_a_failed_start_leaves_nothing(root: Root, machine: str) -> None:
    with pytest.raises(CommandNotFound):
        root.run_detached(inner("nosuchcommand"))
    assert [env["id"] for env in root.environments()] == [machine]
    assert within(root, machine) == {"lost+found", "u", "w"}


def test_nothing_is_left_inside_of_what_was_removed(root: Root, machine: str) -> None:
    id = ready(root, shell("echo something > /root/file; echo ready; sleep 600"))
    before = left_inside(root, machine, id)
    for part in (f"disk/{id}", f"environments/{id}", f"cgroup/isolat/{id}", f"runtime/{id}", "overlay"):
        assert part in before
    root.ask("kill", {"env": id})
    root.until_state(id, "exited")
    assert "overlay" not in left_inside(root, machine, id)
    root.ask("rm", {"env": id})
    assert left_inside(root, machine, id) == ""
    assert exec_(root, machine, "ls /proc | grep -c '^[0-9]'") != ""


# other images


def test_other_images_come_in(root: Root, machine: str) -> None:
    assert [output(root, {"image": name, "x-in": "outer"}) for name in IMAGES[:2]] == [
        (3, "small-a\n"), (3, "small-b\n"),
    ]  # fmt: skip
    held = [
        root.run_detached({"image": name, "command": ["/bin/show", "stay"], "x-in": "outer"}) for name in IMAGES[:4]
    ]
    with pytest.raises(Unsupported) as told:
        root.run_detached({"image": IMAGES[4], "x-in": "outer"})
    assert "4 images" in told.value.message
    assert output(root, {"image": IMAGES[1], "x-in": "outer"}) == (3, "small-b\n")
    root.ask("rm", {"env": held[2], "force": True})
    assert output(root, {"image": IMAGES[4], "x-in": "outer"}) == (3, "small-e\n")
    assert [logged(root, id) for id in (held[0], held[3])] == ["small-a\n", "small-d\n"]
    for id in (held[0], held[1], held[3]):
        assert root.state(id) == "running"


# the outer one's end


def test_a_killed_machine_is_told_with_its_last_words(root: Root, machine: str) -> None:
    ids = [root.run_detached(inner("sleep", "600")) for _ in range(2)]
    over = root.run_detached(shell("exit 4"))
    root.until_state(over, "exited")
    exec_(root, machine, "echo last words > /dev/console")
    os.kill(qemu(root, machine), signal.SIGKILL)
    for id in ids:
        known = root.until_state(id, "exited", "lost")
        assert known["exit"]["code"] == 137
        assert known["reason"].startswith("outer, which it was in, ended under it, its last words:")
        assert "last words" in known["reason"]
    assert root.until_state(machine, "exited")["exit"]["code"] == 137
    assert root.ask("wait", {"env": over})["code"] == 4


def test_a_killed_keeper_loses_all_of_them(root: Root, machine: str) -> None:
    id = ready(root, shell("echo ready; sleep 600"))
    os.kill(int(root.ask("inspect", {"env": machine})["keeper_pid"]), signal.SIGKILL)
    assert "killed" in root.until_state(machine, "lost")["reason"]
    assert root.until_state(id, "lost")["reason"].startswith("outer, which it was in, is lost")
    assert logged(root, id) == "ready\n"


def test_the_outer_ones_own_end_is_theirs(root: Root) -> None:
    outer = root.run_detached(spec("sh", "-c", "sleep 3; exit 8", mem_limit=MEMORY, container_name="outer"))
    kept, gone = root.run_detached(inner("sleep", "600")), root.run_detached(inner("sleep", "600", x_remove=True))
    assert root.ask("wait", {"env": outer})["code"] == 8
    known = root.until_state(kept, "exited")
    assert (known["exit"]["code"], known["reason"]) == (137, "outer, which it was in, ended under it")
    assert gone not in {env["id"] for env in root.environments()}


def test_stop_of_the_outer_one_asks_all(root: Root, machine: str) -> None:
    obeys = ready(root, shell("trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.05; done"))
    root.ask("stop", {"env": machine, "grace_s": 5})
    known = root.until_state(obeys, "exited")
    assert (known["exit"]["code"], logged(root, obeys)) == (7, "ready\nasked\n")
    assert known["reason"] == "outer, which it was in, was stopped"


def test_removing_the_outer_one_has_to_be_forced(root: Root, machine: str) -> None:
    id = root.run_detached(inner("sleep", "600", container_name="within"))
    with pytest.raises(Conflict) as told:
        root.ask("rm", {"env": machine})
    assert "within" in told.value.message
    assert root.state(id) == "running"
    root.ask("rm", {"env": machine, "force": True})
    known = root.until_state(id, "exited")
    assert (known["exit"]["code"], known["reason"]) == (137, "outer, which it was in, was removed")
    assert [env["in"] for env in root.environments()] == ["outer"]
    root.ask("rm", {"env": id})


@pytest.mark.parametrize("way", ["rm", "stop", "keeper"])
def test_others_that_come_in_while_it_ends_end_with_it(root: Root, way: str) -> None:
    """Whatever moment of their start it is."""
    service = {"image": IMAGE, "runtime": "fake", "command": ["sleep", "600"], "x-in": "outer"}
    for n in range(8):
        outer = root.run_detached({**FAKE, "runtime": "container"})
        keeper = int(root.ask("inspect", {"env": outer})["keeper_pid"])
        over = threading.Event()

        def come(over: threading.Event = over) -> None:
            while not over.is_set():
                with contextlib.suppress(IsolatError):
                    root.run_detached(service)

        threads = [threading.Thread(target=come) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.02 + 0.01 * n)
        if way == "keeper":
            os.kill(keeper, signal.SIGKILL)
        else:
            root.ask(way, {"env": outer, **({"force": True} if way == "rm" else {"grace_s": 0})})
        over.set()
        for thread in threads:
            thread.join()
        for env in root.environments():
            assert root.until_state(env["id"], "exited", "lost")
        root.remove_all()
    assert traces.none_of_environments(root.path) == []


# the daemon's end


def test_a_killed_daemon_loses_nothing(root: Root, machine: str) -> None:
    goes_on = ready(root, shell("echo ready; read line; echo $line; exit 21", stdin_open=True))
    ends = ready(root, shell("echo ready; sleep 1.5; echo last; exit 22"))
    killed = ready(root, shell("echo ready; sleep 600"))
    conversation, stream, foreground = root.run(shell("echo up; sleep 3; echo still; exit 23"))
    stream.until_out(b"up")
    root.kill_daemon()
    assert stream.ended() == 23
    assert b"still" in stream.out
    stream.close()
    conversation.close()
    root.start_daemon()
    assert root.ask("wait", {"env": ends})["code"] == 22
    assert logged(root, ends) == "ready\nlast\n"
    assert root.ask("wait", {"env": foreground})["code"] == 23
    assert root.state(goes_on) == root.state(killed) == root.state(machine) == "running"
    assert exec_(root, goes_on, "echo well") == "well\n"
    attached = root.open("attach", {"env": goes_on, "stdin": True})
    _, stream = attached.stream()
    stream.write(b"there\n")
    assert stream.ended() == 21
    stream.close()
    attached.close()
    root.ask("kill", {"env": killed})
    assert root.ask("wait", {"env": killed})["code"] == 137
    assert output(root, shell("exit 24"))[0] == 24  # and others come in
    for id in (goes_on, ends, killed, foreground):
        root.ask("rm", {"env": id})
        assert left_inside(root, machine, id) == ""


def test_all_die_while_no_daemon_lives(root: Root, machine: str) -> None:
    id, gone = root.run_detached(inner("sleep", "600")), root.run_detached(inner("sleep", "600", x_remove=True))
    ended = ready(root, shell("echo ready; sleep 0.5; exit 5"))
    keeper = int(root.ask("inspect", {"env": machine})["keeper_pid"])
    (machine_pid,) = children(keeper)
    root.kill_daemon()
    time.sleep(1)
    os.kill(machine_pid, signal.SIGKILL)
    time.sleep(0.5)
    root.start_daemon()
    assert "outer" in root.until_state(id, "exited")["reason"]
    assert root.ask("wait", {"env": ended})["code"] == 5
    root.until_state(machine, "exited")
    end = time.monotonic() + 10
    while gone in {env["id"] for env in root.environments()} and time.monotonic() < end:
        time.sleep(0.05)
    assert gone not in {env["id"] for env in root.environments()}


def _run_and_remove(root: Root, service: dict[str, Any], kill_at: int) -> bool:
    """Under a daemon that kills itself at this checkpoint. True when it lived to the end."""
    pid = root.start_daemon(ISOLAT_KILL_AT=str(kill_at))
    try:
        id = root.run_detached(service)
        root.ask("rm", {"env": id, "force": True})
    except Cut:
        root.daemon_gone(pid)
        return False
    root.kill_daemon()
    return True


def _killed_at_each_step(root: Root, outer: dict[str, Any], service: dict[str, Any], every: int, first: int) -> None:
    root.start_daemon()
    machine = root.run_detached(outer)
    root.kill_daemon()
    for kill_at in range(first, 150, every):
        survived = _run_and_remove(root, service, kill_at)
        root.start_daemon()
        assert root.state(machine) == "running"
        for env in root.environments():
            assert env["state"] in ("running", "exited", "lost"), f"killed at {kill_at}: {env}"
            if env["id"] == machine:
                continue
            if env["state"] == "running":
                assert root.exec(env["id"], service["command"][:1]).ended() in (1, 3)  # `sleep`, and small-a's
            root.ask("rm", {"env": env["id"], "force": True})
            assert traces.none_of_environment(root.path, env["id"]) == [], f"killed at {kill_at}"
        if outer["runtime"] == "microvm":
            assert within(root, machine) == {"lost+found", "u", "w"}, f"killed at {kill_at}"
        root.kill_daemon()
        if survived:
            return
    pytest.fail("no end after 150 checkpoints")


def test_a_daemon_killed_between_any_two_steps_leaves_nothing(fresh_root: Root) -> None:
    service = {"image": IMAGE, "runtime": "fake", "command": ["sleep", "600"], "x-in": "outer"}
    _killed_at_each_step(fresh_root, FAKE, service, 1, 1)


@pytest.mark.parametrize("every", [pytest.param(5, id="some"), pytest.param(1, id="all", marks=pytest.mark.soak)])
def test_a_daemon_killed_between_steps_leaves_nothing_inside_of_a_machine(fresh_root: Root, every: int) -> None:
    add_small(fresh_root.path, IMAGES[0])
    service = {"image": IMAGES[0], "command": ["/bin/show", "stay"], "x-in": "outer"}
    service |= {"image": IMAGE, "command": ["sleep", "600"]} if every == 5 else {}
    _killed_at_each_step(
        fresh_root, spec("sleep", "3600", mem_limit=MEMORY, container_name="outer"), service, every, every
    )


# copies and parking


def test_copies_of_a_machine_that_others_are_in_are_refused(root: Root, machine: str) -> None:
    id = root.run_detached(inner("sleep", "600", container_name="within"))
    for verb, args in (("fork", {"count": 1}), ("snapshot", {"name": "kept"})):
        with pytest.raises(Unsupported) as told:
            root.ask(verb, {"env": machine, **args})
        assert "within" in told.value.message
    root.ask("rm", {"env": id, "force": True})
    (child,) = root.ask("fork", {"env": machine, "count": 1})["environments"]
    for within in (machine, child["id"]):  # what was brought in for others has not come along
        assert output(root, {"image": IMAGES[0], "x-in": within}) == (3, "small-a\n")
        assert output(root, shell("exit 3", within=within))[0] == 3


def test_a_machine_from_a_snapshot_takes_others_in(root: Root, machine: str) -> None:
    root.ask("snapshot", {"env": machine, "name": "kept"})
    try:
        again = root.ask("restore", {"snapshot": "kept"})["id"]
        assert output(root, shell("echo in; exit 3", within=again)) == (3, "in\n")
        root.ask("rm", {"env": again, "force": True})
    finally:
        root.ask("snapshot_rm", {"snapshot": "kept"})


def test_an_idle_machine_is_parked_with_all_in_it(root: Root) -> None:
    outer = root.run_detached(
        spec("sleep", "infinity", mem_limit=MEMORY, container_name="outer", x_microvm={"park_s": 0.5})
    )
    id = ready(root, shell("echo ready; read line; exit 6", stdin_open=True))
    pid = qemu(root, outer)
    until_parked(pid)
    assert exec_(root, id, "echo awake") == "awake\n"
    until_parked(pid)
    assert output(root, shell("exit 5"))[0] == 5
    until_parked(pid)
    root.ask("kill", {"env": id})
    assert root.ask("wait", {"env": id})["code"] == 137


def test_the_same_from_python(root: Root, machine: str) -> None:
    client = isolat.Client(root.path)
    assert client.run(IMAGE, ["echo", "hi"], inside="outer").text == "hi\n"
    with client.run(IMAGE, ["sleep", "600"], inside="outer", detach=True) as env:
        assert env.exec(["sh", "-c", "exit 3"]).code == 3
        assert env.inspect()["around"]["name"] == "outer"
    assert [env.id for env in client.ps()] == [machine]


# what is refused, before anything is done


@pytest.mark.parametrize(
    ("keys", "kind", "word"),
    [
        ({"runtime": "microvm"}, Unsupported, "machine"),
        ({"runtime": "host"}, Unsupported, "host"),
        ({"storage_opt": {"size": "64m"}}, Unsupported, "disk"),
        ({"mem_limit": "1g"}, Refused, "memory"),
        ({"cpus": 3}, Refused, "CPUs"),
        ({"x-in": "nobody"}, NotFound, "nobody"),
        ({"volumes": ["/tmp:/tmp"]}, IsolatError, ""),
    ],
)
def test_what_cannot_be_is_refused(
    root: Root, machine: str, keys: dict[str, Any], kind: type[IsolatError], word: str
) -> None:
    with pytest.raises(kind) as told:
        root.run_detached({**inner("true"), **keys})
    assert told.value.hint
    assert word in told.value.message
    assert [env["id"] for env in root.environments()] == [machine]


def test_no_container_in_a_container(root: Root) -> None:
    box = root.run_detached({"image": IMAGE, "command": ["sleep", "600"], "container_name": "box"})
    with pytest.raises(Unsupported) as told:
        root.run_detached(inner("true", within="box"))
    assert "namespaces" in told.value.message
    assert "kernel" in told.value.hint
    assert [env["id"] for env in root.environments()] == [box]
    assert output(root, {"image": IMAGE, "runtime": "fake", "command": ["sh", "-c", "exit 9"], "x-in": "box"})[0] == 9


def test_it_must_run(root: Root) -> None:
    box = root.run_detached(spec("true", mem_limit=MEMORY, container_name="outer"))
    root.until_state(box, "exited")
    with pytest.raises(IllegalState):
        root.run_detached(inner("true"))


def test_the_plan_names_all_of_it(root: Root, machine: str) -> None:
    text = root.ok("run", "--plan", "--in", "outer", IMAGES[0], "/bin/show")
    assert text.startswith(f"in outer ({machine})\n  bring in ")
    assert "layer container" in text
    assert "/run/isolat/images/" in text
    assert [env["id"] for env in root.environments()] == [machine]


def streams_apart(root: Root, ids: list[str]) -> list[Stream]:
    return [root.exec(id, ["cat"], stdin=True) for id in ids]


def test_many_at_once(root: Root, machine: str) -> None:
    """Streams of several in one machine, through one port."""
    ids = [root.run_detached(inner("sleep", "600")) for _ in range(4)]
    streams = streams_apart(root, ids)
    for n, stream in enumerate(streams):
        stream.write(b"%d" % n * 500_000)
        stream.close_stdin()
    for n, stream in enumerate(streams):
        assert stream.ended(60) == 0
        assert bytes(stream.out) == b"%d" % n * 500_000
        stream.close()
