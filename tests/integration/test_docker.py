"""Docker itself, with a daemon of its own: it reads what we wrote, and we what it wrote, with the same digests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import docker

from tests.support import registry
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def peer() -> Iterator[docker.Docker]:
    why = docker.missing()
    if why:
        pytest.skip(why)
    with docker.running(None) as found:
        yield found


def _id(peer: docker.Docker, name: str) -> str:
    return peer.call("image", "inspect", "--format", "{{.Id}}", name).removeprefix("sha256:")


def _digest(root: Root) -> str:
    return str(json.loads(root.ok("image", "inspect", "debian"))[0]["id"]).removeprefix("sha256:")


def test_an_image_goes_through_a_registry_to_docker_and_back(
    fresh_root: Root, peer: docker.Docker, tmp_path: Path
) -> None:
    root = fresh_root
    root.ok("run", "--name", "it", "debian", "sh", "-c", "echo ours > /ours")
    ours = root.ok("commit", "-q", "-c", 'CMD ["cat", "/ours"]', "it", "ours")
    with registry.running(tmp_path / "registry") as address:
        digest = root.ok("push", "ours", f"{address}/ours").rpartition(" ")[2]
        peer.call("pull", f"{address}/ours")
        assert _id(peer, f"{address}/ours") == ours
        told = json.loads(peer.call("image", "inspect", f"{address}/ours"))[0]
        assert told["RepoDigests"] == [f"{address}/ours@{digest}"]
        run = peer.argv("run", "--rm", "--network", "none", f"{address}/ours")
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "ours\n"
        peer.call("tag", f"{address}/ours", f"{address}/theirs")
        peer.call("push", f"{address}/theirs")
        root.ok("rmi", "ours")
        assert root.ok("pull", "--quiet", f"{address}/theirs") == ours
        assert root.ok("run", "--rm", f"{address}/theirs") == "ours"


def test_archives_go_both_ways(fresh_root: Root, peer: docker.Docker, tmp_path: Path) -> None:
    root, ours, theirs = fresh_root, tmp_path / "ours.tar", tmp_path / "theirs.tar"
    digest = _digest(root)
    root.ok("save", "-o", str(ours), "debian")
    peer.call("load", "-i", str(ours))
    assert _id(peer, "debian:latest") == digest
    peer.call("save", "-o", str(theirs), "debian:latest")
    root.ok("rmi", digest)
    root.ok("load", "-i", str(theirs))
    assert _digest(root) == digest
    assert root.ok("run", "--rm", "debian", "echo", "here") == "here"
    assert root.ok("system", "check", "--deep") == "all is well"
