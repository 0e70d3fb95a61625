"""Pulls and pushes from inside: what skopeo is allowed, who waits for what, what a policy asks, and other places."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.errors import DeadlineExceeded, InvalidImage, IsolatError, NotFound, StoreError, Unsupported
from isolat.images.flatten.flattening import TOLD
from isolat.images.image import Image
from isolat.images.oci import Platform, digest_of
from isolat.images.reference import parse_reference
from isolat.images.registries import pulling, pushing, skopeo, watch
from isolat.images.registries.flights import Passenger
from isolat.images.store import ImageStore
from tests.support import registry
from tests.support.hostile import (
    CONFIG,
    INDEX,
    LAYER,
    MANIFEST,
    Handler,
    archive,
    copy,
    documents,
    make_layout,
    put_manifest,
    serving,
    stall,
)
from tests.support.roots import Root, private_root

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
Answers = dict[str, Callable[[Handler], None]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry.running(tmp_path_factory.mktemp("r") / "registry") as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    """A state root that nobody can reach: pulls need not care."""
    opened = ImageStore(tmp_path / "state")
    yield opened
    opened.unmount_all()
    assert list((opened.dir / "tmp").iterdir()) == []
    assert _skopeos() == []


def no_progress(text: str, done: int, total: int) -> None:
    pass


def pull(
    store: ImageStore, name: str, platform: Platform | None = None, *, passenger: Passenger | None = None
) -> Image:
    passenger = passenger or Passenger(no_progress)
    wanted = pulling.wanted(parse_reference(name), platform, skopeo.Access())
    return pulling.Puller(store).pull(wanted, passenger)


def _skopeos() -> list[int]:
    """Children of this process that are a skopeo, or about to become one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"skopeo" in words:
            found.append(int(entry.name))
    return found


def _until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.02)


def _stalling(layer: bytes, asked: list[str]) -> Answers:
    manifest, config = documents(layer)

    def blob(handler: Handler) -> None:
        asked.append(handler.path)
        stall(handler)

    return {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(layer): blob,
    }


def _gone_when(event: threading.Event) -> Passenger:
    return Passenger(no_progress, event.is_set)


# What skopeo is allowed


