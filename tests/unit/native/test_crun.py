"""The real thing: an init as PID 1 of a crun container in a user namespace, launched through a keeper."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.native.wireside import BUILD, Controller, Held, start_keeper, wait_for

from isolat.wire import kinds as k

BASE = 100_000

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which("crun") or not Path("/bin").is_symlink(), reason="no crun, or no merged /usr"),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
]


def make_root(root: Path) -> None:
    for name in ("usr", "etc", "dev", "proc", "sys", "tmp", ".isolat"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nuser:x:1000:\nwheel:x:10:user\n")
    (root / ".isolat" / "init").touch()
    subprocess.run(["chown", "-R", f"{BASE}:{BASE}", root], check=True)


def make_bundle(bundle: Path) -> None:
    bundle.mkdir()
    make_root(bundle / "rootfs")
    subprocess.run(["crun", "spec"], cwd=bundle, check=True)
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    config["root"]["readonly"] = False
    process = config["process"]
    process.update(terminal=False, args=["/.isolat/init"], noNewPrivileges=True, rlimits=[])
    for name in process["capabilities"]:
        process["capabilities"][name] = ["CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    config["mounts"] = [m for m in config["mounts"] if m["type"] != "cgroup"]
    for source, target in ((BUILD / "isolat-init", "/.isolat/init"), (Path("/usr"), "/usr")):
        bind = {"destination": target, "source": str(source), "type": "bind", "options": ["bind", "ro"]}
        config["mounts"].append(bind)
    linux = config["linux"]
    linux["namespaces"] = [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount", "user")]
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": BASE, "size": 65536}]
    linux["resources"] = {"pids": {"limit": 64}}
    (bundle / "config.json").write_text(json.dumps(config))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Held, str]]:
    for p in (tmp_path, *tmp_path.parents):
        if p.stat().st_uid == os.getuid() and p != Path("/") and p.stat().st_mode & 0o077 == 0:
            p.chmod(0o711)  # the container's root is nobody out here
    make_bundle(tmp_path / "bundle")
    held = start_keeper(tmp_path / "env", "--hybrid")
    name = f"isolat-test-{os.getpid()}"
    pidfile = tmp_path / "pid"
    options = ["--pid-file", str(pidfile), "--preserve-fds", "1", "-b", str(tmp_path / "bundle")]
    argv = ["crun", "run", "-d", *options, name]
    try:
        held.c.spawn(
            "guest", argv, flags=k.F_CONTROL | k.F_LAUNCHER, more=[(k.T_PIDFILE, bytes(pidfile))],
            env=["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR=/run"],
        )  # fmt: skip
        yield held, name
    finally:
        if held.process.poll() is None:
            held.c.step(6, [(k.T_ARGV, b"true"), *((k.T_INVERSE, a.encode()) for a in ("crun", "delete", "-f", name))],
                        revert=True)  # fmt: skip
            held.stop()
        else:
            subprocess.run(["crun", "delete", "-f", name], check=False, capture_output=True)


def test_a_container_from_start_to_end(place: tuple[Held, str], tmp_path: Path) -> None:
    held, _ = place
    c: Controller = held.c
    script = "id -u; cat /proc/1/comm; echo $HOME; echo e >&2"
    assert c.run("a", ["sh", "-c", script], to="guest").stdout == b"0\ninit\n/root\n"
    assert c.run("b", ["cat"], to="guest", stdin=bytes(3 << 20)).stdout == bytes(3 << 20)
    ids = c.run("c", ["id"], to="guest", more=[(k.T_USER, "user")]).stdout
    assert ids == b"uid=1000(user) gid=1000(user) groups=1000(user),10(wheel)\n"
    client = c.adopt("guest/t", stdin=True)
    c.spawn("t", ["sh", "-c", "tty; stty size; read x; echo got $x; exit 7"], to="guest", flags=k.F_TTY | k.F_STDIN,
            more=[(k.T_ROWS, 30), (k.T_COLS, 100)])  # fmt: skip
    client.write(b"hello\n")
    result = client.finish()
    client.close()
    for line in (b"/dev/pts/0\r\n", b"30 100\r\n"):  # the terminal's echo of what was typed may come between
        assert line in result.stdout
    assert result.stdout.endswith(b"got hello\r\n")
    assert result.code == 7
    # the init can neither be killed nor looked into from inside
    assert c.run("d", ["sh", "-c", "kill -9 1; cat /proc/1/environ || exit 5"], to="guest").code == 5
    outside = c.procs()["guest"].int(k.T_PID)
    assert Path(f"/proc/{outside}/ns/user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino
    script = "head -c 50000 /dev/zero; sleep 1000 & exit 4"
    result = c.run("main", ["sh", "-c", script], to="guest", flags=k.F_MAIN | k.F_LOG)
    assert (len(result.stdout), result.code) == (50000, 4)
    assert json.loads((tmp_path / "env" / "exit.json").read_text())["code"] == 4
    assert c.exited("guest").int(k.T_SIGNAL) == 9


def test_a_killed_keeper_takes_its_container_with_it(place: tuple[Held, str]) -> None:
    held, _ = place
    init = held.c.procs()["guest"].int(k.T_PID)
    held.c.spawn("p", ["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1001"], to="guest", flags=k.F_MAIN)
    held.kill()
    wait_for(lambda: not Path(f"/proc/{init}").exists(), "the container's end")


def test_what_crun_says_comes_with_the_error(tmp_path: Path, c: Controller) -> None:
    with pytest.raises(Exception, match=r"launch.*no-such-bundle"):
        argv = ["crun", "run", "-d", "-b", "/no-such-bundle", "isolat-x"]
        c.spawn("guest", argv, flags=k.F_CONTROL | k.F_LAUNCHER, more=[(k.T_PIDFILE, b"/none")])
