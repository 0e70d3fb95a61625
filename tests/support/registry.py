"""Debian's own registry on a port of the loopback interface, with a storage of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = "/usr/bin/docker-registry"
_START_S = 30.0
_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""


@contextlib.contextmanager
def running(directory: Path, more: str = "") -> Iterator[str]:
    """Its address, as it stands before an image's name. ``more``: further lines of its configuration."""
    if not os.access(PROGRAM, os.X_OK):
        pytest.skip("docker-registry is not installed: apt-get install docker-registry")
    directory.mkdir()
    address = f"127.0.0.1:{_free_port()}"
    (directory / "config.yml").write_text(_CONFIG.format(storage=directory / "storage", address=address) + more)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(directory / "config.yml")], stdout=log, stderr=log)
    try:
        _wait_ready(address, process, directory / "log")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"http://{address}/v2/", timeout=1).close()
            except urllib.error.HTTPError as error:  # it asks who we are: that is an answer, too
                error.close()
            return
        time.sleep(0.05)
    raise AssertionError(f"the registry did not start: {log.read_text(errors='replace')[-800:]}")
