"""A service becomes the spec that it says, or a SpecError with every reason and its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.errors import SpecError
from isolat.spec import mounts
from isolat.spec.model import Spec, Tmpfs, Volume
from isolat.spec.parse import KEYS, parse, parse_file, to_service

from .strategies import specs


def reasons(service: object, path: str = "") -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse(service, path)
    return list(caught.value.details)


def test_the_smallest_service_has_every_default() -> None:
    assert parse({"image": "debian"}) == Spec(image="debian")


def test_every_key_reaches_the_model() -> None:
    spec = parse(
        {
            "image": "debian:13", "runtime": "microvm/container", "container_name": "web", "command": "sh -c 'a b'",
            "environment": ["A=1", "B=x=y"], "working_dir": "/srv//www/", "user": 1000, "hostname": "web.example",
            "tty": True, "stdin_open": True, "read_only": True, "init": False, "network_mode": "host",
            "mem_limit": "64m", "memswap_limit": "128m", "cpus": "0.5", "cpu_shares": 512, "pids_limit": "100",
            "volumes": ["/data:/data:ro", {"type": "bind", "source": "/a", "target": "/b"}],
            "tmpfs": ["/tmp", "/run:size=1m"], "labels": {"a": 1, "b": None}, "stop_grace_period": "1m30s",
            "logging": {"driver": "none"}, "storage_opt": {"size": "1G"}, "x-timeout": 2.5, "x-remove": True,
            "x-oci-runtime": "runc", "x-fake": {"fail": ["start"]},
        }
    )  # fmt: skip
    assert spec == Spec(
        image="debian:13", layers=("microvm", "container"), name="web", command=("sh", "-c", "a b"),
        environment=(("A", "1"), ("B", "x=y")), working_dir="/srv/www", user="1000", hostname="web.example",
        tty=True, stdin_open=True, read_only=True, init=False, network_mode="host", memory_bytes=64 << 20,
        memory_swap_bytes=128 << 20, cpus=0.5, cpu_shares=512, pids_limit=100,
        volumes=(Volume("/data", "/data", True), Volume("/a", "/b")), tmpfs=(Tmpfs("/tmp"), Tmpfs("/run", 1 <<
        20)), labels=(("a", "1"), ("b", "")), stop_grace_s=90.0, logging="none", disk_bytes=1 << 30, timeout_s=2.5,
        remove=True, oci_runtime="runc", options=(("fake", {"fail": ["start"]}),),
    )  # fmt: skip


def test_null_means_not_given() -> None:
    assert parse({"image": "debian", **{key.name: None for key in KEYS if key.name != "image"}}) == Spec("debian")


def test_every_error_is_told_at_once_with_its_path() -> None:
    found = reasons(
        {"imgae": "debian", "mem_limit": "1m", "environment": {"A": None}, "volumes": ["da?a:/data"], "cpus": 0},
        ".services.web",
    )
    assert [line.split(": ")[0] for line in found] == [
        ".services.web.imgae",
        ".services.web.mem_limit",
        ".services.web.environment.A",
        ".services.web.volumes[0]",
        ".services.web.cpus",
        ".services.web.image",
    ]
    assert "did you mean image?" in found[0]
    assert "6m" in found[1]


def test_a_source_without_a_slash_is_a_volumes_name() -> None:
    written = [
        "data:/data",
        "a.b:/b:ro",
        {"source": "c", "target": "/c"},
        {"type": "volume", "source": "d", "target": "/d"},
    ]
    found = parse({"image": "debian", "volumes": written}).volumes
    assert found == (Volume("data", "/data"), Volume("a.b", "/b", True), Volume("c", "/c"), Volume("d", "/d"))
    assert all(volume.named for volume in found)
    assert not Volume("/data", "/data").named


def test_named_volumes_are_found_in_whatever_a_handle_holds() -> None:
    damaged = [
        "data:/data",
        "/a:/b",
        3,
        {"type": "volume", "source": "d", "target": "/d", "new": 1},
        "e:/e:new",
        "f:/f",
    ]
    assert [volume.source for volume in mounts.named_volumes(damaged)] == ["data", "d", "f"]
    assert mounts.named_volumes(None) == mounts.named_volumes("data:/data") == ()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("image", "", "not an image's name"),
        ("image", "-v", "not an image's name"),
        ("image", "a\0b", "NUL"),
        ("runtime", "a//b", "not a layer"),
        ("runtime", "a/b/c/d/e", "at most 4"),
        ("container_name", "-x", "not a name"),
        ("container_name", "x", "not a name"),
        ("container_name", "x" * 200, "200 bytes"),
        ("command", ["a", 1], "must be text, not a number (quote it)"),
        ("command", "a 'b", "no closing quotation"),
        ("command", ["a\0"], "NUL"),
        ("command", [""], "name is empty"),
        ("command", ["a"] * 4097, "at most 4096"),
        ("command", ["a" * 131072], "at most 131071"),
        ("command", ["a" * 100_000] * 20, "at most 1048576"),
        ("command", ["\ud800"], "no encoding"),
        ("environment", ["A"], "has no value"),
        ("environment", ["=x"], "not a name"),
        ("environment", {"A=B": "x"}, "without '='"),
        ("environment", {"A": True}, "quote it"),
        ("environment", {1: "a"}, "not a name"),
        ("environment", {"A": float("nan")}, "must be text"),
        ("environment", {"A": 10**30}, "must be text"),
        ("environment", "A=1", "must be a map or a list"),
        ("working_dir", "srv", "must begin with /"),
        ("working_dir", "/a/../b", "must not contain .."),
        ("working_dir", "/" + "a" * 300, "255 bytes"),
        ("user", "a b", "not a user"),
        ("user", -1, "must be text"),
        ("hostname", "a_b", "not a host name"),
        ("tty", "yes", "true or false"),
        ("network_mode", "bridge", "not one of none, host"),
        ("mem_limit", "5m", "not between 6m"),
        ("mem_limit", "much", "must be a size"),
        ("mem_limit", True, "must be a size"),
        ("memswap_limit", "100m", "less than the memory"),
        ("memswap_limit", -1, "not between"),
        ("cpus", float("nan"), "between"),
        ("cpus", "two", "a number"),
        ("cpu_shares", 1, "between 2"),
        ("pids_limit", -1, "always a limit"),
        ("pids_limit", 1.5, "whole number"),
        ("volumes", ["/a"], "SOURCE:TARGET"),
        ("volumes", ["/a:b"], "must begin with /"),
        ("volumes", ["/a:/b:z"], "ro, rw"),
        ("volumes", ["/a:/"], "root itself"),
        ("volumes", ["/a:/b/../c"], ".."),
        ("volumes", ["./a:/b"], "absolute path of this machine"),
        ("volumes", ["/a:/b", "/c:/b"], "already a target"),
        ("volumes", [{"type": "volume", "source": "/a", "target": "/b"}], "not a volume's name"),
        ("volumes", [{"type": "volume", "target": "/b"}], "volumes without a name"),
        ("volumes", [{"type": "bind", "source": "data", "target": "/b"}], "type: volume"),
        ("volumes", [{"type": "tmpfs", "source": "data", "target": "/b"}], "not one of bind, volume"),
        ("volumes", [{"type": "volume", "source": "data", "target": "/b", "volume": {"nocopy": True}}], "not known"),
        ("volumes", ["data:/b:z"], "ro, rw"),
        ("volumes", ["-data:/b"], "not a volume's name"),
        ("volumes", ["d" * 129 + ":/b"], "at most 128"),
        ("volumes", [{"source": "/a"}], "must be text, not nothing"),
        ("volumes", [{"source": "/a", "target": "/b", "readonly": True}], "did you mean read_only"),
        ("volumes", ["/a:/b"] * 65, "at most 64"),
        ("tmpfs", ["/t:mode=1"], "allowed: size"),
        ("tmpfs", ["/t:size=x"], "must be a size"),
        ("tmpfs", 3, "a path or a list"),
        ("labels", ["=x"], "not a name"),
        ("stop_grace_period", "10", "must be a duration"),
        ("stop_grace_period", "25h", "between"),
        ("logging", {"driver": "syslog"}, "not one of"),
        ("logging", {"options": {}}, "not known here"),
        ("storage_opt", {"size": "1k"}, "16m"),
        ("x-timeout", 0, "between"),
        ("x-timeout", float("inf"), "must be a duration"),
        ("x-oci-runtime", "a b", "not a program"),
        ("x-fake", 3, "must be a map"),
        ("x-timeuot", "5s", "did you mean x-timeout"),
        ("x-fake", {"a": {1: 2}}, "a key must be text"),
        ("x-fake", {"a": object()}, "plain data"),
        ("x-fake", {"a": [[]] * 5000}, "more than 4096"),
        ("ports", ["80:80"], "does not support yet"),
        ("memlimit", "1g", "did you mean mem_limit"),
    ],
)
def test_what_is_refused_and_why(key: str, value: object, reason: str) -> None:
    found = reasons({"image": "debian", key: value})
    assert any(line.startswith(f".{key}") and reason in line for line in found), found


def test_a_service_that_is_no_map() -> None:
    assert reasons([]) == [".: a service must be a map, not 'list'"]


def test_the_list_of_errors_is_bounded() -> None:
    found = reasons({"image": "debian", "command": [1] * 4096})
    assert len(found) == 41
    assert found[-1] == "… and 4056 more"


def test_an_error_shows_no_control_characters_and_no_long_values() -> None:
    (line,) = reasons({"image": "debian", "container_name": "\x1b[31m" + "x" * 100})
    assert line.isprintable()
    assert len(line) < 200


@given(specs())
def test_what_is_written_reads_back(spec: Spec) -> None:
    assert parse(to_service(spec)) == spec


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(ANYTHING | st.dictionaries(st.sampled_from([key.name for key in KEYS] + ["x-fake"]), ANYTHING, max_size=12))
def test_nothing_but_a_spec_error_is_ever_raised(data: Any) -> None:
    try:
        spec = parse(data)
    except SpecError as error:
        assert error.details
        assert all(line.isprintable() for line in error.details)
    else:
        assert parse(to_service(spec)) == spec


def test_deep_nesting_is_refused_and_not_a_recursion_error() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert "nests deeper" in reasons({"image": "debian", "x-fake": deep})[0]


def write(directory: Path, text: str) -> Path:
    path = directory / "compose.yaml"
    path.write_text(text)
    return path


def test_a_compose_file_with_one_service(tmp_path: Path) -> None:
    path = write(
        tmp_path, "services:\n  web:\n    image: debian\n    volumes: ['./data:/data']\n    command: echo $$HOME\n"
    )
    assert parse_file(path) == Spec(
        "debian", command=("echo", "$HOME"), volumes=(Volume(str(tmp_path / "data"), "/data"),)
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("services: {}", ".services: a Compose file needs"),
        ("[", "is not YAML"),
        ("services: {a: {image: a}, b: {image: b}}", "has 2 services"),
        ("services: {a: {image: a}}\nvolumes: {}", ".volumes: is not supported yet"),
        ("services: {a: {image: a, mem_limit: 1k}}", ".services.a.mem_limit"),
        ("services: {a: {image: a, command: echo $HOME}}", "not interpolated"),
        ("services: {a: &x {image: a, x-fake: *x}}", "nested too deeply"),
        ("services: {a: " + "[" * 5000 + "}", "is not YAML"),
        ("services: {a: {image: !!python/object/apply:os.system [id]}}", "is not YAML"),
        ("#" * (1 << 20) + "##", "is larger"),
        ("services: {a: {image: a, x-fake: {d: 2020-01-01}}}", "plain data"),
    ],
)
def test_a_bad_file_is_a_spec_error(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_file(write(tmp_path, text))
    assert any(reason in line for line in caught.value.details), caught.value.details


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    text = "services:\n  a:\n    image: a\n    x-fake:\n      a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 9):
        text += f"      a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
    with pytest.raises(SpecError, match="error"):
        parse_file(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        parse_file(tmp_path / "none.yaml")
    assert "none.yaml: cannot be read: No such file" in caught.value.details[0]
