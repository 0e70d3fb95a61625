"""What ``isolat run`` imports until its request is sent: every module costs every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..client.daemon import Daemon, Request
from ..client.keeper import Keeper

SOURCE = Path(__file__).parents[3] / "src"
PROGRAM = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv.pop(1))
from isolat.cli.main import main
code = main()
import posix
posix.write(2, "\\n".join(sorted(set(sys.modules) - before)).encode())
sys.exit(code)
"""
OURS = {
    "isolat", "isolat.cli", "isolat.cli.main", "isolat.cli.options", "isolat.client", "isolat.client.connect",
    "isolat.client.streams", "isolat.client.terminal", "isolat.wire", "isolat.wire.api", "isolat.wire.fastjson",
}  # fmt: skip
BUILT_IN = {"__future__", "_json", "_socket", "errno", "select"}


def imported(daemon: Daemon, *words: str) -> set[str]:
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(SOURCE), "--root", daemon.root, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4, done.stderr
    return set(done.stderr.split()) - BUILT_IN


def test_run_imports_only_what_it_needs(daemon: Daemon) -> None:
    daemon.runs(4)
    assert imported(daemon, "run", "--rm", "-e", "A=1", "debian", "true") == OURS | {"isolat.cli.run"}


def test_exec_imports_only_what_it_needs(daemon: Daemon) -> None:
    daemon.runs(4, verb="exec")
    assert imported(daemon, "exec", "web", "true") == OURS | {"isolat.cli.run", "isolat.cli.exec"}


def test_the_launcher_needs_no_site_and_leaves_at_once(daemon: Daemon) -> None:
    def answer(request: Request) -> None:
        keeper = Keeper()
        request.stream(keeper)
        keeper.write(1, b"hello\n")
        keeper.exit(9)
        request.ok(code=9)
        keeper.gone.wait(10)
        keeper.close()

    daemon.on("run", answer)
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from isolat.cli.main import entry; entry()"
    command = [sys.executable, "-I", "-S", "-c", program, str(SOURCE), "--root", daemon.root, "run", "debian"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (9, b"hello\n", b"")
