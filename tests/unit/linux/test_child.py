"""Child programs end, tell why, and leave nothing behind."""

from __future__ import annotations

import os
import time

import pytest

from isolat.deadline import NEVER, Deadline
from isolat.errors import DeadlineExceeded, StoreError
from isolat.linux import child


def test_lines_of_both_streams_arrive_in_order() -> None:
    lines: list[str] = []
    child.run(["sh", "-c", "echo one; echo two >&2; printf three"], "trying", NEVER, on_line=lines.append)
    assert lines == ["one", "two", "three"]


def test_a_failure_tells_its_code_and_its_last_words() -> None:
    with pytest.raises(StoreError, match="trying failed: it ended with code 3") as caught:
        child.run(["sh", "-c", "echo why; exit 3"], "trying", NEVER)
    assert caught.value.details == ("why",)


def test_a_missing_program_is_told() -> None:
    with pytest.raises(StoreError, match="could not start /nowhere/program"):
        child.run(["/nowhere/program"], "trying", NEVER)


def test_one_that_takes_too_long_is_killed_with_its_children(tmp_path: object) -> None:
    lines: list[str] = []
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        child.run(["sh", "-c", "sleep 50 & echo $!; wait"], "trying", Deadline(0.3), on_line=lines.append)
    assert time.monotonic() - begun < 5
    for _ in range(100):
        if not _alive(int(lines[0])):
            return
        time.sleep(0.02)
    raise AssertionError("the grandchild lives on")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_nothing_of_our_environment_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    found = child.clean_environment({"TMPDIR": "/t"})
    assert "SECRET_TOKEN" not in found
    assert (found["http_proxy"], found["TMPDIR"], found["PATH"]) == ("http://proxy:1", "/t", child.SAFE_PATH)
    assert "SECRET_TOKEN" in os.environ


def test_an_endless_line_does_not_fill_the_memory() -> None:
    lines: list[str] = []
    child.run(["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x"], "trying", NEVER, on_line=lines.append)
    assert max(len(line) for line in lines) <= 4096