def test_skopeo_is_nobody_without_any_power(store: ImageStore) -> None:
    asked: list[str] = []
    leave = threading.Event()
    with serving(_stalling(archive({"a": b"b"}), asked)) as address:
        work = _caught(lambda: pull(store, f"{address}/x", passenger=_gone_when(leave)))
        thread = threading.Thread(target=work)
        thread.start()
        _until(lambda: asked)
        (pid,) = _skopeos()
        status = Path(f"/proc/{pid}/status").read_text()
        leave.set()
        thread.join(20)
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["Uid"].split() == ["65534"] * 4
    assert facts["Gid"].split() == ["65534"] * 4
    assert facts["Groups"].strip() == ""
    assert {int(facts[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {0}
    assert facts["NoNewPrivs"] == "1"


def _caught(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except IsolatError:
            pass

    return run


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["cat", "/etc/shadow"], False),
        (["cat", "/etc/passwd"], False),
        (["cat", "/proc/1/environ"], False),
        (["ls", "/tmp"], False),
        (["cat", "/etc/hosts"], True),
        (["sh", "-c", "echo > /tmp/isolat-skopeo-was-here"], False),
        (["sh", "-c", "echo > /var/tmp/isolat-skopeo-was-here"], False),
    ],
)
def test_the_file_system_as_skopeo_sees_it(words: list[str], allowed: bool) -> None:
    command = skopeo.argv([])[:-1] + words
    done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    assert (done.returncode == 0) == allowed, done.stderr
    assert not Path("/tmp/isolat-skopeo-was-here").exists()


def test_files_of_skopeo_are_bounded() -> None:
    command = skopeo.argv([], write=["/dev/shm"], file_bytes=1 << 20)[:-1]
    where = Path(f"/dev/shm/isolat-test-{os.getpid()}")
    try:
        where.touch()
        where.chmod(0o666)
        done = subprocess.run(
            [*command, "sh", "-c", f"head -c 4M /dev/zero > {where}"], capture_output=True, check=False, timeout=20
        )
        assert done.returncode != 0
        assert where.stat().st_size <= 1 << 20
    finally:
        where.unlink()


# Who waits


def test_nothing_goes_on_when_nobody_waits_any_more(store: ImageStore) -> None:
    asked: list[str] = []
    first, second = threading.Event(), threading.Event()
    errors: list[str] = []
    puller = pulling.Puller(store)
    with serving(_stalling(archive({"a": b"b"}), asked)) as address:
        wanted = pulling.wanted(parse_reference(f"{address}/x"), None, skopeo.Access())

        def wait(leave: threading.Event) -> None:
            with pytest.raises(watch.Abandoned) as caught:
                puller.pull(wanted, _gone_when(leave))
            errors.append(caught.value.message)

        threads = [threading.Thread(target=wait, args=(leave,)) for leave in (first, second)]
        for thread in threads:
            thread.start()
        _until(lambda: asked and len(next(iter(puller._flights._flying.values())).passengers) == 2)
        first.set()
        time.sleep(0.5)
        assert len(_skopeos()) == 1  # somebody still waits
        assert len(asked) == 1  # and the work was begun once
        second.set()
        for thread in threads:
            thread.join(20)
    assert len(errors) == 2
    assert _skopeos() == []


def test_flattening_ends_when_nobody_waits_any_more(store: ImageStore) -> None:
    leave = threading.Event()
    told: list[str] = []

    def progress(text: str, done: int, total: int) -> None:
        told.append(text)
        if text == TOLD:
            leave.set()

    layer = archive({"a": os.urandom(100_000)})
    manifest, config = documents(layer)
    answers: Answers = {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(layer): lambda h: h.send(layer),
    }
    with serving(answers) as address, pytest.raises(watch.Abandoned):
        pull(store, f"{address}/x", passenger=Passenger(progress, leave.is_set))
    assert told[-1] == TOLD
    assert store.list() == []


def test_silence_ends_it_and_slow_is_not_silent(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STALL_S", 1.0)
    layer = archive({"a": os.urandom(100_000)})
    manifest, config = documents(layer)

    def slow(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(layer)))
        handler.end_headers()
        for at in range(0, len(layer), 20_000):
            handler.wfile.write(layer[at : at + 20_000])
            handler.wfile.flush()
            time.sleep(0.4)

    answers: Answers = {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(layer): slow,
    }
    with serving(answers) as address:
        assert pull(store, f"{address}/slow").digest == digest_of(config).removeprefix("sha256:")
    with serving(_stalling(archive({"other": b"b"}), [])) as address, pytest.raises(DeadlineExceeded) as caught:
        pull(store, f"{address}/x")
    assert caught.value.stage == "stalled"


# What registries may say


def _serve_documents(found: dict[str, bytes], kind: str = MANIFEST) -> Answers:
    def answer(data: bytes) -> Callable[[Handler], None]:
        return lambda handler: handler.send(data, kind)

    return {name: answer(data) for name, data in found.items()}


def test_a_digest_that_something_else_comes_for(store: ImageStore) -> None:
    manifest, _ = documents(archive({"a": b"b"}))
    wrong = digest_of(b"another")
    with serving(_serve_documents({"/manifests/": manifest})) as address, pytest.raises(InvalidImage) as caught:
        pull(store, f"{address}/x@{wrong}")
    assert caught.value.stage == "digest-mismatch"


def _index(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)}).encode()


def _entry(raw: bytes, kind: str = MANIFEST, arch: str = "amd64") -> dict[str, Any]:
    platform = {"os": "linux", "architecture": arch}
    return {"mediaType": kind, "digest": digest_of(raw), "size": len(raw), "platform": platform}


AMD64 = Platform("linux", "amd64")


def test_an_index_in_an_index_is_not_followed(store: ImageStore) -> None:
    inner = _index()
    for kind, error in ((INDEX, NotFound), (MANIFEST, InvalidImage)):
        outer = _index(_entry(inner, kind))
        answers = _serve_documents({digest_of(inner): inner, "/manifests/": outer}, INDEX)
        with serving(answers) as address, pytest.raises(error):
            pull(store, f"{address}/x", AMD64)


