"""One table of cases for everything that runs a command: as an environment's application, and by exec."""

from __future__ import annotations

import os
import time

import pytest

from isolat.errors import CommandNotFound, NotExecutable
from tests.conformance.subject import Launcher, Subject

pytestmark = pytest.mark.root

FLOOD = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"


def test_streams_stay_apart(launch: Launcher) -> None:
    stream = launch("sh", "-c", "echo out; echo err >&2")
    assert stream.ended() == 0
    assert (bytes(stream.out), bytes(stream.err)) == (b"out\n", b"err\n")


def test_output_arrives_before_the_end(launch: Launcher) -> None:
    stream = launch("sh", "-c", "echo first; read x; echo second $x", stdin=True)
    stream.until_out(b"first\n")
    assert stream.exit is None
    stream.write(b"go\n")
    assert stream.ended() == 0
    assert bytes(stream.out) == b"first\nsecond go\n"


def test_binary_input_comes_through_unchanged_until_its_end(launch: Launcher) -> None:
    data = os.urandom(1 << 20)
    stream = launch("cat", stdin=True)
    stream.write(data)
    stream.close_stdin()
    assert stream.ended() == 0
    assert bytes(stream.out) == data


def test_without_input_a_reader_sees_the_end_at_once(launch: Launcher) -> None:
    assert launch.output("sh", "-c", "cat; echo done") == "done\n"


def test_a_flood_of_output_is_complete_at_the_end(launch: Launcher) -> None:
    lines = launch.output("sh", "-c", FLOOD).splitlines()
    assert lines == [f"line {n}" for n in range(20000)]


def test_a_terminal_is_one(launch: Launcher) -> None:
    stream = launch(
        "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && stty size", tty=True, stdin=True, rows=33, cols=77
    )
    assert stream.ended() == 0
    assert bytes(stream.out) == b"33 77\r\n"


def test_without_a_terminal_there_is_none(launch: Launcher) -> None:
    assert launch.output("sh", "-c", "test -t 0 || test -t 1 || test -t 2 || echo none") == "none\n"


def test_a_resize_reaches_the_application(launch: Launcher) -> None:
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done"
    stream = launch("sh", "-c", script, tty=True, stdin=True, rows=20, cols=60)
    stream.until_out(b"ready")
    stream.resize(41, 101)
    assert stream.ended() == 0
    assert b"41 101" in stream.out


def test_a_terminal_turns_ctrl_c_into_an_interrupt(launch: Launcher) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done"
    stream = launch("sh", "-c", script, tty=True, stdin=True, rows=20, cols=60)
    stream.until_out(b"ready")
    stream.write(b"\x03")
    assert stream.ended() == 9


def test_a_terminal_turns_ctrl_d_into_the_end_of_input(launch: Launcher) -> None:
    stream = launch("sh", "-c", "stty -echo; echo ready; cat; echo over", tty=True, stdin=True, rows=20, cols=60)
    stream.until_out(b"ready")
    stream.write(b"word\n\x04")
    assert stream.ended() == 0
    assert b"word" in stream.out
    assert b"over" in stream.out


def test_a_background_child_does_not_hold_up_the_end(launch: Launcher) -> None:
    began = time.monotonic()
    stream = launch("sh", "-c", "sleep 20 & echo done")
    assert stream.ended() == 0
    assert bytes(stream.out) == b"done\n"
    assert time.monotonic() - began < 10


def test_what_cannot_be_executed_is_told_apart(launch: Launcher) -> None:
    with pytest.raises(NotExecutable) as told:
        launch("/etc/passwd")
    assert told.value.exit_code == 126


@pytest.mark.parametrize("command", ["/no/such/file", "no-such-command"])
def test_what_does_not_exist_is_told_apart(launch: Launcher, command: str) -> None:
    with pytest.raises(CommandNotFound) as told:
        launch(command)
    assert told.value.exit_code == 127


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 126", 126), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_the_exit_code_is_the_programs_own(launch: Launcher, script: str, code: int) -> None:
    assert launch("sh", "-c", script).ended() == code


def test_a_signal_through_the_stream_reaches_the_process(launch: Launcher) -> None:
    stream = launch("sh", "-c", "trap 'exit 5' USR1; echo ready; while :; do sleep 0.05; done")
    stream.until_out(b"ready")
    stream.signal(10)
    assert stream.ended() == 5


def test_the_default_action_of_a_signal_is_not_disturbed(launch: Launcher) -> None:
    stream = launch("sleep", "60")
    time.sleep(0.1)
    stream.signal(15)
    assert stream.ended() == 143


def test_signals_are_neither_blocked_nor_ignored(launch: Launcher) -> None:
    status = dict(line.split(":", 1) for line in launch.output("cat", "/proc/self/status").splitlines())
    assert {name: int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")} == {
        "SigBlk": 0,
        "SigIgn": 0,
        "SigCgt": 0,
    }


def test_no_descriptor_but_the_three_is_open(launch: Launcher) -> None:
    open_ones = launch.output("sh", "-c", "ls /proc/$$/fd").split()
    assert [fd for fd in open_ones if int(fd) < 255 and int(fd) > 2 and int(fd) != 10] == []


def test_the_working_directory(launch: Launcher) -> None:
    assert launch.output("pwd", working_dir="/tmp") == "/tmp\n"


def test_the_environments_variables(launch: Launcher) -> None:
    values = {"PLAIN": "one", "SPACES": " two  words ", "LINES": "a\nb", "EQUALS": "x=y=z", "EMPTY": ""}
    wanted = [f"{name}={value}" for name, value in values.items()]
    found = launch.output("env", "-0", environment=wanted).split("\0")
    assert set(wanted) <= set(found)
    assert any(entry.startswith("PATH=/") for entry in found)


def test_arguments_that_are_no_text(launch: Launcher) -> None:
    stream = launch("printf", "%s|", "\udcff\udc80", "ä", "", "a b", "$HOME")
    assert stream.ended() == 0
    assert bytes(stream.out) == b"\xff\x80|\xc3\xa4||a b|$HOME|"


def test_a_long_command_line(launch: Launcher) -> None:
    words = ["w" * 1000] * 200
    assert launch.output("sh", "-c", "echo $#", "sh", *words) == "200\n"


@pytest.mark.applies(to=lambda s: s.can.users)
def test_another_user(launch: Launcher, subject: Subject) -> None:
    assert launch.output("sh", "-c", "id -u; id -g", user="1234:2345") == "1234\n2345\n"
    assert launch.output("id", "-un", user="nobody") == "nobody\n" if launch.how == "exec" else True


@pytest.mark.applies(to=lambda s: s.can.users)
def test_a_user_that_does_not_exist_is_refused(launch: Launcher, subject: Subject) -> None:
    from isolat.errors import StartFailed

    with pytest.raises(StartFailed) as told:
        launch("true", user="nosuchuser")
    assert told.value.exit_code == 125
