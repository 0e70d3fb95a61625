"""Listings and the verbs whose answers are printed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from isolat.cli import manage, tables
from isolat.client import leftovers, times
from isolat.errors import UsageError
from isolat.linux.mounts import parse_mountinfo

from ..client.daemon import Daemon, Request
from .conftest import Command

ROWS = [
    {
        "id": "a" * 16, "name": "web", "image": "debian", "layer": "container", "command": ["sh", "-c", "a b"],
        "state": "running", "status": "up 5 s", "created_ns": 0, "started_ns": 0, "exit_code": None,
        "labels": {"team": "red"},
    },
    {
        "id": "b" * 16, "name": "d\x1b[31mb", "image": "host", "layer": "host", "command": ["x" * 100],
        "state": "exited", "status": "exited (1) 2 min ago", "created_ns": 0, "started_ns": 0, "exit_code": 1,
        "labels": {},
    },
]  # fmt: skip


def test_ps_is_a_plain_table_in_a_pipe(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.replies("ps", environments=ROWS)
    assert isolat("ps", "-a") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "IMAGE", "LAYER", "IN", "COMMAND", "STATUS", "CREATED"]
    assert lines[1].startswith("a" * 12 + "   web")
    assert "sh -c 'a b'" in lines[1]
    assert "\x1b" not in lines[2]
    assert "x" * 39 + "…" in lines[2]
    assert daemon.requests[0].args == {"all": True}


def test_ps_quiet_and_json(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.replies("ps", environments=ROWS)
    isolat("ps", "-q")
    assert capsys.readouterr().out == "a" * 12 + "\n" + "b" * 12 + "\n"
    isolat("ps", "-q", "--no-trunc")
    assert capsys.readouterr().out == "a" * 16 + "\n" + "b" * 16 + "\n"
    isolat("ps", "--json")
    assert json.loads(capsys.readouterr().out) == ROWS


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["name=we"], ["web"]),
        (["label=team"], ["web"]), (["label=team=blue"], []), (["state=exited"], ["d\x1b[31mb"]),
        (["id=a", "id=b"], ["web", "d\x1b[31mb"]), (["id=a", "image=host"], []), (["layer=host"], ["d\x1b[31mb"]),
    ],
)  # fmt: skip
def test_filters(
    isolat: Command, daemon: Daemon, filters: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.replies("ps", environments=ROWS)
    assert isolat("ps", "--json", *(word for text in filters for word in ("--filter", text))) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == names


def test_a_filter_that_is_none() -> None:
    with pytest.raises(UsageError, match="not a filter: x"):
        manage._filter("x")


def test_one_failure_does_not_keep_the_others(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request) -> None:
        if request.args["env"] == "gone":
            request.error("not-found", "no environment gone")
        else:
            request.ok(code=0)

    daemon.on("stop", answer)
    assert isolat("stop", "-t", "1m", "a", "gone", "b") == 125
    shown = capsys.readouterr()
    assert shown.out == "a\nb\n"
    assert shown.err == "isolat: no environment gone\n"
    assert daemon.requests[0].args == {"env": "a", "grace_s": 60.0}


def test_wait_prints_codes_and_an_unknown_end_is_an_error(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("wait", lambda r: r.ok(code=137) if r.args["env"] == "a" else r.ok(code=None, reason="keeper killed"))
    assert isolat("wait", "a", "b") == 125
    shown = capsys.readouterr()
    assert shown.out == "137\n"
    assert "keeper killed" in shown.err


def test_kill_and_rm(isolat: Command, daemon: Daemon) -> None:
    daemon.replies("kill")
    daemon.on("rm", lambda request: request.error("not-found", "no environment"))
    assert isolat("kill", "-s", "HUP", "a") == 0
    assert daemon.requests[0].args == {"env": "a", "signal": "HUP"}
    assert isolat("rm", "-f", "a") == 0
    assert isolat("rm", "a") == 125


def test_a_template_that_is_removed_is_named_whole(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("template_rm", lambda request: request.ok(id=request.args["template"] + "f" * 12))
    assert isolat("template", "rm", "abcd") == 0
    assert capsys.readouterr().out == "abcdffffffffffff\n"


@pytest.mark.parametrize("count", ["0", "101", "x"])
def test_how_many_children_there_may_be_is_told(
    isolat: Command, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isolat("fork", "-n", count, "a") == 125
    assert "from 1 to 100" in capsys.readouterr().err


def test_inspect_is_a_list(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.replies("inspect", id="x", name="web")
    assert isolat("inspect", "web") == 0
    assert json.loads(capsys.readouterr().out) == [{"id": "x", "name": "web"}]


def test_events_are_lines(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request) -> None:
        row = {"time_ns": 1, "event": "die", "id": "a" * 16, "name": "web", "details": {"code": 1, "x": "y"}}
        request.send({"row": row})
        request.ok()

    daemon.on("events", answer)
    assert isolat("events", "--since", "10m") == 0
    assert capsys.readouterr().out == f"1970-01-01T00:00:00.000000001Z die      web ({'a' * 12}) code=1 x=y\n"
    assert isolat("events", "--no-follow", "--json") == 0
    assert json.loads(capsys.readouterr().out)["details"] == {"code": 1, "x": "y"}
    assert daemon.requests[1].args == {"since_ns": 1, "follow": False}


def test_logs_keep_streams_and_bytes(
    isolat: Command, daemon: Daemon, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "env" / "log").mkdir(parents=True)
    records = b"".join(
        (n + 1).to_bytes(8, "little") + len(data).to_bytes(4, "little") + bytes((stream, 0, 0, 0)) + data
        for n, (stream, data) in enumerate([(1, b"a\n\xff\0"), (2, b"e\n"), (1, b"b\n")])
    )
    (tmp_path / "env" / "log" / "0").write_bytes(records)

    def answer(request: Request) -> None:
        fd = os.open(tmp_path / "env", os.O_RDONLY)
        request.send({"ok": {"running": False}}, (fd,))
        os.close(fd)

    daemon.on("logs", answer)
    assert isolat("logs", "web") == 0
    shown = capfdbinary.readouterr()
    assert (shown.out, shown.err) == (b"a\n\xff\0b\n", b"e\n")
    assert isolat("logs", "--tail", "1", "web") == 0
    assert capfdbinary.readouterr().out == b"b\n"
    assert isolat("logs", "--tail", "x", "web") == 125


def test_images_with_and_without_names(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"digest": "d" * 64, "size_bytes": 3 << 20, "created_ns": 0, "kind": "debian"}
    daemon.replies("images", images=[{**image, "names": ["debian:latest", "debian:13"]}, {**image, "names": []}])
    assert isolat("images") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "debian:latest", "debian:13", "<none>"]
    assert "3.0 MiB" in lines[1]
    assert isolat("image", "ls", "-q") == 0
    assert capsys.readouterr().out.split() == ["debian:latest", "debian:13", "d" * 64]


def test_bootstrap_tells_its_progress(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request) -> None:
        for done in range(3):
            request.send({"progress": {"text": "packing", "done": done, "total": 3}})
        request.ok(name="debian:latest", digest="d" * 64)

    daemon.on("bootstrap", answer)
    assert isolat("image", "bootstrap", "--include", "a,b", "--include", "c", "debian") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("debian:latest\n", "packing (0 of 3)\n")
    assert daemon.requests[0].args == {"image": "debian", "include": ["a", "b", "c"], "arch": ""}


def test_version_and_shutdown(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.replies("ping", version="9.9", pid=7, root="/r")
    daemon.replies("shutdown")
    assert isolat("version") == 0
    assert "daemon 9.9, process 7" in capsys.readouterr().out
    assert isolat("--version") == 0
    assert isolat("system", "shutdown") == 0


def test_reset_needs_root(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert isolat("system", "reset", "--yes") == 125
    assert "needs root" in capsys.readouterr().err
    assert not daemon.requests


def test_reset_asks_first(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert isolat("system", "reset") == 125
    assert "say yes with --yes" in capsys.readouterr().err
    assert not daemon.requests


def test_reset_tells_proves_and_removes(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(daemon.root)
    (root / "envs" / "x").mkdir(parents=True)
    (root / "index.sqlite").write_text("")
    (root / "precious").write_text("of somebody else")

    def answer(request: Request) -> None:
        request.send({"row": {"id": "x", "what": "environment web"}})
        request.ok(removed=True)

    daemon.on("reset", answer)
    assert isolat("system", "reset", "--yes") == 0
    assert capsys.readouterr().out.splitlines() == [
        "removed environment web x",
        "nothing is left: no process, mount, loop device or control group",
        f"not ours, so kept: {root}/precious",
    ]
    assert [path.name for path in root.iterdir()] == ["precious"]
    (root / "precious").unlink()
    assert leftovers.remove_root(daemon.root) == []
    assert not root.exists()


def test_a_process_of_the_root_is_found(tmp_path: Path) -> None:
    assert leftovers.find(str(tmp_path)) == []
    process = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
    try:
        (line,) = leftovers.find(str(tmp_path))
        assert f"process {process.pid}: " in line
    finally:
        process.kill()
        process.wait()
    assert leftovers.wait_for_none(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("lines", "own"),
    [
        (["1 0 8:1 / / rw - ext4 /dev/a rw"], False),
        (["1 0 8:1 / / rw - ext4 /dev/a rw", "2 1 8:1 /r/x /r/x rw - ext4 /dev/a rw"], True),
        (
            [
                "1 0 8:1 / / rw - ext4 /dev/a rw",
                "2 1 8:2 / /r rw - ext4 /dev/b rw",
                "3 2 8:2 /x /r/x rw - ext4 /dev/b rw",
            ],
            True,
        ),
        (["1 0 8:1 / / rw - ext4 /dev/a rw", "2 1 8:2 / /r/x rw - ext4 /dev/b rw"], False),
        (["1 0 8:1 / / rw - ext4 /dev/a rw", "2 1 8:1 /other /r/x rw - ext4 /dev/a rw"], False),
    ],
)
def test_only_a_root_bound_onto_itself_is_our_mount(
    lines: list[str], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isolat.linux.mounts.mounts", lambda: parse_mountinfo("\n".join(lines)))
    assert leftovers._own_mount("/r/x") is own
    assert list(leftovers._mounts("/r/x")) == (["mount /r/x"] if own else [])


@pytest.mark.parametrize(
    ("text", "ns"),
    [("10m", 400 * 10**9), ("1.5", 1_500_000_000), ("1970-01-01T00:00:02Z", 2 * 10**9), ("2h", 0)],
)
def test_since(text: str, ns: int) -> None:
    assert times.parse_since(text, 1000 * 10**9) == ns


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "2026-13-01", "9999999-01-01"])
def test_since_of_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="not a time"):
        times.parse_since(text)


def test_sizes_and_ages() -> None:
    assert [tables.size(n) for n in (0, 1023, 1024, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [times.age(0, s * 10**9) for s in (5, 200, 9000, 400_000)] == ["5 s ago", "3 min ago", "2 h ago", "4 d ago"]
