"""Registries without one: who is local, what a policy asks for, what skopeo's words mean, one flight for all."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from isolat.client import auths
from isolat.errors import InvalidImage, IsolatError, NotFound, Refused, StoreError, UsageError
from isolat.images.blobs import Blobs
from isolat.images.oci import Descriptor, Platform, digest_of
from isolat.images.registries import policy, skopeo, watch
from isolat.images.registries.flights import Flight, Flights, Passenger
from isolat.images.registries.staging import Incoming, Kept

ANYTHING = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]


@pytest.mark.parametrize(
    ("registry", "local"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:1", True), ("127.9.9.9", True), ("[::1]:5000", True),
        ("docker.io", False), ("localhost.example", False), ("10.0.0.1:5000", False), ("127.0.0.1.example:1", False),
        ("[::2]:1", False),
    ],
)  # fmt: skip
def test_only_this_machine_is_local(registry: str, local: bool) -> None:
    assert skopeo.is_local(registry) == local
    assert skopeo.Access().verifies(registry) != local
    assert skopeo.Access(tls_verify=True).verifies(registry)
    assert not skopeo.Access(tls_verify=False).verifies(registry)


def test_credentials_are_not_shown() -> None:
    assert "c2VjcmV0" not in repr(skopeo.Access(auths={"a": {"auth": "c2VjcmV0"}}))


@pytest.mark.parametrize(
    ("message", "kind", "stage"),
    [
        ("reading manifest 1 in localhost/x: manifest unknown: manifest unknown", NotFound, "not-found"),
        ("reading manifest 1 in docker.io/library/x: errors:\ndenied: requested access to the resource is denied",
         Refused, "credentials"),
        ("unable to retrieve auth token: invalid username/password: unauthorized", Refused, "credentials"),
        ("Source image rejected: A signature was required, but no signature exists", InvalidImage, "policy"),
        ("corrupted blob, expecting sha256:0", InvalidImage, "digest-mismatch"),
        ("expected 100 bytes in blob, got 7", InvalidImage, "truncated"),
        ('pinging container registry a: Get "https://a/v2/": http: server gave HTTP response to HTTPS client',
         StoreError, "tls"),
        ("pinging container registry a: dial tcp: lookup a: no such host", StoreError, "network"),
        ('choosing image: no image found in manifest list for architecture "a"', NotFound, "no-platform"),
        ("toomanyrequests: You have reached your pull rate limit", StoreError, "rate-limit"),
        ("reading manifest denied: in a.example/signature-service: manifest unknown", NotFound, "not-found"),
        ('Get "https://a/v2/signature-service/manifests/1": dial tcp: connection refused', StoreError, "network"),
        ("pinging container registry signature: dial tcp: lookup signature on 1.1.1.1:53: no such host",
         StoreError, "network"),
        ("Requesting bearer token: a.example/checksum/denied:1: invalid status code", StoreError, "registry"),
        ("something that nobody has seen before", StoreError, "registry"),
    ],
)  # fmt: skip
def test_what_skopeo_says(message: str, kind: type[IsolatError], stage: str) -> None:
    error = skopeo.told(f'Error parsing image name "docker://x": {message}', "pulling x")
    assert (type(error), error.stage) == (kind, stage)
    assert error.message.startswith("pulling x: ") and "docker://x" not in error.message


def test_addresses_are_told_without_their_secrets() -> None:
    said = 'Get "https://me:pw@a.example/v2/x?X-Amz-Signature=0123&b": dial tcp: i/o timeout, see http://b/?token=1'
    error = skopeo.told(said, "pulling x")
    assert error.message == 'pulling x: Get "https://a.example/v2/x": dial tcp: i/o timeout, see http://b/'
    assert error.stage == "network"


def test_the_platform_for_skopeo() -> None:
    assert skopeo.platform_options(Platform("linux", "arm64", "v8"))[-2:] == ["--override-variant", "v8"]
    assert len(skopeo.platform_options(Platform("linux", "amd64"))) == 4


def _policy(tmp_path: Path, data: object) -> policy.Policy:
    (tmp_path / "policy.json").write_text(json.dumps(data))
    return policy.find(tmp_path)


@pytest.mark.parametrize(
    ("data", "anything"),
    [
        ({"default": ANYTHING}, True),
        ({"default": ANYTHING, "transports": {}}, True),
        ({"default": ANYTHING, "transports": {"docker": {"": ANYTHING}}}, True),
        ({"default": REJECT}, False),
        ({"default": []}, False),
        ({}, False),
        ({"default": ANYTHING, "transports": {"docker": {"a.example": REJECT}}}, False),
        ({"default": ANYTHING, "transports": {"docker": []}}, False),
        ({"default": ANYTHING, "transports": []}, False),
        ({"default": ANYTHING, "more": 1}, False),
        ({"default": [*ANYTHING, {"type": "signedBy"}]}, False),
        ({"default": [{"type": "insecureAcceptAnything", "more": 1}]}, False),
    ],
)
def test_what_asks_for_anything_is_asked(tmp_path: Path, data: object, anything: bool) -> None:
    assert _policy(tmp_path, data).accepts_anything == anything


@pytest.mark.parametrize(
    ("data", "accepted"),
    [
        ({"default": ANYTHING}, True),
        ({"default": REJECT}, False),
        ({"default": REJECT, "transports": {"oci-archive": {"": ANYTHING}}}, True),
        ({"default": REJECT, "transports": {"docker-archive": {"": ANYTHING}}}, False),
        ({"default": REJECT, "transports": {"oci-archive": {"/somewhere": ANYTHING}}}, False),
        ({"default": ANYTHING, "transports": {"oci-archive": {"/somewhere": REJECT}}}, False),
        ({"default": ANYTHING, "transports": {"oci-archive": REJECT}}, False),
        ({"default": ANYTHING, "transports": 7}, False),
        ({}, False),
    ],
)
def test_archives_under_a_policy(tmp_path: Path, data: object, accepted: bool) -> None:
    found = _policy(tmp_path, data)
    if accepted:
        found.check_archive("oci-archive")
        return
    with pytest.raises(InvalidImage) as caught:
        found.check_archive("oci-archive")
    assert caught.value.stage == "policy"


def test_keys_go_with_the_policy(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"key")
    (tmp_path / "registries.d").mkdir()
    (tmp_path / "registries.d" / "a.yaml").write_text("default-docker:\n  lookaside: file:///some/where\n")
    one = {"type": "signedBy", "keyPath": str(tmp_path / "key")}
    several = {"type": "signedBy", "keyPaths": ["/a", "/b"]}
    found = _policy(tmp_path, {"default": [one], "transports": {"docker": {"": [several]}}})
    assert found.data["default"] == [{"type": "signedBy", "keyData": "a2V5"}]
    assert set(found.read) == {str(tmp_path / "registries.d"), "/some/where", "/a", "/b"}
    with found.descriptor() as descriptor, open(f"/proc/self/fd/{descriptor}", "rb") as stream:
        assert json.load(stream) == found.data


@pytest.mark.parametrize("text", ["{", "[]", '{"default": [{"type": "signedBy", "keyPath": "/absent/key"}]}'])
def test_a_policy_that_can_not_be_read_accepts_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(StoreError) as caught:
        policy.find(tmp_path)
    assert caught.value.stage == "policy"


def test_ours_accepts_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_SYSTEM", tmp_path / "absent")
    found = policy.find(tmp_path)
    assert found.accepts_anything and found.path.is_file()


def test_one_flight_for_all_who_want_the_same() -> None:
    flights: Flights[int] = Flights()
    begun, go_on = threading.Event(), threading.Event()
    told: list[tuple[int, str]] = []
    calls = 0

    def work(flight: Flight[int]) -> int:
        nonlocal calls
        calls += 1
        begun.set()
        go_on.wait(10)
        flight.tell("half", 1, 2)
        return 7

    def passenger(at: int) -> Passenger:
        return Passenger(lambda text, done, total: told.append((at, text)))

    results: list[int] = []
    threads = [
        threading.Thread(target=lambda at=at: results.append(flights.join("key", passenger(at), work)))
        for at in range(3)
    ]
    for thread in threads:
        thread.start()
    begun.wait(10)
    while len(flights._flying["key"].passengers) < 3:
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert (calls, results, sorted(told)) == (1, [7, 7, 7], [(0, "half"), (1, "half"), (2, "half")])
    assert flights.join("key", passenger(9), lambda _: 8) == 8  # another time is another flight


def test_who_comes_when_a_flight_is_given_up_begins_anew() -> None:
    flights: Flights[int] = Flights()
    begun, go_on = threading.Event(), threading.Event()

    def given_up(flight: Flight[int]) -> int:
        begun.set()
        go_on.wait(10)
        raise watch.Abandoned("nobody")

    def first() -> None:
        with pytest.raises(watch.Abandoned):
            flights.join("key", Passenger(lambda *_: None, lambda: True), given_up)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(10)
    threading.Timer(0.2, go_on.set).start()
    assert flights.join("key", Passenger(lambda *_: None), lambda _: 5) == 5
    thread.join(10)


def test_errors_reach_everybody() -> None:
    flights: Flights[int] = Flights()

    def work(flight: Flight[int]) -> int:
        raise NotFound("there is nothing")

    for _ in range(2):
        with pytest.raises(NotFound):
            flights.join("key", Passenger(lambda *_: None), work)


def test_silence() -> None:
    one = watch.Watch("pulling x", stall_s=0.05)
    one.check()
    time.sleep(0.06)
    one.came(100)  # too little to count
    with pytest.raises(IsolatError) as caught:
        one.check()
    assert caught.value.stage == "stalled"
    one.came(1 << 20)
    one.check()
    with pytest.raises(watch.Abandoned):
        watch.Watch("x", lambda: True).check()


def test_what_is_there_is_linked_and_not_fetched(tmp_path: Path) -> None:
    blobs, kept = Blobs(tmp_path / "blobs"), Kept(tmp_path)
    stored, before, cut, new = (
        Descriptor("", digest_of(data), len(data)) for data in (b"stored", b"kept before", b"cut off", b"new")
    )
    blobs.put(b"stored")
    for one, data in ((before, b"kept before"), (cut, b"cut")):
        (tmp_path / "file").write_bytes(data)
        kept.keep(tmp_path / "file", one.digest)
        (tmp_path / "file").unlink()
    incoming = Incoming(tmp_path / "one", blobs, kept)
    assert incoming.missing([stored, before, cut, new]) == [cut, new]
    assert incoming.path(before.digest).read_bytes() == b"kept before"
    with open(incoming.create(new.digest), "wb") as stream:
        stream.write(b"new")
    assert not incoming.path(new.digest).exists()
    incoming.whole(new.digest)
    assert Incoming(tmp_path / "two", blobs, kept).missing([new]) == []
    kept.forget([before.digest, new.digest])
    assert incoming.path(new.digest).read_bytes() == b"new"
    assert kept.used_bytes == 0


def test_credentials_of_one_registry_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    assert auths.of("a.example") == {}
    known: dict[str, Any] = {name: {"auth": "eA=="} for name in ("a.example", "a.example/team", "b.example")}
    known["https://index.docker.io/v1/"] = {"auth": "eQ=="}
    file.write_text(json.dumps({"auths": known}))
    assert set(auths.of("a.example")) == {"a.example", "a.example/team"}
    assert set(auths.of("docker.io")) == {"https://index.docker.io/v1/"}
    assert auths.of("c.example") == {}
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(UsageError):
            auths.of("a.example")
    file.write_text(json.dumps({"credsStore": "../evil"}))
    with pytest.raises(UsageError, match="can't be the name"):
        auths.of("a.example")


@pytest.mark.parametrize(
    ("registry", "keys"),
    [
        ("docker.io", {"https://index.docker.io/v1/", "docker.io/team"}),
        ("private.example", {"https://private.example", "http://private.example/v1/"}),
        ("private.example:5000", {"private.example:5000"}),
        ("other.example", set()),
        ("https:", set()),
    ],
)
def test_nobody_elses_credentials_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str, keys: set[str]
) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"https://else.example/v1/": {"auth": "eA=="}}}))
    names = (
        *("https://index.docker.io/v1/", "docker.io/team", "https://private.example", "http://private.example/v1/"),
        *("private.example:5000", "private.example.evil"),
    )
    known = {name: {"auth": "eQ=="} for name in names}
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": known}))
    monkeypatch.setattr(auths, "files", lambda: [tmp_path / "auth.json", tmp_path / "docker/config.json"])
    assert set(auths.of(registry)) == keys


def test_an_empty_place_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert auths.default_file() == Path(f"/run/containers/{os.geteuid()}/auth.json")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert auths.default_file() == Path("/run/user/1/containers/auth.json")


def test_helpers_say_what_they_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"a.example": {}}, "credsStore": "x"}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    helper = tmp_path / "docker-credential-x"
    for says, found in (
        ('{"Username": "me", "Secret": "s"}', {"a.example": {"auth": "bWU6cw=="}}),
        ('{"Username": "<token>", "Secret": "s"}', {"a.example": {"auth": "PHRva2VuPjo=", "identitytoken": "s"}}),
        ("{}", {}),
    ):
        helper.write_text(f"#!/bin/sh\ncat > /dev/null\nprintf '%s' '{says}'\n")
        helper.chmod(0o755)
        assert auths.of("a.example") == found
    helper.write_text("#!/bin/sh\ncat > /dev/null\necho nonsense\n")
    with pytest.raises(UsageError, match="failed"):
        auths.of("a.example")
