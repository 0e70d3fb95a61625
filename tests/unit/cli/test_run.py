"""``run``, ``exec`` and ``attach`` against a daemon and a keeper in the test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from isolat.cli import options as o
from isolat.cli import run
from isolat.spec.parse import parse

from ..client.daemon import Daemon, Request
from ..client.keeper import Keeper
from .conftest import Command


def built(*words: str) -> dict[str, Any]:
    service, fds = run.build(o.parse(["run", *words]))
    for fd in fds:
        os.close(fd)
    return service


def test_every_option_reaches_the_spec_and_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    service = built(
        "-it", "--rm", "--name", "web", "--layer", "container", "-e", "A=1", "-v", "./data:/data:ro", "-w", "/srv",
        "-u", "1000:100", "--hostname", "web", "-m", "64m", "--memory-swap", "128m", "--cpus", "0.5",
        "--cpu-shares", "512", "--pids-limit", "32", "--disk", "100m", "--read-only", "--tmpfs", "/tmp:size=1m",
        "--net", "host", "--timeout", "30", "--stop-timeout", "1m", "--no-init", "--label", "a=b", "--label", "c",
        "--log-driver", "none", "--oci-runtime", "runc", "debian", "sh", "-c", "true",
    )  # fmt: skip
    spec = parse(service)
    assert (spec.image, spec.command, spec.name, spec.layers) == ("debian", ("sh", "-c", "true"), "web", ("container",))
    assert (spec.tty, spec.stdin_open, spec.remove, spec.read_only, spec.init) == (True, True, True, True, False)
    assert (spec.memory_bytes, spec.memory_swap_bytes, spec.disk_bytes) == (64 << 20, 128 << 20, 100 << 20)
    assert (spec.cpus, spec.cpu_shares, spec.pids_limit) == (0.5, 512, 32)
    assert (spec.timeout_s, spec.stop_grace_s) == (30.0, 60.0)
    assert (spec.environment, spec.labels) == ((("A", "1"),), (("a", "b"), ("c", "")))
    assert (spec.working_dir, spec.user, spec.hostname, spec.network_mode) == ("/srv", "1000:100", "web", "host")
    assert (spec.logging, spec.oci_runtime, spec.tmpfs[0].size_bytes) == ("none", "runc", 1 << 20)
    assert (spec.volumes[0].source, spec.volumes[0].target, spec.volumes[0].read_only) == (
        str(tmp_path / "data"),
        "/data",
        True,
    )


def test_without_options_only_the_image_is_sent() -> None:
    assert built("debian") == {"image": "debian"}


def test_a_bare_variable_takes_the_callers_value() -> None:
    name = next(iter(os.environ))
    assert run.environment(["A=", name, "ISOLAT_NOT_SET_ANYWHERE"]) == ["A=", f"{name}={os.environ[name]}"]


def test_a_command_runs_and_its_code_is_ours(
    isolat: Command, daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    daemon.runs(3, b"out\0\xff", b"err")
    assert isolat("run", "--rm", "debian", "x") == 3
    shown = capfdbinary.readouterr()
    assert (shown.out, shown.err) == (b"out\0\xff", b"err")
    (request,) = daemon.requests
    assert request.args == {
        "spec": {"image": "debian", "command": ["x"], "x-remove": True}, "attach": True, "rows": 0, "cols": 0,
    }  # fmt: skip


def test_detached_prints_the_id(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.replies("run", id="a" * 16, name="web")
    assert isolat("run", "-d", "debian") == 0
    assert capsys.readouterr().out == "a" * 16 + "\n"
    assert daemon.requests[0].args["attach"] is False


def test_volumes_go_as_descriptors_in_order(isolat: Command, daemon: Daemon, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found: list[str] = []

    def answer(request: Request) -> None:
        found.extend(str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in request.fds)
        request.ok(id="x", name="x")

    daemon.on("run", answer)
    assert isolat("run", "-d", "-v", f"{tmp_path}/b:/1", "-v", f"{tmp_path}/a:/2:ro", "debian") == 0
    assert found == [f"{tmp_path}/b", f"{tmp_path}/a"]


def test_named_volumes_go_as_names_and_bring_no_descriptor(isolat: Command, daemon: Daemon, tmp_path: Path) -> None:
    found: list[str] = []

    def answer(request: Request) -> None:
        found.extend(str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in request.fds)
        request.ok(id="x", name="x")

    daemon.on("run", answer)
    assert isolat("run", "-d", "-v", "data:/1:ro", "-v", f"{tmp_path}:/2", "-v", "d.2:/3", "debian") == 0
    assert found == [str(tmp_path)]
    assert daemon.requests[0].args["spec"]["volumes"] == [
        {"type": "volume", "source": "data", "target": "/1", "read_only": True},
        {"type": "bind", "source": str(tmp_path), "target": "/2"},
        {"type": "volume", "source": "d.2", "target": "/3"},
    ]


@pytest.mark.parametrize(
    ("volume", "text"),
    [
        ("/nowhere/at/all:/x", "the source of a volume cannot be opened: /nowhere/at/all: No such file or directory"),
        ("/x", "not a volume: /x"),
        ("/:/x:z", "not a mode of a volume: z"),
    ],
)
def test_volumes_that_cannot_be(
    isolat: Command, daemon: Daemon, volume: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isolat("run", "-v", volume, "debian") == 125
    assert text in capsys.readouterr().err
    assert not daemon.requests


@pytest.mark.parametrize(("verb", "words"), [("run", ["debian"]), ("exec", ["web", "sh"])])
def test_a_terminal_that_is_none_is_refused_as_docker_does(
    isolat: Command, daemon: Daemon, verb: str, words: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("isolat.client.terminal.is_terminal", lambda _: False)
    assert isolat(verb, "-it", *words) == 125
    assert "the input device is not a TTY" in capsys.readouterr().err
    assert not daemon.requests


@pytest.mark.parametrize(("code", "exit_code"), [("command-not-found", 127), ("not-executable", 126), ("spec", 125)])
def test_what_never_ran_has_its_code(
    isolat: Command, daemon: Daemon, code: str, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("run", lambda request: request.error(code, "it is not there", hint="look elsewhere"))
    assert isolat("run", "debian") == exit_code
    assert capsys.readouterr().err == "isolat: it is not there\n  hint: look elsewhere\n"


def test_a_daemon_that_dies_before_the_stream_is_told(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("run", lambda _: None)
    assert isolat("run", "debian") == 125
    assert "the daemon ended before it had answered" in capsys.readouterr().err


def killed_after_the_stream(request: Request) -> None:
    keeper = Keeper()
    request.stream(keeper)
    request.sock.close()
    keeper.exit(7)
    keeper.gone.wait(10)
    keeper.close()


def test_a_daemon_that_dies_during_the_stream_changes_nothing(isolat: Command, daemon: Daemon) -> None:
    daemon.on("run", killed_after_the_stream)
    assert isolat("run", "debian") == 7
    assert [request.verb for request in daemon.requests] == ["run"]


def test_with_rm_its_successor_is_started_and_the_code_stays(isolat: Command, daemon: Daemon) -> None:
    daemon.on("run", killed_after_the_stream)
    daemon.replies("ping")
    assert isolat("run", "--rm", "debian") == 7
    assert [request.verb for request in daemon.requests] == ["run", "ping"]


def test_a_lost_environment_is_told_with_the_daemons_reason(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request) -> None:
        keeper = Keeper()
        request.stream(keeper)
        keeper.cut()
        request.ok(code=None, signal=0, state="lost", reason="its keeper was killed")
        keeper.close()

    daemon.on("run", answer)
    assert isolat("run", "debian") == 125
    assert capsys.readouterr().err == "isolat: its keeper was killed\n"


def test_why_it_was_ended_is_told(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.runs(137, oom=True, reason="stopped after 5 s (--timeout)")
    assert isolat("run", "debian") == 137
    told = capsys.readouterr().err
    assert "for want of memory" in told
    assert "stopped after 5 s" in told


def test_a_plan_is_printed(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.replies("plan", plan=[{"layer": "fake"}], text="layer fake\n  1. …")
    assert isolat("run", "--plan", "debian") == 0
    assert capsys.readouterr().out == "layer fake\n  1. …\n"
    assert isolat("run", "--plan", "--json", "debian") == 0
    assert '"layer": "fake"' in capsys.readouterr().out


def test_exec(isolat: Command, daemon: Daemon, capfd: pytest.CaptureFixture[str]) -> None:
    daemon.runs(5, b"hi", verb="exec")
    assert isolat("exec", "-e", "A=1", "-w", "/srv", "-u", "root", "web", "sh", "-c", "x") == 5
    assert capfd.readouterr().out == "hi"
    assert daemon.requests[0].args == {
        "env": "web", "command": ["sh", "-c", "x"], "environment": ["A=1"], "working_dir": "/srv", "user": "root",
        "tty": False, "stdin": False, "detach": False,
    }  # fmt: skip


def test_exec_takes_two_dashes_behind_the_environment(isolat: Command, daemon: Daemon) -> None:
    daemon.replies("exec", key="x")
    assert isolat("exec", "-d", "web", "--", "ls", "--", "-l") == 0
    assert daemon.requests[0].args["command"] == ["ls", "--", "-l"]


def test_attach_asks_for_input_where_it_is_open(isolat: Command, daemon: Daemon) -> None:
    daemon.replies("inspect", id="x", spec={"stdin_open": False})
    daemon.runs(2, verb="attach")
    assert isolat("attach", "web") == 2
    assert daemon.requests[1].args == {"env": "web", "stdin": False}


def test_input_goes_in(isolat: Command, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bytearray()

    def answer(request: Request) -> None:
        keeper = Keeper()
        request.stream(keeper)
        assert keeper.eof.wait(10)
        found.extend(keeper.stdin)
        keeper.exit(0)
        request.ok(code=0)
        keeper.close()

    daemon.on("run", answer)
    read_end, write_end = os.pipe()
    os.write(write_end, b"data")
    os.close(write_end)
    saved = os.dup(0)
    os.dup2(read_end, 0)
    try:
        assert isolat("run", "-i", "debian", "cat") == 0
    finally:
        os.dup2(saved, 0)
        for fd in (saved, read_end):
            os.close(fd)
    assert bytes(found) == b"data"
