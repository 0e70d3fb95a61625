"""Back-pressure, detached processes, the log and its rotation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.wireside import Controller, Held, log_records, start_keeper, wait_for

from isolat.wire import kinds as k

SH = "/bin/sh"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Held]:
    held = start_keeper(tmp_path / "env", "--log-bytes", "100000", "--log-files", "3")
    yield held
    held.stop()


def written(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def test_a_slow_client_holds_its_process_back_and_nobody_else(c: Controller) -> None:
    client = c.adopt("p")
    pid = c.spawn("p", ["head", "-c", "50000000", "/dev/zero"])
    wait_for(lambda: written(pid) > 400_000)
    time.sleep(0.3)
    before = written(pid)
    time.sleep(0.3)
    assert written(pid) == before < 5_000_000
    assert c.run("q", ["echo", "quick"]).stdout == b"quick\n"
    result = client.finish()
    client.close()
    assert len(result.stdout) == 50_000_000
    assert result.code == 0


def test_a_leaving_slow_client_lets_its_process_go_on(c: Controller) -> None:
    client = c.adopt("p")
    pid = c.spawn("p", ["head", "-c", "50000000", "/dev/zero"])
    wait_for(lambda: written(pid) > 400_000)
    client.close()
    assert c.exited("p").int(k.T_CODE) == 0


def test_a_detached_process_is_never_blocked(c: Controller) -> None:
    c.spawn("p", ["head", "-c", "50000000", "/dev/zero"])
    assert c.exited("p").int(k.T_CODE) == 0


def test_several_clients_get_the_same(c: Controller) -> None:
    clients = [c.adopt("p") for _ in range(3)]
    c.spawn("p", [SH, "-c", "seq 20000"])
    outs = {client.finish().stdout for client in clients}
    for client in clients:
        client.close()
    assert len(outs) == 1
    assert outs.pop().endswith(b"20000\n")


def test_the_log_has_stream_and_time(c: Controller, tmp_path: Path) -> None:
    before = time.time_ns()
    c.run("p", [SH, "-c", "echo out; sleep 0.1; echo err >&2"], flags=k.F_LOG)
    c.run("q", [SH, "-c", "echo not in the log"])
    records = list(log_records(tmp_path / "env" / "log" / "0"))
    assert [(s, d) for _, s, d in records] == [(1, b"out\n"), (2, b"err\n")]
    assert before < records[0][0] < records[1][0] < time.time_ns()


def test_the_log_rotates_and_is_capped(small: Held, tmp_path: Path) -> None:
    small.c.run("p", [SH, "-c", "seq 1 150000"], flags=k.F_LOG)
    log = tmp_path / "env" / "log"
    assert sorted(p.name for p in log.iterdir()) == ["0", "1", "2"]
    sizes = [(log / str(i)).stat().st_size for i in range(3)]
    assert sum(sizes) <= 300_000
    text = b"".join(data for i in (2, 1, 0) for _, _, data in log_records(log / str(i)))
    lines = text.splitlines()[1:]
    assert lines[-1] == b"150000"
    assert [int(line) for line in lines] == list(range(int(lines[0]), 150001))


def test_the_log_is_whole_when_main_has_ended(keeper: Held, tmp_path: Path) -> None:
    keeper.c.spawn("main", [SH, "-c", "seq 1 5000; exit 2"], flags=k.F_LOG | k.F_MAIN)
    wait_for((tmp_path / "env" / "exit.json").exists)
    text = b"".join(data for _, _, data in log_records(tmp_path / "env" / "log" / "0"))
    assert text == b"".join(b"%d\n" % i for i in range(1, 5001))