def test_of_an_index_our_choice_counts_and_its_digest_is_kept(store: ImageStore) -> None:
    """An entry without a variant before one with: whatever skopeo makes of that, the first that serves is taken."""
    layer, other = archive({"a": b"b"}), archive({"c": b"d"})
    (first, config), (second, another) = documents(layer), documents(other)
    index = _index(
        _entry(first), _entry(second) | {"platform": {"os": "linux", "architecture": "amd64", "variant": "v2"}}
    )
    blobs = {digest_of(one): one for one in (config, another, layer, other)}
    answers = _serve_documents(blobs, "application/octet-stream") | {
        digest_of(first): lambda h: h.send(first, MANIFEST),
        digest_of(second): lambda h: h.send(second, MANIFEST),
        "/manifests/": lambda h: h.send(index, INDEX),
    }
    with serving(answers) as address:
        image = pull(store, f"{address}/x", AMD64)
        assert image.manifest == digest_of(first)
        assert image.repo_digests == (f"{address}/x@{digest_of(index)}",)
        again = pull(store, f"{address}/x@{digest_of(index)}", AMD64)
        assert again.digest == image.digest
    with serving(answers) as address, pytest.raises(NotFound) as caught:
        pull(store, f"{address}/x", Platform("linux", "riscv64"))
    assert "linux/amd64, linux/amd64/v2" in caught.value.hint


@pytest.mark.parametrize("what", ["to another place", "in a circle", "to a file"])
def test_redirects_lead_to_blobs_or_nowhere(store: ImageStore, what: str) -> None:
    layer = archive({"a": b"b"})
    manifest, config = documents(layer)
    target = {"to another place": "/elsewhere", "in a circle": "", "to a file": "file:///etc/passwd"}[what]

    def redirect(handler: Handler) -> None:
        handler.send_response(307)
        handler.send_header("Location", target or handler.path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    answers: Answers = {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        "/elsewhere": lambda h: h.send(layer),
        digest_of(config): lambda h: h.send(config),
        digest_of(layer): redirect,
    }
    with serving(answers) as address:
        if what == "to another place":
            assert pull(store, f"{address}/x").names == (f"{address}/x:latest",)
            return
        with pytest.raises(StoreError):
            pull(store, f"{address}/x")
    assert store.list() == []


def test_a_layer_of_more_bytes_than_said(store: ImageStore) -> None:
    layer = archive({"a": b"b" * 50_000})
    manifest, config = documents(layer, size=len(layer) - 600)
    answers: Answers = {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(layer): lambda h: h.send(layer),
    }
    with serving(answers) as address, pytest.raises(InvalidImage) as caught:
        pull(store, f"{address}/x")
    assert caught.value.stage in ("too-large", "truncated")
    assert not any(path.stat().st_size > len(layer) for path in store.dir.rglob("*") if path.is_file())


def test_what_came_whole_is_kept_and_swept(store: ImageStore) -> None:
    first, second = archive({"one": b"1"}), archive({"two": b"2" * 9000})
    manifest, config = _of_two(first, second)
    answers: Answers = {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(first): lambda h: h.send(first),
        digest_of(second): lambda h: h.send(second[:-1] + b"x"),
    }
    with serving(answers) as address:
        with pytest.raises(InvalidImage):
            pull(store, f"{address}/x")
        puller = pulling.Puller(store)
        kept = {path.name for path in (store.dir / "incoming/blobs/sha256").iterdir()}
        assert kept == {digest_of(one).removeprefix("sha256:") for one in (first, config)}
        assert puller.kept.used_bytes == len(first) + len(config)
        answers[digest_of(first)] = lambda h: h.send_error(500)  # it is not asked for again
        answers[digest_of(second)] = lambda h: h.send(second)
        pull(store, f"{address}/x")
    assert puller.kept.used_bytes == 0
    (store.dir / "incoming/blobs/sha256" / ("0" * 64)).write_bytes(bytes(10))
    assert (puller.kept.sweep(), puller.kept.sweep(0)) == (0, 10)


def _of_two(first: bytes, second: bytes) -> tuple[bytes, bytes]:
    rootfs = {"type": "layers", "diff_ids": [digest_of(first), digest_of(second)]}
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}).encode()
    layers = [{"mediaType": LAYER, "digest": digest_of(one), "size": len(one)} for one in (first, second)]
    described = {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)}
    data = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers}
    return json.dumps(data).encode(), config


