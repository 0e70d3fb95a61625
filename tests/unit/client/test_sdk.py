"""The SDK against a daemon and keepers in the test."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

import isolat
from isolat.errors import BY_CODE, CommandNotFound, DeadlineExceeded, Lost, NotFound
from isolat.spec.parse import parse

from .daemon import Daemon, Request
from .keeper import Keeper

TOP = Path(__file__).parents[3]
ID = "1" * 16


def test_the_exports_are_these() -> None:
    assert isolat.__all__ == [
        "Client", "CommandFailed", "Environment", "Exit", "IsolatError", "LogRecord", "Result", "__version__", "run",
    ]  # fmt: skip
    for name in isolat.__all__:
        assert getattr(isolat, name) is not None
    assert dir(isolat) == sorted(isolat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = isolat.nothing  # type: ignore[attr-defined]


def test_the_version_is_the_projects() -> None:
    assert tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"] == isolat.__version__


def test_importing_isolat_imports_nothing_else() -> None:
    program = f"import sys; sys.path.insert(0, {str(TOP / 'src')!r}); import isolat; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert {name for name in done.stdout.split() if name.startswith("isolat")} == {"isolat"}


def test_run_to_the_end(daemon: Daemon) -> None:
    daemon.runs(3, b"out\xff", b"err")
    result = isolat.Client(daemon.root).run("debian", ["x"], environment={"A": "1"}, memory="64m")
    assert result == isolat.Result(3, b"out\xff", b"err")
    assert daemon.requests[0].args["spec"] == {
        "image": "debian", "command": ["x"], "environment": {"A": "1"}, "mem_limit": "64m",
        "x-remove": True,
    }  # fmt: skip
    with pytest.raises(isolat.CommandFailed, match="ended with 3") as caught:
        result.check()
    assert caught.value.details == ("err",)


def test_every_option_parses(tmp_path: Path) -> None:
    from isolat.client.service import service

    data, fds = service(
        "debian", "sh -c true", name="web", layer="a/b", environment={"A": "1"}, working_dir="/x", user=1000,
        hostname="h", stdin=True, read_only=True, init=False, network="host", memory=64 << 20, memory_swap="128m",
        cpus=0.5, cpu_shares=512, pids=32, disk="1g", volumes={str(tmp_path): "/data:ro"}, tmpfs=["/t"],
        labels={"a": "b"}, stop_grace_s=1.5, timeout_s=3.0, remove=True, log_driver="none", oci_runtime="runc",
        accel="tcg", kernel="/boot/vmlinuz",
        options={"b": {"x": 1}},
    )  # fmt: skip
    for fd in fds:
        os.close(fd)
    spec = parse(data)
    assert (spec.layers, spec.command, spec.stop_grace_s, spec.timeout_s) == (
        ("a", "b"),
        ("sh", "-c", "true"),
        1.5,
        3.0,
    )
    assert (spec.volumes[0].target, spec.volumes[0].read_only, spec.option("b")) == ("/data", True, {"x": 1})


def test_an_option_that_is_none_is_a_type_error_before_anything_is_sent(daemon: Daemon) -> None:
    with pytest.raises(TypeError, match="no option 'memroy'"):
        isolat.Client(daemon.root).run("debian", memroy="1g")  # type: ignore[call-overload]
    assert not daemon.requests


def test_input_goes_in_and_output_comes_as_it_is_written(daemon: Daemon) -> None:
    seen: list[tuple[str, bytes]] = []

    def answer(request: Request) -> None:
        keeper = Keeper()
        request.stream(keeper)
        assert keeper.eof.wait(10)
        keeper.write(1, bytes(keeper.stdin).upper())
        keeper.exit(0)
        request.ok(code=0)
        keeper.close()

    daemon.on("run", answer)
    result = isolat.Client(daemon.root).run("debian", ["x"], input=b"hi", on_output=lambda s, d: seen.append((s, d)))
    assert (seen, result.stdout) == ([("stdout", b"HI")], b"")


def test_a_detached_environment_is_an_object(daemon: Daemon) -> None:
    daemon.replies("run", id=ID, name="web")
    daemon.runs(0, b"hello", verb="exec")
    daemon.replies("stop", code=143, signal=15, forced=False)
    daemon.replies("wait", code=143, signal=15, oom=True, reason="x")
    daemon.replies("rm")
    with isolat.Client(daemon.root).run("debian", ["sleep", "60"], detach=True) as env:
        assert repr(env) == f"<Environment web {ID}>"
        assert env.exec(["echo", "hello"]).check().text == "hello"
        assert env.stop(2.0) == isolat.Exit(143, 15)
        assert env.wait() == isolat.Exit(143, 15, oom=True, reason="x")
    assert [request.verb for request in daemon.requests] == ["run", "exec", "stop", "wait", "rm"]
    assert daemon.requests[2].args == {"env": ID, "grace_s": 2.0}
    assert daemon.requests[4].args == {"env": ID, "force": True}


def test_forced_removal_minds_nothing_that_is_gone(daemon: Daemon) -> None:
    daemon.on("rm", lambda request: request.error("not-found", "no environment"))
    env = isolat.Environment(isolat.Client(daemon.root), ID, "web")
    env.rm(force=True)
    with pytest.raises(NotFound):
        env.rm()


def test_errors_are_those_of_the_tree(daemon: Daemon) -> None:
    daemon.on("exec", lambda request: request.error("command-not-found", "no x", hint="h", details=["d"]))
    with pytest.raises(CommandNotFound) as caught:
        isolat.Environment(isolat.Client(daemon.root), ID, "web").exec(["x"])
    assert (caught.value.message, caught.value.hint, caught.value.details) == ("no x", "h", ("d",))
    assert isolat.CommandFailed.code not in BY_CODE


def test_a_command_that_takes_too_long_is_killed(daemon: Daemon) -> None:
    keeper = Keeper()
    daemon.on("exec", lambda request: request.stream(keeper, "exec-1"))
    with pytest.raises(DeadlineExceeded, match="did not end within"):
        isolat.Environment(isolat.Client(daemon.root), ID, "web").exec(["x"], timeout_s=0.1)
    keeper.wait_for(lambda: keeper.signals() == [(9, 1)])
    keeper.close()


def test_an_exception_in_the_callers_function_kills_the_command(daemon: Daemon) -> None:
    keeper = Keeper()

    def answer(request: Request) -> None:
        request.stream(keeper)
        keeper.write(1, b"x")

    def refuse(_stream: str, _data: bytes) -> None:
        raise ZeroDivisionError

    daemon.on("exec", answer)
    with pytest.raises(ZeroDivisionError):
        isolat.Environment(isolat.Client(daemon.root), ID, "web").exec(["x"], on_output=refuse)
    keeper.wait_for(lambda: keeper.signals() == [(9, 1)])
    keeper.close()


def test_a_lost_environment_is_lost(daemon: Daemon) -> None:
    keeper = Keeper()

    def answer(request: Request) -> None:
        request.stream(keeper)
        keeper.cut()

    daemon.on("exec", answer)
    with pytest.raises(Lost):
        isolat.Environment(isolat.Client(daemon.root), ID, "web").exec(["x"])
    keeper.close()


def test_listing_and_finding(daemon: Daemon) -> None:
    daemon.replies("ps", environments=[{"id": ID, "name": "web", "state": "running"}])
    daemon.replies("inspect", id=ID, name="web", state="running")
    client = isolat.Client(daemon.root)
    (env,) = client.ps()
    assert (env.id, env.name, env.row["state"]) == (ID, "web", "running")
    assert client.get("we").id == ID
    assert env.inspect()["state"] == "running"


def test_events_come_until_the_daemon_ends_them(daemon: Daemon) -> None:
    def answer(request: Request) -> None:
        request.send({"row": {"event": "start"}})
        request.send({"row": {"event": "die"}})
        request.ok()

    daemon.on("events", answer)
    assert [event["event"] for event in isolat.Client(daemon.root).events(since_s=1.5)] == ["start", "die"]
    assert daemon.requests[0].args == {"since_ns": 1_500_000_000, "follow": True}


def test_logs_are_read_from_the_directory(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "env" / "log").mkdir(parents=True)
    header = (7).to_bytes(8, "little") + (3).to_bytes(4, "little") + b"\x02\0\0\0"
    (tmp_path / "env" / "log" / "0").write_bytes(header + b"hi\n")

    def answer(request: Request) -> None:
        fd = os.open(tmp_path / "env", os.O_RDONLY)
        request.send({"ok": {"running": False}}, (fd,))
        os.close(fd)

    daemon.on("logs", answer)
    env = isolat.Environment(isolat.Client(daemon.root), ID, "web")
    assert list(env.logs(follow=True)) == [isolat.LogRecord(7, "stderr", b"hi\n")]


def test_one_client_serves_many_threads(daemon: Daemon) -> None:
    daemon.runs(0, b"x" * 1000, verb="exec")
    env = isolat.Environment(isolat.Client(daemon.root), ID, "web")
    found: list[int] = []

    def work() -> None:
        for _ in range(10):
            found.append(len(env.exec(["x"]).stdout))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1000] * 80


def test_an_exec_leaves_no_descriptor_open_and_costs_little(daemon: Daemon) -> None:
    daemon.runs(0, verb="exec")
    env = isolat.Environment(isolat.Client(daemon.root), ID, "web")
    env.exec(["true"])
    before = len(list(Path("/proc/self/fd").iterdir()))
    began = time.monotonic()
    for _ in range(50):
        env.exec(["true"])
    assert (time.monotonic() - began) / 50 < 0.02
    time.sleep(0.1)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
