from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from pathlib import Path

import pytest
from tests.unit.native.wireside import Controller, Held, Refused, alive, spawn_fields, wait_for

from isolat.wire import kinds as k

SH = "/bin/sh"


def test_hello_answers_version_role_and_pid(keeper: Held) -> None:
    frame = keeper.c.hello()
    assert (frame.int(k.T_VERSION), frame.text(k.T_ROLE), frame.int(k.T_PID)) == (1, "keeper", keeper.pid)


@pytest.mark.parametrize("code", [0, 3, 127, 255])
def test_exit_codes(c: Controller, code: int) -> None:
    result = c.run("p", [SH, "-c", f"exit {code}"])
    assert result.code == code
    event = c.exited("p")
    assert (event.int(k.T_CODE), event.int(k.T_SIGNAL)) == (code, 0)
    start, end = event.ints(k.T_TIME)
    assert 0 < int(start) <= int(end)


def test_a_signal_is_told_apart(c: Controller) -> None:
    result = c.run("p", [SH, "-c", "kill -TERM $$"])
    assert result.exited is not None
    assert (result.code, result.exited.int(k.T_SIGNAL)) == (128 + 15, 15)


@pytest.mark.parametrize(
    ("argv", "code"), [("nosuchcommand", 127), ("/no/such/file", 127), ("/etc", 126), ("/etc/passwd", 126)]
)
def test_what_can_not_be_executed_is_an_error_and_no_exit(c: Controller, argv: str, code: int) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("p", [argv])
    assert (info.value.stage, info.value.code) == ("exec", code)
    assert f'exec: "{argv}"' in info.value.message
    assert c.procs() == {}


def test_a_command_is_found_in_path_of_its_environment(c: Controller, tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("#!/bin/sh\necho from the given path")
    (tmp_path / "hello").chmod(0o755)
    assert c.run("p", ["hello"], env=[f"PATH=/nowhere:{tmp_path}"]).stdout == b"from the given path\n"
    with pytest.raises(Refused) as info:
        c.spawn("q", ["hello"])
    assert info.value.message == 'exec: "hello": not found in PATH'


def test_bad_cwd_and_unknown_user_name_their_stage(c: Controller) -> None:
    for stage, field in (("cwd", (k.T_CWD, b"/etc/passwd/x")), ("user", (k.T_USER, "nobody-has-this-name"))):
        with pytest.raises(Refused) as info:
            c.spawn("p", ["true"], more=[field])
        assert (info.value.stage, info.value.code) == (stage, 0)


def test_missing_cwd_is_made(c: Controller, tmp_path: Path) -> None:
    cwd = tmp_path / "a" / "b"
    assert c.run("p", ["pwd"], more=[(k.T_CWD, bytes(cwd))]).stdout.decode() == f"{cwd}\n"


def test_streams_stay_apart_and_exited_comes_last(c: Controller) -> None:
    result = c.run("p", [SH, "-c", "echo out; echo err >&2"])
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.order[-1] == k.EXITED
    assert sorted(result.eof) == [1, 2]


def test_ten_megabytes_through_stdin_and_back(c: Controller) -> None:
    data = random.Random(1).randbytes(10 << 20)
    result = c.run("p", ["cat"], stdin=data)
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
    assert result.code == 0


def test_a_client_never_hangs_on_a_process_that_does_not_read(c: Controller) -> None:
    result = c.run("p", [SH, "-c", "exec 0<&-; sleep 0.2; echo done"], stdin=bytes(2 << 20))
    assert result.stdout == b"done\n"


def test_a_client_that_disconnects_ends_stdin_after_what_it_sent(c: Controller) -> None:
    client = c.adopt("p", stdin=True)
    c.spawn("p", [SH, "-c", "sleep 0.2; wc -c"], flags=k.F_STDIN)
    client.write(bytes(200_000))
    watcher = c.adopt("p")
    client.close()
    assert watcher.finish().stdout.strip() == b"200000"
    watcher.close()


def test_tty_and_resize(c: Controller) -> None:
    client = c.adopt("p", stdin=True)
    script = "tty; stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.05; done"
    c.spawn("p", [SH, "-c", script], flags=k.F_TTY | k.F_STDIN, more=[(k.T_ROWS, 30), (k.T_COLS, 100)])
    client.read_until(b"ready\r\n")
    client.send(k.RESIZE, [(k.T_ROWS, 40), (k.T_COLS, 120)])
    result = client.finish()
    client.close()
    assert b"30 100\r\n" in result.stdout
    assert b"40 120\r\n" in result.stdout
    assert result.stdout.startswith(b"/dev/pts/")
    assert (result.code, result.eof) == (7, [1])


def test_control_c_reaches_the_foreground_of_a_tty(c: Controller) -> None:
    # with a trap: a dash without one forgets a SIGINT that comes while it forks
    script = "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done"
    client = c.adopt("p", stdin=True)
    c.spawn("p", [SH, "-c", script], flags=k.F_TTY | k.F_STDIN)
    client.read_until(b"ready")
    client.write(b"\x03")
    result = client.finish()
    client.close()
    assert result.code == 9


def test_a_background_child_does_not_hold_back_the_exit(c: Controller) -> None:
    result = c.run("p", [SH, "-c", "sleep 30 & echo $!; exit 5"])
    assert (result.code, result.eof[-1] in {1, 2}) == (5, True)
    os.kill(int(result.stdout), 9)


def test_what_was_written_before_the_exit_is_not_lost(c: Controller) -> None:
    for i in range(20):
        result = c.run(f"p{i}", [SH, "-c", "head -c 60000 /dev/zero; exit 1"])
        assert (len(result.stdout), result.code) == (60000, 1)


def test_a_late_client_is_told_the_end(c: Controller) -> None:
    c.spawn("p", [SH, "-c", "exit 9"])
    c.exited("p")
    client = c.adopt("p")
    assert client.finish().code == 9
    client.close()


def test_spawning_a_key_again_answers_with_the_same_process(c: Controller) -> None:
    pid = c.spawn("p", ["sleep", "60"])
    assert c.spawn("p", ["false"]) == pid
    assert Path(f"/proc/{pid}/exe").readlink().name in {"sleep", "coreutils", "busybox"}
    c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 9)])
    assert c.exited("p").int(k.T_SIGNAL) == 9
    c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 9)])  # ended: no error
    assert c.spawn("p", ["false"]) == pid


