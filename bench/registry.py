"""Debian's registry on a port of the loopback interface, with a storage of its own, for the length of a bench."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench import lib

PROGRAM = "/usr/bin/docker-registry"
_START_S = 20.0
_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""


def missing() -> str:
    return "" if os.access(PROGRAM, os.X_OK) else f"{PROGRAM} not found: apt-get install docker-registry"


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Its address, as it stands before an image's name."""
    root = Path(tempfile.mkdtemp(prefix="isolat-bench-registry-"))
    address = f"127.0.0.1:{_free_port()}"
    (root / "config.yml").write_text(_CONFIG.format(storage=root / "storage", address=address))
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        _wait_ready(address, process, root / "log")
        yield address
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(root, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/", timeout=1):
            return
        time.sleep(0.05)
    raise lib.BenchError(f"the registry did not start: {log.read_text(errors='replace')[-800:]}")
