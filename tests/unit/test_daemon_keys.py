"""The daemon has nobody's keys: what it starts would inherit them, down to a machine's QEMU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, pathlib
from isolat.daemon import main
libc = ctypes.CDLL(None)
keyring = lambda: libc.syscall({"x86_64": 250, "aarch64": 219}[main.os.uname().machine], 0, -3, 0)
before = keyring()
def begun(root):
    print(before > 0, keyring() > 0, before != keyring())
    raise SystemExit
main._make_root = begun
main.serve(pathlib.Path("/nowhere"), 0, -1)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the daemon needs root")
def test_the_session_keyring_of_who_starts_the_daemon_is_not_its_own() -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30)
    assert said.stdout.split() == ["True"] * 3