def test_forget(c: Controller) -> None:
    c.spawn("p", ["sleep", "60"])
    with pytest.raises(Refused):
        c.ask(k.FORGET, [(k.T_KEY, "p")])
    c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 15), (k.T_SCOPE, 1)])
    c.exited("p")
    assert c.procs("p")["p"].int(k.T_STATE) == 1
    c.ask(k.FORGET, [(k.T_KEY, "p")])
    assert c.procs() == {}


def test_a_signal_to_an_unknown_key_is_an_error(c: Controller) -> None:
    with pytest.raises(Refused) as info:
        c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 9)])
    assert (info.value.stage, info.value.errno) == ("key", 2)


def test_the_group_gets_a_signal(c: Controller) -> None:
    client = c.adopt("p")
    c.spawn("p", [SH, "-c", "sleep 60 & echo $!; wait"])
    child = int(client.read_until(b"\n"))
    c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 9), (k.T_SCOPE, 1)])
    client.finish()
    client.close()
    wait_for(lambda: not alive(child), "the child's end")


def test_everything_gets_a_signal_orphans_too(c: Controller) -> None:
    client = c.adopt("p")
    c.spawn("p", [SH, "-c", "(setsid sleep 60 & echo $!); sleep 60"])
    orphan = int(client.read_until(b"\n"))
    c.spawn("q", ["sleep", "60"])
    c.ask(k.SIGNAL, [(k.T_SIGNAL, 9), (k.T_SCOPE, 2)])
    assert client.finish().code == 137
    client.close()
    assert c.exited("q").int(k.T_SIGNAL) == 9
    wait_for(lambda: not alive(orphan), "the orphan's end")


def test_two_that_spawn_the_same_key_get_the_same_answer(c: Controller) -> None:
    ids = [c.send(k.SPAWN, spawn_fields("p", ["sleep", "60"])) for _ in range(3)]
    assert len({c.answer(id).int(k.T_PID) for id in ids}) == 1


def test_a_client_may_signal_its_own_process_only(c: Controller) -> None:
    client = c.adopt("p")
    other = c.spawn("q", ["sleep", "60"])
    c.spawn("p", ["sleep", "60"])
    client.send(k.SIGNAL, [(k.T_KEY, "q"), (k.T_SIGNAL, 15)])
    result = client.finish()
    client.close()
    assert result.code == 128 + 15
    assert alive(other)


@pytest.mark.parametrize("kind", [k.SPAWN, k.STEP, k.QUIT, k.ADOPT, k.OK, k.HELLO, k.CREDIT])
def test_a_client_that_asks_for_more_is_cut_off(c: Controller, kind: int) -> None:
    client = c.adopt("p")
    client.send(kind)
    assert client.gone()
    client.close()
    c.hello()


