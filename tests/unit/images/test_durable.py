"""What a power cut, a kill and other users leave of the store, and what it makes of that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolat.images.oci import Descriptor
from isolat.images.registries.staging import Incoming, Kept
from isolat.images.store import ImageStore
from tests.support.archives import docker_members, layer, load, tar

ARCHIVE = tar(docker_members([layer("one"), layer("two")], ["one:1"]))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "root")


def cut(path: Path) -> bytes:
    whole = path.read_bytes()
    path.chmod(0o600)
    os.truncate(path, len(whole) // 2)
    return whole


def test_names_and_descriptions_are_roots_alone(store: ImageStore) -> None:
    load(store, ARCHIVE)
    described = sorted(store.dir.glob("*.json"))
    assert len(described) == 2
    for path in described:
        assert path.stat().st_mode & 0o7777 == 0o600
        path.chmod(0o644)
    ImageStore(store.root)
    assert {path.stat().st_mode & 0o7777 for path in described} == {0o600}


def test_files_are_on_the_disk_before_their_description_is_seen(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []  # the inode, and whether the description was there already
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        described = any(len(path.stem) == 64 for path in store.dir.glob("*.json"))
        synced.append((os.fstat(descriptor).st_ino, described))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    ((image, _),) = load(store, ARCHIVE)
    before = {inode for inode, there in synced if not there}
    blobs = [store.blobs.path(digest) for digest, _ in store.blobs.all()]
    for path in (store.file(image.digest), *blobs, store.dir, store.blobs.directory / "sha256"):
        assert path.stat().st_ino in before, path
    assert (store.dir.stat().st_ino, True) in synced


def test_a_file_system_that_was_cut_short_is_made_again(store: ImageStore) -> None:
    ((image, _),) = load(store, ARCHIVE)
    whole = cut(store.file(image.digest))
    assert store.find(image.digest) is None
    load(store, ARCHIVE)
    assert store.file(image.digest).read_bytes() == whole
    assert store.find(image.digest) is not None


def test_a_blob_that_was_cut_short_comes_again(store: ImageStore) -> None:
    ((image, _),) = load(store, ARCHIVE)
    path = store.blobs.path(store.manifest(image).layers[0].digest)
    whole = cut(path)
    load(store, ARCHIVE)
    assert path.read_bytes() == whole


def test_a_pull_is_not_offered_a_blob_that_was_cut_short(store: ImageStore) -> None:
    ((image, _),) = load(store, ARCHIVE)
    wanted: list[Descriptor] = list(store.manifest(image).layers)
    incoming = Incoming(store.dir / "one", store.blobs, Kept(store.dir))
    assert incoming.missing(wanted) == []
    cut(store.blobs.path(wanted[0].digest))
    incoming = Incoming(store.dir / "two", store.blobs, Kept(store.dir))
    assert incoming.missing(wanted) == wanted[:1]


def test_what_a_killed_change_left_goes_at_the_next_opening(store: ImageStore) -> None:
    load(store, ARCHIVE)
    left = [store.dir / ".names.json.01234567", store.dir / f".{'0' * 64}.json.01234567"]
    for path in left:
        path.touch()
    ImageStore(store.root)
    assert not any(path.exists() for path in left) and store.resolve("one:1")