def test_a_full_disk_is_noticed_before_anything_comes(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "RESERVE_BYTES", 1 << 60)
    asked: list[str] = []
    with serving(_stalling(archive({"a": b"b"}), asked)) as address, pytest.raises(StoreError) as caught:
        pull(store, f"{address}/x")
    assert (caught.value.stage, asked) == ("disk-full", [])


# Policies


@pytest.fixture
def key(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who has a key and signs with it."""
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    env = {**os.environ, "GNUPGHOME": str(home)}
    gpg = ["gpg", "--batch", "--pinentry-mode", "loopback", "--passphrase", "", "--quick-gen-key", "me@example"]
    subprocess.run([*gpg, "default", "default", "0"], env=env, check=True, capture_output=True)
    yield env
    subprocess.run(["gpgconf", "--kill", "all"], env=env, check=False)


@pytest.fixture
def open_store() -> Iterator[ImageStore]:
    """A state root that nobody can reach, as skopeo must where it checks signatures."""
    with private_root(image=False) as root:
        yield ImageStore(root.path)
        for path in ("policy.json", "key.gpg", "registries.d/all.yaml"):
            (root.path / path).unlink(missing_ok=True)
        if (root.path / "registries.d").exists():
            (root.path / "registries.d").rmdir()


@pytest.fixture
def lookaside() -> Iterator[Path]:
    """Where signatures are: everybody may read them."""
    with tempfile.TemporaryDirectory(prefix="isolat-t-") as found:
        Path(found).chmod(0o755)
        yield Path(found)


def _sign(store: ImageStore, key: dict[str, str], lookaside: Path, layout: Path, name: str) -> None:
    where = store.root / "registries.d"
    where.mkdir(exist_ok=True)
    (where / "all.yaml").write_text(f"default-docker:\n  lookaside: file://{lookaside}\n")
    command = ["skopeo", "--insecure-policy", "--registries.d", str(where), "copy", "--dest-tls-verify=false"]
    sign = ["--sign-by", "me@example", f"oci:{layout}", f"docker://{name}"]
    subprocess.run([*command, *sign], env=key, check=True, capture_output=True)
    for path in lookaside.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_signature_of_another_tag_does_not_count(
    open_store: ImageStore, address: str, key: dict[str, str], lookaside: Path, tmp_path: Path
) -> None:
    """An old image that was signed once, served under a new name: by its digest it would be accepted."""
    store, layout = open_store, make_layout(tmp_path / "layout", [archive({"old": b"version"})])
    _sign(store, key, lookaside, layout, f"{address}/tags:old")
    copy(f"oci:{layout}", f"docker://{address}/tags:new", "--preserve-digests")
    exported = store.root / "key.gpg"
    subprocess.run(["gpg", "--output", str(exported), "--export", "me@example"], env=key, check=True)
    exported.chmod(0o600)  # the daemon reads it, and skopeo need not
    rule = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(exported)}
    (store.root / "policy.json").write_text(json.dumps({"default": [rule]}))
    with pytest.raises(InvalidImage) as caught:
        pull(store, f"{address}/tags:new")
    assert caught.value.stage == "policy"
    assert store.list() == []
    image = pull(store, f"{address}/tags:old")
    assert image.names == (f"{address}/tags:old",)
    pull(store, f"{address}/tags@{image.manifest}")  # whoever names the digest means exactly this
    assert list((store.dir / "tmp").iterdir()) == []


def test_archives_can_not_be_signed_so_a_policy_must_allow_them(fresh_root: Root, tmp_path: Path) -> None:
    root = fresh_root
    root.ok("save", "-o", str(tmp_path / "saved.tar"), "debian")
    policy = root.path / "policy.json"
    policy.write_text(json.dumps({"default": [{"type": "reject"}]}))
    done = root.cli("load", "-i", str(tmp_path / "saved.tar"))
    assert done.returncode == 125 and b"policy" in done.stderr and b"docker-archive" in done.stderr
    accepted = {"docker-archive": {"": [{"type": "insecureAcceptAnything"}]}}
    policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": accepted}))
    root.ok("load", "-i", str(tmp_path / "saved.tar"))
    policy.unlink()


def test_a_state_root_that_nobody_can_enter(store: ImageStore, address: str, tmp_path: Path) -> None:
    """Pulls need no file that skopeo can see; where it has to see some, it is told plainly that it can't."""
    tmp_path.chmod(0o700)
    copy(f"oci:{make_layout(tmp_path / 'layout', [archive({'a': b'b'})])}", f"docker://{address}/closed")
    image = pull(store, f"{address}/closed")
    with pytest.raises(Unsupported, match="can't enter"):
        pushing.push(store, image, parse_reference(f"{address}/x"), skopeo.Access(), Passenger(no_progress))
    (store.root / "policy.json").write_text('{"default": [{"type": "reject"}]}')
    with pytest.raises(Unsupported, match="can't enter"):
        pull(store, f"{address}/closed")


def test_a_registry_that_is_not_there(store: ImageStore) -> None:
    with pytest.raises(StoreError) as caught:
        pull(store, "127.0.0.1:1/x")
    assert (type(caught.value), caught.value.stage) == (StoreError, "network")


def test_a_name_that_is_not_there(store: ImageStore, address: str) -> None:
    for name in (f"{address}/absent", f"{address}/absent@sha256:{'0' * 64}"):
        with pytest.raises(NotFound):
            pull(store, name)


def test_indexes_that_a_real_registry_keeps(store: ImageStore, address: str, tmp_path: Path) -> None:
    """With Docker's own types: a list of schema 2 manifests, whose bytes the proxy gives only converted."""
    entries = []
    for arch in ("amd64", "arm64"):
        layout = make_layout(tmp_path / arch, [archive({"arch": arch.encode()})], arch)
        copy(f"oci:{layout}", f"docker://{address}/list:{arch}", "--format", "v2s2")
        raw = subprocess.run(
            ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{address}/list:{arch}"],
            capture_output=True, check=True,
        ).stdout  # fmt: skip
        entries.append(_entry(raw, json.loads(raw)["mediaType"], arch))
    kind = "application/vnd.docker.distribution.manifest.list.v2+json"
    index = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).encode()
    put_manifest(address, "list", "latest", kind, index)
    for arch, entry in zip(("amd64", "arm64"), entries, strict=True):
        image = pull(store, f"{address}/list", Platform("linux", arch))
        assert (image.manifest, image.config.architecture) == (entry["digest"], arch)
        assert image.repo_digests == (f"{address}/list@{digest_of(index)}",)