def test_a_failed_start_is_told_to_the_waiting_client(c: Controller) -> None:
    client = c.adopt("p")
    with pytest.raises(Refused):
        c.spawn("p", ["nosuchcommand"])
    result = client.finish()
    client.close()
    assert result.exited is None
    assert result.error is not None
    assert result.error.int(k.T_CODE) == 127


def test_a_child_gets_three_descriptors_clean_signals_and_its_own_session(c: Controller) -> None:
    script = "ls /proc/self/fd; grep -E 'Sig(Ign|Blk)' /proc/self/status; ps -o sid= -p $$; echo $$; umask"
    words = c.run("p", [SH, "-c", script]).stdout.split()
    assert words[:4] == [b"0", b"1", b"2", b"3"]  # 3 is ls's own
    assert words[4:8] == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]
    assert words[8] == words[9]
    assert words[10] == b"0022"


def test_home_comes_from_passwd(c: Controller) -> None:
    assert c.run("p", [SH, "-c", "echo $HOME"]).stdout == b"/root\n"
    assert c.run("q", [SH, "-c", "echo $HOME"], env=["HOME=/x"]).stdout == b"/x\n"


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "ids"),
    [("daemon", "1 1 1"), ("1:2", "1 2 "), ("daemon:bin", "1 2 "), ("4242", "4242 0 0"), ("4242:4343", "4242 4343 ")],
)
def test_users(c: Controller, user: str, ids: str) -> None:
    script = 'echo "$(id -u) $(id -g) $(sed -n "s/^Groups:[[:space:]]*//p" /proc/self/status)"'
    text = c.run("p", [SH, "-c", script], more=[(k.T_USER, user)]).stdout.decode()
    assert text.split() == ids.split()


@pytest.mark.root
def test_root_changes_the_root(c: Controller, tmp_path: Path) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("p", ["/bin/true"], more=[(k.T_ROOT, bytes(tmp_path))])
    assert (info.value.stage, info.value.code) == ("exec", 127)


def test_exit_record_of_main(keeper: Held, tmp_path: Path) -> None:
    result = keeper.c.run("main", [SH, "-c", "echo bye; exit 4"], flags=k.F_MAIN | k.F_LOG)
    record = json.loads((tmp_path / "env" / "exit.json").read_text())
    assert (record["version"], record["code"], record["signal"], result.code) == (1, 4, None, 4)
    assert result.exited is not None
    assert [record["started_ns"], record["ended_ns"]] == result.exited.ints(k.T_TIME)


def test_exit_record_of_a_killed_main(keeper: Held, tmp_path: Path) -> None:
    keeper.c.spawn("main", ["sleep", "60"], flags=k.F_MAIN)
    keeper.c.ask(k.SIGNAL, [(k.T_KEY, "main"), (k.T_SIGNAL, 9)])
    event = keeper.c.exited("main")
    record = json.loads((tmp_path / "env" / "exit.json").read_text())
    assert (record["code"], record["signal"]) == (None, 9)
    assert (event.int(k.T_CODE), event.int(k.T_SIGNAL)) == (137, 9)


def test_the_keeper_ends_after_main_without_a_controller(keeper: Held) -> None:
    keeper.c.run("main", ["true"], flags=k.F_MAIN)
    assert keeper.process.poll() is None
    keeper.c.close()
    assert keeper.process.wait(5) == 0


def test_the_keeper_outlives_its_controller_while_main_runs(keeper: Held, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keeper.c.spawn("main", [SH, "-c", f"cat {fifo}; exit 3"], flags=k.F_MAIN)
    keeper.c.close()
    with fifo.open("w") as f:
        assert keeper.process.poll() is None
        f.write("x")
    assert keeper.process.wait(5) == 0
    assert json.loads((tmp_path / "env" / "exit.json").read_text())["code"] == 3


def test_quit_kills_what_is_held(keeper: Held) -> None:
    client = keeper.c.adopt("p")
    pid = keeper.c.spawn("p", [SH, "-c", "trap '' TERM; sleep 60 & echo $!; wait"])
    child = int(client.read_until(b"\n"))
    keeper.c.ask(k.QUIT)
    assert keeper.process.wait(5) == 0
    client.close()
    assert not alive(pid)
    assert not alive(child)


def test_sigterm_does_not_end_it(keeper: Held) -> None:
    keeper.c.hello()
    for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        keeper.process.send_signal(n)
    keeper.c.hello()


def test_its_processes_die_with_it(keeper: Held) -> None:
    pid = keeper.c.spawn("p", ["sleep", "60"])
    keeper.kill()
    wait_for(lambda: not alive(pid), "its process's end")
