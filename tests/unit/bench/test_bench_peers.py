"""Peers get the same job: crun's bundle is Isolat's own, elsewhere; what Docker leaves is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench import bare, docker, lib

CONFIG: dict[str, Any] = {
    "process": {"args": ["/dev/.isolat/isolat-init"], "noNewPrivileges": True},
    "root": {"path": "/state/envs/1/rootfs", "readonly": False},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": []},
        {"destination": "/etc/hosts", "type": "bind", "source": "/state/pool/1/etc/hosts", "options": ["bind"]},
        {"destination": "/dev/.isolat/isolat-init", "type": "bind", "source": "/libexec/isolat-init", "options": []},
    ],
    "linux": {
        "cgroupsPath": "/isolat/1",
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "uidMappings": [{"hostID": 7}],
    },
}
FRAMES = [
    {
        "layer": "container",
        "steps": [
            {"step": "dir", "path": "/state/envs/1/bundle"},
            {"step": "file", "path": "/state/envs/1/bundle/config.json", "text": json.dumps(CONFIG)},
        ],
    }
]


def test_the_configuration_is_found_in_the_plan() -> None:
    assert bare.config_of(FRAMES) == CONFIG
    with pytest.raises(lib.BenchError, match="no OCI bundle"):
        bare.config_of([{"layer": "host", "steps": []}])


def test_an_equal_bundle_differs_only_in_places_and_the_program() -> None:
    made = bare.equal(CONFIG, Path("/bench"), "/isolat-bench-1/c", ["true"])
    assert made["process"] == {"args": ["true"], "noNewPrivileges": True}
    assert made["root"] == {"path": "/bench/rootfs", "readonly": False}
    assert made["linux"] == CONFIG["linux"] | {"cgroupsPath": "/isolat-bench-1/c"}
    assert [mount["source"] for mount in made["mounts"]] == ["proc", "/bench/etc/hosts"]
    assert CONFIG["process"]["args"] == ["/dev/.isolat/isolat-init"]


def test_docker_is_asked_on_its_own_socket_without_a_network() -> None:
    argv = docker.Docker(Path("/tmp/one")).run(["true"], "-i")
    assert argv[1:3] == ["--host", "unix:///tmp/one/docker.sock"]
    assert argv[3:] == ["run", "--rm", "--network", "none", "-i", docker.IMAGE, "true"]


def test_only_what_is_empty_is_removed(tmp_path: Path) -> None:
    (tmp_path / "group" / "empty").mkdir(parents=True)
    (tmp_path / "group" / "used").mkdir()
    (tmp_path / "group" / "used" / "file").touch()
    docker._remove_tree(tmp_path / "group")
    assert [path.name for path in (tmp_path / "group").iterdir()] == ["used"]