def test_dockers_manifests_go_back_as_they_came(open_store: ImageStore, address: str, tmp_path: Path) -> None:
    store, name = open_store, f"{address}/docker"
    layout = make_layout(tmp_path / "layout", [archive({"a": b"b"})])
    copy(f"oci:{layout}", f"docker://{name}:there", "--format", "v2s2")
    image = pull(store, f"{name}:there")
    told: list[tuple[int, int]] = []
    passenger = Passenger(lambda text, done, total: told.append((done, total)))
    target = parse_reference(f"{name}:back")
    assert pushing.push(store, image, target, skopeo.Access(), passenger) == image.manifest
    back = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}:back"], capture_output=True, check=True
    ).stdout
    assert digest_of(back) == image.manifest
    assert told[-1][0] == told[-1][1] > 0


def test_other_users_can_not_read_images(open_store: ImageStore, address: str, tmp_path: Path) -> None:
    layer = archive({"a": b"b"})
    copy(f"oci:{make_layout(tmp_path / 'layout', [layer])}", f"docker://{address}/private", "--preserve-digests")
    image = pull(open_store, f"{address}/private")
    blob = open_store.blobs.path(digest_of(layer))
    for path in (blob, open_store.blobs.directory, open_store.file(image.digest)):
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "head", "-c1", str(path)],
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0 and b"Permission denied" in done.stderr
