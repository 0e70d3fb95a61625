"""A person at a terminal: a shell inside, resizing, interrupts, stopping and going on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.roots import Root, plain_environment
from tests.support.terminal import Terminal

pytestmark = pytest.mark.root

ENVIRONMENT = {"PS1": "$ ", "TERM": "dumb"}


@pytest.fixture
def shell(root: Root) -> Iterator[Terminal]:
    """``isolat run -it --rm debian bash``, once its prompt is there."""
    argv = root.argv("run", "-it", "--rm", "-e", "PS1=ready> ", "debian", "bash", "--norc", "--noprofile")
    with Terminal(argv, plain_environment(), rows=30, cols=100) as terminal:
        terminal.until("ready> ")
        yield terminal


def test_a_shell_echoes_and_answers(shell: Terminal) -> None:
    shell.type("echo $((6*7)) done\n")
    shell.until("echo $((6*7)) done")
    shell.until("42 done")
    shell.until("ready> ")
    shell.type("exit 5\n")
    assert shell.ended() == 5


def test_the_size_is_the_callers_and_follows_it(shell: Terminal) -> None:
    shell.type("stty size\n")
    shell.until("30 100")
    shell.until("ready> ")
    shell.resize(41, 87)
    shell.type("sleep 0.3; stty size\n")
    shell.until("41 87")
    shell.type("exit\n")
    assert shell.ended() == 0


def test_ctrl_c_interrupts_what_runs_inside_not_the_shell(shell: Terminal) -> None:
    shell.type("echo g''o; sleep 100\n")
    shell.until("go\r\n")
    time.sleep(0.2)
    shell.type("\x03")
    shell.until("ready> ")
    shell.type("echo code $?\n")
    shell.until("code 130")
    shell.type("exit 0\n")
    assert shell.ended() == 0


def test_ctrl_z_stops_a_job_inside_and_fg_goes_on(shell: Terminal) -> None:
    shell.type("cat\n")
    shell.until("cat")
    time.sleep(0.3)
    shell.type("one\n")
    shell.until("one\r\none")
    shell.type("\x1a")
    shell.until("Stopped")
    shell.until("ready> ")
    shell.type("fg\n")
    shell.until("fg\r\n")
    time.sleep(0.3)
    shell.type("two\n")
    shell.until("two\r\ntwo")
    shell.type("\x04")
    shell.until("ready> ")
    shell.type("exit 3\n")
    assert shell.ended() == 3


def test_ctrl_d_ends_the_shell(shell: Terminal) -> None:
    shell.type("(exit 9)\n\x04")
    assert shell.ended() == 9


def test_the_terminal_is_as_before_afterwards(root: Root) -> None:
    argv = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(argv, {**plain_environment(), "PS1": "outer> "}) as outer:
        outer.until("outer> ")
        outer.type(
            " ".join(root.argv("run", "-it", "--rm", "-e", "PS1=inn''er'> '", "debian", "bash", "--norc")) + "\n"
        )
        outer.until("inner> ")
        assert not outer.cooked
        outer.type("kill -9 $$\n")
        outer.until("outer> ")
        outer.type("echo code $?; stty -a | tr ' ' '\\n' | grep -cx -e icanon -e echo -e isig\n")
        outer.until("code 137")
        outer.until("3")
        outer.type("exit\n")
        assert outer.ended() == 0


def test_a_run_without_a_terminal_is_a_job_of_the_outer_shell(root: Root) -> None:
    argv = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(argv, {**plain_environment(), "PS1": "outer> "}) as outer:
        outer.until("outer> ")
        script = "'echo up; i=0; while [ $i -lt 30 ]; do i=$((i+1)); sleep 0.1; done; echo over; exit 4'"
        outer.type(" ".join(root.argv("run", "--rm", "debian", "sh", "-c", script)) + "\n")
        outer.until("up\r\n")
        outer.type("\x1a")
        outer.until("Stopped")
        outer.until("outer> ")
        outer.type("fg\n")
        outer.until("over\r\n", 30)
        outer.until("outer> ")
        outer.type("echo code $?\n")
        outer.until("code 4")
        outer.type("exit\n")
        assert outer.ended() == 0


def test_ctrl_c_ends_a_run_without_a_terminal(root: Root) -> None:
    with Terminal(root.argv("run", "--rm", "debian", "sh", "-c", "echo up; exec sleep 60"), plain_environment()) as one:
        one.until("up")
        one.type("\x03")
        assert one.ended() == 130


def test_exec_gives_a_shell_too(root: Root) -> None:
    root.ok("run", "-d", "--name", "box", "debian", "sleep", "600")
    argv = root.argv("exec", "-it", "-e", "PS1=in> ", "box", "bash", "--norc", "--noprofile")
    with Terminal(argv, plain_environment(), rows=20, cols=70) as terminal:
        terminal.until("in> ")
        terminal.type("stty size; echo $TERM\n")
        terminal.until("20 70")
        terminal.type("exit 6\n")
        assert terminal.ended() == 6


def test_attach_to_a_detached_shell(root: Root) -> None:
    root.ok("run", "-dit", "--name", "box", "-e", "PS1=in> ", "debian", "bash", "--norc", "--noprofile")
    with Terminal(root.argv("attach", "box"), plain_environment()) as terminal:
        terminal.type("echo $((40+2))\n")
        terminal.until("42")
        terminal.type("exit 7\n")
        assert terminal.ended() == 7


def test_a_terminal_without_one_is_refused(root: Root) -> None:
    done = root.cli("run", "-it", "--rm", "debian", "true")
    assert done.returncode == 125
    assert b"TTY" in done.stderr
