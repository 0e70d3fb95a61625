"""``isolat run`` as a user types it: output, exit codes, pipes, options."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import traces
from tests.support.roots import REPOSITORY, Root

pytestmark = pytest.mark.root


def test_it_computes(root: Root) -> None:
    assert root.ok("run", "--rm", "debian", "python3", "-c", "print(6*7)") == "42"


def test_a_pipe_in_and_out(root: Root) -> None:
    assert root.ok("run", "-i", "--rm", "debian", "cat", input=b"hi\n") == "hi"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["debian", "true"], 0),
        (["debian", "sh", "-c", "exit 3"], 3),
        (["--pull", "never", "no-such-image", "true"], 125),
        (["--no-such-option", "debian", "true"], 125),
        (["--memory", "nonsense", "debian", "true"], 125),
        (["debian", "/etc/passwd"], 126),
        (["debian", "no-such-command"], 127),
        (["debian", "sh", "-c", "kill -9 $$"], 137),
    ],
)
def test_exit_codes(root: Root, words: list[str], code: int) -> None:
    done = root.cli("run", "--rm", *words)
    assert done.returncode == code
    assert bool(done.stderr) == (code in (125, 126, 127))
    assert b"Traceback" not in done.stderr


def test_an_entrypoint_goes_before_the_command(root: Root) -> None:
    assert root.ok("run", "--rm", "--entrypoint", "echo", "debian", "a", "b") == "a b"
    assert (
        root.cli("run", "--rm", "--entrypoint", "", "debian").returncode == 125
    )  # and the image's command is not taken


def test_it_is_asked_to_end_with_the_signal_that_it_was_given(root: Root) -> None:
    script = "trap 'exit 5' USR1; echo ready; while :; do sleep 0.1; done"
    root.ok("run", "-d", "--name", "signalled", "--stop-signal", "SIGUSR1", "debian", "sh", "-c", script)
    while "ready" not in root.ok("logs", "signalled"):
        time.sleep(0.05)
    root.ok("stop", "signalled")
    assert root.ok("wait", "signalled") == "5"
    root.ok("rm", "signalled")
    assert b"is no signal" in root.cli("run", "--stop-signal", "SIGNOTHING", "debian", "true").stderr


def test_without_rm_it_stays_until_removed(root: Root) -> None:
    root.ok("run", "--name", "stays", "debian", "true")
    assert "stays" not in root.ok("ps")
    assert "stays" in root.ok("ps", "-a")
    root.ok("rm", "stays")
    assert "stays" not in root.ok("ps", "-a")


def test_standard_output_and_error_stay_apart(root: Root) -> None:
    done = root.cli("run", "--rm", "debian", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_a_hundred_megabytes_come_through_unchanged(root: Root, tmp_path: Path) -> None:
    block = os.urandom(1 << 20)
    with (tmp_path / "in").open("wb") as file:
        for n in range(100):
            file.write(n.to_bytes(4, "little") + block)
    wanted = hashlib.sha256((tmp_path / "in").read_bytes()).hexdigest()
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        process = root.popen("run", "-i", "--rm", "debian", "cat", stdin=source, stdout=target)
        assert process.wait(60) == 0
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == wanted


def test_a_reader_that_has_enough_ends_it_as_in_a_shell(root: Root) -> None:
    writer = root.popen("run", "--rm", "debian", "yes", stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.read(4) == b"y\ny\n"
    writer.stdout.close()
    assert writer.wait(30) == 141
    assert traces.none_of_environments(root.path) == []


def test_an_interrupt_ends_it(root: Root) -> None:
    process = root.popen("run", "--rm", "debian", "sh", "-c", "echo up; exec sleep 60", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stdout.close()


def test_a_killed_client_of_rm_leaves_an_environment_that_can_be_removed(root: Root) -> None:
    process = root.popen("run", "--name", "orphan", "debian", "sh", "-c", "echo up; sleep 60", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert root.state("orphan") == "running"
    root.ok("rm", "-f", "orphan")


def test_variables_directory_and_user(root: Root) -> None:
    done = root.cli(
        *("run", "--rm", "-e", "A=b c", "-e", "FROM_CALLER", "-w", "/var", "-u", "1000:1001", "debian"),
        *("sh", "-c", 'echo "$A|$FROM_CALLER|$(pwd)|$(id -u):$(id -g)"'),
        env={"FROM_CALLER": "yes"},
    )
    assert done.stdout == b"b c|yes|/var|1000:1001\n"


def test_a_read_only_root_with_a_tmpfs(root: Root) -> None:
    script = "touch /x 2>/dev/null || echo closed; echo open > /run/x && cat /run/x"
    assert root.ok("run", "--rm", "--read-only", "--tmpfs", "/run", "debian", "sh", "-c", script) == "closed\nopen"


def test_no_network_by_default_and_the_hosts_on_request(root: Root) -> None:
    assert root.ok("run", "--rm", "debian", "ls", "/sys/class/net") == "lo"
    hosts = sorted(path.name for path in Path("/sys/class/net").iterdir())
    assert root.ok("run", "--rm", "--net", "host", "debian", "ls", "/sys/class/net").split() == hosts


def test_the_host_network_reaches_a_server_of_the_host(root: Root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo reached"
        assert root.ok("run", "--rm", "--net", "host", "debian", "bash", "-c", script) == "reached"
        done = root.cli("run", "--rm", "debian", "bash", "-c", script)
        assert done.returncode != 0


def test_the_host_name_and_limits(root: Root) -> None:
    script = "cat /proc/sys/kernel/hostname; cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || true"
    said = root.ok(
        "run", "--rm", "--hostname", "here", "--memory", "64m", "--cpus", "0.5", "debian", "sh", "-c", script
    )
    assert said.splitlines()[0] == "here"
    assert said.splitlines()[1:] in ([str(64 << 20)], [])


def test_a_time_limit_says_what_happened(root: Root) -> None:
    began = time.monotonic()
    done = root.cli("run", "--rm", "--timeout", "1s", "debian", "sleep", "60")
    assert time.monotonic() - began < 15
    assert done.returncode == 143
    assert b"timeout" in done.stderr.lower()


def test_a_taken_name_is_refused_with_the_remedy(root: Root) -> None:
    root.ok("run", "-d", "--name", "taken", "debian", "sleep", "600")
    done = root.cli("run", "--name", "taken", "debian", "true")
    assert done.returncode == 125
    assert b"isolat rm taken" in done.stderr


def test_the_plan_is_told_and_nothing_done(root: Root) -> None:
    said = root.ok("run", "--plan", "debian", "true")
    assert "layer container" in said
    assert "mount" in said
    assert root.environments() == []


def test_every_layer_runs_it(root: Root) -> None:
    for layer in ("host", "container", "container/fake"):
        assert root.ok("run", "--rm", "--layer", layer, "debian", "echo", layer) == layer


def test_the_host_image_runs_the_hosts_own_programs(root: Root) -> None:
    root.ok("image", "bootstrap", "host")
    assert root.ok("run", "--rm", "host", "sh", "-c", "echo ok; ls /home /root 2>/dev/null | wc -l").startswith("ok")
    root.ok("rmi", "host")


def test_another_oci_runtime(root: Root) -> None:
    if not Path("/usr/sbin/runc").exists() and not Path("/usr/bin/runc").exists():
        pytest.skip("runc is not installed")
    assert root.ok("run", "--rm", "--oci-runtime", "runc", "debian", "echo", "by runc") == "by runc"


def test_help_and_version_need_nothing(root: Root) -> None:
    assert "run" in root.ok("--help")
    assert root.ok("--version").split()[-1][0].isdigit()
    assert (REPOSITORY / "pyproject.toml").exists()
