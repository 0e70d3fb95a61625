"""Archives of images: the forms that there are, and what a stranger may put into one; nothing is ever left of it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from isolat.errors import InvalidImage, IsolatError, NotFound, StoreError, UsageError
from isolat.images import archives, describe, saving, spool
from isolat.images.archives import FULL_NAME, REF_NAME
from isolat.images.flatten.flattening import Limits
from isolat.images.importing import import_archive
from isolat.images.oci import INDEX, Platform
from isolat.images.opening import opened
from isolat.images.spool import Spool
from isolat.images.store import ImageStore
from tests.support.archives import (
    blob_name,
    config,
    described,
    docker_members,
    from_file,
    layer,
    layout,
    load,
    oci_members,
    tar,
)
from tests.support.layers import Archive, digest, header, octal

LAYERS = [layer("one"), layer("two")]
AMD64 = Platform("linux", "amd64")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    """Afterwards no build of it is left, and every blob is one that an image has."""
    found = ImageStore(tmp_path / "root")
    yield found
    assert list((found.dir / "tmp").iterdir()) == []
    kept = {one for image in found.list() for one in found._blobs_of(image)}
    assert {name for name, _ in found.blobs.all()} == kept


def refused(store: ImageStore, data: bytes) -> str:
    with pytest.raises(InvalidImage) as caught:
        load(store, data)
    assert store.list() == []
    assert caught.value.message.isprintable()
    return caught.value.stage


def read(directory: Path, data: bytes, limits: Limits | None = None) -> int:
    """How many images there are in it, without taking them in."""
    directory.mkdir()
    found = Spool(directory, limits)
    with from_file(directory, data) as descriptor, opened(descriptor, "the archive") as more:
        found.take(more)
    return len(archives.images(found, AMD64))


# The forms


def test_dockers_form_is_taken_in_with_its_own_configuration(store: ImageStore) -> None:
    ((image, names),) = load(store, tar(docker_members(LAYERS, ["one:1", "docker.io/library/two"])))
    assert names == ("one:1", "two:latest") and store.resolve("two").digest == image.digest
    assert f"sha256:{image.digest}" == digest(config(LAYERS))
    assert image.command == ("/bin/true",) and dict(image.env)["A"] == "b"
    assert [one.digest for one in store.manifest(image).layers] == [digest(one) for one in LAYERS]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_whatever_compresses_it(store: ImageStore, pack: Any) -> None:
    ((image, _),) = load(store, pack(tar(docker_members(LAYERS))))
    assert image.digest in digest(config(LAYERS))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_dockers_layers_may_be_compressed_each(store: ImageStore, pack: Any) -> None:
    members = docker_members(LAYERS)
    for name in members:
        if name.endswith("layer.tar"):
            members[name] = pack(members[name])
    ((image, _),) = load(store, tar(members))
    assert image.digest in digest(config(LAYERS))


def test_layers_that_are_links_to_those_of_other_images(store: ImageStore) -> None:
    members = docker_members([LAYERS[0], LAYERS[0]])
    paths = [name for name in members if name.endswith("layer.tar")]
    archive = Archive()
    archive.symlink(paths[1].encode(), f"../{paths[0]}".encode())
    for name, data in members.items():
        if name != paths[1]:
            archive.add(f"./{name}".encode(), data=data)
    ((image, _),) = load(store, archive.bytes())
    assert len(store.manifest(image).layers) == 2


def test_an_oci_layout_keeps_its_manifest(store: ImageStore) -> None:
    blobs, manifest = oci_members(LAYERS, {REF_NAME: "v1", FULL_NAME: "docker.io/library/named:v1"})
    ((image, names),) = load(store, tar(layout(blobs, [manifest])))
    assert names == ("named:v1",) and image.manifest == manifest["digest"]


def test_an_image_without_a_name_has_its_digest(store: ImageStore) -> None:
    blobs, manifest = oci_members(LAYERS)
    ((image, names),) = load(store, tar(layout(blobs, [manifest])))
    assert names == () and store.resolve(image.digest).names == ()


def test_several_images_share_layers(store: ImageStore) -> None:
    one, first = oci_members(LAYERS, {REF_NAME: "one"})
    two, second = oci_members([LAYERS[0]], {REF_NAME: "two"}, author="b")
    loaded = load(store, tar(layout(one | two, [first, second])))
    assert [names for _, names in loaded] == [("one:latest",), ("two:latest",)]


def test_of_several_platforms_the_one_that_is_wanted(store: ImageStore) -> None:
    one, first = oci_members(LAYERS)
    two, second = oci_members([LAYERS[0]], architecture="arm64")
    inner = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [
            first | {"platform": {"os": "linux", "architecture": "amd64"}},
            second | {"platform": {"os": "linux", "architecture": "arm64"}},
            first | {"platform": {"os": "unknown", "architecture": "unknown"}},
        ],
    }
    raw = json.dumps(inner).encode()
    data = tar(layout({**one, **two, blob_name(raw): raw}, [described(raw, INDEX, annotations={REF_NAME: "multi"})]))
    ((image, _),) = load(store, data, platform=Platform("linux", "arm64"))
    assert image.config.architecture == "arm64"
    with pytest.raises(NotFound, match="riscv64") as caught:
        load(store, data, platform=Platform("linux", "riscv64"))
    assert "linux/amd64, linux/arm64" in caught.value.hint


def test_an_archive_that_is_both_keeps_its_manifest(store: ImageStore) -> None:
    blobs, manifest = oci_members(LAYERS)
    raw = config(LAYERS)
    packed = [blob_name(gzip.compress(one, mtime=0)) for one in LAYERS]
    table = [{"Config": blob_name(raw), "RepoTags": ["both:1"], "Layers": packed}]
    both = {**layout(blobs, [manifest]), "manifest.json": json.dumps(table).encode()}
    ((image, names),) = load(store, tar(both))
    assert names == ("both:1",) and image.manifest == manifest["digest"]


def test_a_name_that_meant_another_image_is_told(store: ImageStore) -> None:
    ((first, _),) = load(store, tar(docker_members(LAYERS, ["one:1", "two:1"])))
    moved: list[tuple[str, str]] = []
    for _ in range(2):  # the second time nothing moves
        load(store, tar(docker_members(LAYERS[:1], ["one:1", "new:1"])), moved=lambda *pair: moved.append(pair))
    assert moved == [("one:1", first.digest)]
    assert store.resolve("two:1").digest == first.digest != store.resolve("one:1").digest


def test_what_is_here_keeps_its_form(store: ImageStore) -> None:
    blobs, manifest = oci_members(LAYERS, {REF_NAME: "one"})
    load(store, tar(layout(blobs, [manifest])))
    ((image, _),) = load(store, tar(docker_members(LAYERS, ["other"])))
    assert image.manifest == manifest["digest"] and image.names == ("one:latest", "other:latest")


def test_members_may_have_attributes(store: ImageStore) -> None:
    archive = Archive()
    for name, data in docker_members(LAYERS).items():
        archive.add(name.encode(), data=data, xattrs={b"user.note": b"x" * 100})
    assert load(store, archive.bytes())


def test_an_image_without_a_layer(store: ImageStore) -> None:
    ((image, _),) = load(store, tar(docker_members([], ["empty:1"])))
    assert store.resolve("empty:1").digest == image.digest and store.manifest(image).layers == ()


def test_one_for_another_system_is_refused(store: ImageStore) -> None:
    with pytest.raises(NotFound, match="for windows/amd64") as caught:
        load(store, tar(docker_members(LAYERS, os="windows")))
    assert caught.value.stage == "no-platform"


# What is wrong


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"hello" * 1000, bytes(10240), tar({}), tar({"file": b"x"}), b"\x1f\x8b", b"PK\x03\x04" + bytes(600)],
)
def test_what_is_no_archive_of_images(store: ImageStore, data: bytes) -> None:
    assert refused(store, data) in ("bad-archive", "truncated", "bad-compression")


@pytest.mark.parametrize("form", ["docker", "oci", "gzip"])
def test_cut_off_anywhere(tmp_path: Path, form: str) -> None:
    blobs, manifest = oci_members(LAYERS)
    whole = tar(layout(blobs, [manifest])) if form == "oci" else tar(docker_members(LAYERS))
    data = gzip.compress(whole, 0) if form == "gzip" else whole
    step = 512 if form != "gzip" else 1511
    for at in range(0, len(data) - 1024, step):
        with pytest.raises(InvalidImage) as caught:
            read(tmp_path / f"{at}", data[:at])
        assert caught.value.stage in ("bad-archive", "truncated", "missing-layer"), at
    assert read(tmp_path / "whole", data) == 1


@pytest.mark.parametrize("name", ["../manifest.json", "/manifest.json", "a/../../x", "..", "/etc/passwd"])
@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_names_that_lead_out(store: ImageStore, name: str, kind: str) -> None:
    archive = Archive().add(name.encode(), kind, link=b"/etc/passwd")
    assert refused(store, archive.bytes()) == "bad-archive"


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../etc/passwd", "nothing", "manifest.json/x", ""])
@pytest.mark.parametrize("kind", ["link", "symlink"])
def test_links_lead_to_members_only(store: ImageStore, target: str, kind: str) -> None:
    members = docker_members(LAYERS)
    path = next(name for name in members if name.endswith("layer.tar"))
    del members[path]
    archive = Archive().add(path.encode(), kind, link=target.encode())
    for name, data in members.items():
        archive.add(name.encode(), data=data)
    assert refused(store, archive.bytes()) == "missing-layer"


def test_links_in_a_circle(store: ImageStore) -> None:
    archive = Archive().symlink(b"a", b"b").symlink(b"b", b"a").symlink(b"manifest.json", b"a")
    assert refused(store, archive.bytes()) == "bad-archive"


def test_devices_and_pipes_are_nothing(store: ImageStore) -> None:
    archive = Archive().add(b"manifest.json", "fifo").add(b"index.json", "char", device=(1, 8))
    assert refused(store, archive.bytes()) == "bad-archive"


def test_of_two_members_of_a_name_the_last_counts(store: ImageStore) -> None:
    members = docker_members(LAYERS)
    archive = Archive()
    for name in members:
        archive.add(name.encode(), data=b"something else")
    archive.symlink(b"manifest.json", b"nowhere")
    for name, data in members.items():
        archive.add(name.encode(), data=data)
    ((image, _),) = load(store, archive.bytes())
    assert image.digest in digest(config(LAYERS))


def test_a_layer_that_is_another(store: ImageStore) -> None:
    members = docker_members(LAYERS)
    members[next(name for name in members if name.endswith("layer.tar"))] = layer("other")
    assert refused(store, tar(members)) == "digest-mismatch"


def test_a_blob_that_is_not_what_it_is_called(store: ImageStore) -> None:
    blobs, manifest = oci_members(LAYERS)
    first = next(iter(blobs))
    assert refused(store, tar(layout({**blobs, first: b"other"}, [manifest]))) == "digest-mismatch"


@pytest.mark.parametrize("at", range(4))
def test_an_oci_blob_that_is_missing(store: ImageStore, at: int) -> None:
    blobs, manifest = oci_members(LAYERS)
    del blobs[list(blobs)[at]]
    assert refused(store, tar(layout(blobs, [manifest]))) == "missing-layer"


def test_what_the_store_has_is_not_lent_to_an_archive(store: ImageStore) -> None:
    blobs, manifest = oci_members(LAYERS)
    load(store, tar(layout(blobs, [manifest])))
    other, named = oci_members(LAYERS, author="other")
    for name in [name for name in other if name in blobs]:
        del other[name]
    with pytest.raises(InvalidImage) as caught:
        load(store, tar(layout(other, [named])))
    assert caught.value.stage == "missing-layer"


TABLES: list[tuple[object, str]] = [
    ("x", "bad-manifest"),
    ({}, "bad-manifest"),
    ([1], "bad-manifest"),
    ([{}], "bad-manifest"),
    ([{"Config": 1}], "bad-manifest"),
    ([{"Config": "nothing"}], "missing-layer"),
    ([{"Config": "../x"}], "missing-layer"),
    ([{"Config": "manifest.json"}], "bad-config"),
    ([{"Config": "c", "Layers": "x"}], "bad-manifest"),
    ([{"Config": "c", "Layers": [None]}], "bad-manifest"),
    ([{"Config": "c", "Layers": []}], "bad-manifest"),
    ([{"Config": "c", "Layers": ["no", "no"]}], "missing-layer"),
    ([{"Config": "c", "Layers": ["l", "l"], "RepoTags": ["A B"]}], "bad-name"),
    ([{"Config": "c", "Layers": ["l", "l"], "RepoTags": ["x@sha256:" + "0" * 64]}], "bad-name"),
    ([{"Config": "l", "Layers": ["l", "l"]}], "bad-config"),
    ([{"Config": "big", "Layers": ["l", "l"]}], "too-large"),
    ([], "bad-archive"),
    ([{"Config": "c"}] * 1001, "bad-manifest"),
]


@pytest.mark.parametrize(("table", "stage"), TABLES, ids=range(len(TABLES)))
def test_tables_that_are_wrong(store: ImageStore, table: object, stage: str) -> None:
    members = {"c": config(LAYERS), "l": LAYERS[0], "big": bytes(5 << 20), "manifest.json": json.dumps(table).encode()}
    assert refused(store, tar(members)) == stage


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff", b"null", b'{"manifests": 3}'])
@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_documents_that_are_none(store: ImageStore, name: str, raw: bytes) -> None:
    assert refused(store, tar({name: raw})) in ("bad-manifest", "bad-archive")


def test_sizes_that_are_claimed(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_ENTRIES_MAX", 100)
    assert refused(store, header(b"manifest.json", size=1 << 20) + bytes(1024)) == "truncated"
    assert refused(store, header(b"manifest.json", size=(1 << 60)) + bytes(1024)) == "too-large"
    with pytest.raises(InvalidImage) as caught:
        read(tmp_path / "a", tar(docker_members(LAYERS)), Limits(total_bytes=2000))
    assert caught.value.stage == "too-large"
    with pytest.raises(InvalidImage) as caught:
        read(tmp_path / "b", Archive().raw(*[header(b"x")] * 101).bytes())
    assert caught.value.stage == "too-many-entries"


def test_sparse_members_are_refused(store: ImageStore) -> None:
    block = header(b"manifest.json", b"S", 0, mtime=octal(0, 12))
    assert refused(store, block + bytes(1024)) in ("bad-archive", "bad-size")


def test_a_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(header(b"x", size=8 << 20) + bytes(8 << 20))
    with pytest.raises(InvalidImage) as caught:
        read(tmp_path / "bomb", bomb, Limits(total_bytes=1 << 20))
    assert caught.value.stage == "too-large"


def test_other_descriptors_are_no_archives(store: ImageStore) -> None:
    for path in ("/dev/null", "/"):
        descriptor = os.open(path, os.O_RDONLY)
        with pytest.raises(UsageError, match="neither a file nor a pipe"):
            archives.load(store, descriptor, lambda image, names: None)
        os.close(descriptor)


def test_a_caller_that_goes_ends_it(store: ImageStore) -> None:
    reading, writing = os.pipe()
    os.write(writing, tar(docker_members(LAYERS))[:2000])
    with pytest.raises(ConnectionResetError):
        archives.load(store, reading, lambda image, names: None, gone=lambda: True)
    os.close(reading)
    os.close(writing)


# Saving


def saved(store: ImageStore, *names: str, format: str = saving.DOCKER) -> bytes:
    path = store.root / "saved"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        saving.save(store, names, descriptor, format=format)
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize("format", saving.FORMATS)
def test_what_is_saved_is_loaded_the_same(store: ImageStore, format: str) -> None:
    one, first = oci_members(LAYERS, {REF_NAME: "one"})
    two, second = oci_members([LAYERS[0]], {REF_NAME: "quay.io/a/two:2"}, author="b")
    load(store, tar(layout(one | two, [first, second])))
    store.tag(store.resolve("one").digest, ["three"])
    before = {image.digest: (image.names, image.manifest) for image in store.list()}
    data = saved(store, "quay.io/a/two:2", "three", "one", format=format)
    assert data == saved(store, "one", "three", "quay.io/a/two:2", "one", format=format)
    for image in store.list():
        store.remove(image.digest)
    assert len(load(store, data)) == 2
    assert {image.digest: (image.names, image.manifest) for image in store.list()} == before


@pytest.mark.parametrize("format", saving.FORMATS)
def test_images_without_names_are_saved_as_such(store: ImageStore, format: str) -> None:
    one, first = oci_members(LAYERS)
    two, second = oci_members([LAYERS[0]], author="b")
    load(store, tar(layout(one | two, [first, second])))
    digests = sorted(image.digest for image in store.list())
    data = saved(store, *digests, format=format)
    assert sorted(image.digest for image, _ in load(store, data)) == digests


def test_what_can_not_be_saved(store: ImageStore, tmp_path: Path) -> None:
    load(store, tar(docker_members(LAYERS)))
    with pytest.raises(NotFound):
        saved(store, "one:1", "nothing")
    with pytest.raises(UsageError):
        saved(store, "one:1", format="zip")
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(StoreError) as caught:
        saving.save(store, ["one:1"], writing)
    assert caught.value.stage == "closed"
    os.close(writing)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UsageError):
        saving.save(store, ["one:1"], descriptor)
    os.close(descriptor)


def test_nobody_reads_and_the_caller_goes(store: ImageStore) -> None:
    load(store, tar(docker_members([layer("x" * 300_000)])))
    reading, writing = os.pipe()
    with pytest.raises(ConnectionResetError):
        saving.save(store, ["one:1"], writing, gone=lambda: True)
    os.close(reading)
    os.close(writing)


def test_through_a_pipe_while_it_is_written(store: ImageStore, tmp_path: Path) -> None:
    load(store, tar(docker_members([layer("x" * 300_000)])))
    other = ImageStore(tmp_path / "other")
    reading, writing = os.pipe()

    def write() -> None:
        saving.save(store, ["one:1"], writing)
        os.close(writing)

    thread = threading.Thread(target=write)
    thread.start()
    archives.load(other, reading, lambda image, names: None)
    thread.join()
    os.close(reading)
    assert other.resolve("one:1").digest == store.resolve("one:1").digest


def test_a_damaged_blob_is_found_while_it_is_saved(store: ImageStore) -> None:
    ((image, _),) = load(store, tar(docker_members(LAYERS)))
    path = store.blobs.path(store.manifest(image).layers[0].digest)
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(StoreError) as caught:
        saved(store, "one:1")
    assert caught.value.stage == "digest-mismatch"


def test_an_image_that_is_removed_while_it_is_saved_is_saved_whole(store: ImageStore, tmp_path: Path) -> None:
    ((image, _),) = load(store, tar(docker_members(LAYERS)))
    descriptor = os.open(tmp_path / "saved", os.O_WRONLY | os.O_CREAT)

    def remove(*_: object) -> None:
        if store.list():
            store.remove("one:1")

    saving.save(store, ["one:1"], descriptor, progress=remove)
    os.close(descriptor)
    assert store.list() == []
    assert [one.digest for one, _ in load(store, (tmp_path / "saved").read_bytes())] == [image.digest]


def test_a_blob_that_is_missing_is_no_error_of_writing(store: ImageStore) -> None:
    ((image, _),) = load(store, tar(docker_members(LAYERS)))
    path = store.blobs.path(store.manifest(image).layers[0].digest)
    path.rename(store.root / "elsewhere")
    with pytest.raises(NotFound, match="the image one:1 can't be saved"):
        saved(store, "one:1")
    assert (store.root / "saved").read_bytes() == b""
    (store.root / "elsewhere").rename(path)


# Importing


def imported(store: ImageStore, data: bytes, *names: str, **more: Any) -> Any:
    with from_file(store.root, data) as descriptor:
        return import_archive(store, descriptor, names, **more)


def test_an_archive_of_a_tree_is_one_image_whatever_compresses_it(store: ImageStore) -> None:
    packs: Mapping[str, Any] = {"gzip": gzip.compress, "zstd": zstandard.compress, "bz2": bz2.compress}
    found = {imported(store, pack(LAYERS[0]), "x").digest for pack in packs.values()}
    assert found == {imported(store, LAYERS[0], "x").digest}
    image = imported(store, LAYERS[0], "y", change=['CMD ["sh"]', "ENV A=b"], message="from far", platform=AMD64)
    assert image.command == ("sh",) and dict(image.env)["A"] == "b" and image.names == ("y:latest",)
    assert describe.history(store, image)[0]["comment"] == "from far"
    assert imported(store, LAYERS[0], platform=Platform("linux", "arm64", "v8")).config.variant == "v8"


@pytest.mark.parametrize("data", [b"", b"not an archive at all", LAYERS[0][:700], b"\xfd7zXZ\0damaged"])
def test_what_is_no_tree(store: ImageStore, data: bytes) -> None:
    with pytest.raises(InvalidImage):
        imported(store, data)
    assert store.list() == []


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_half_an_archive_is_no_archive(store: ImageStore, pack: Any) -> None:
    """Whatever compresses it; its end may be missing by a file, by a frame's last bytes, or by the mark alone."""
    archive = Archive()
    for name in (b"one", b"two"):
        archive.add(name, data=os.urandom(400_000))
    whole = archive.bytes()
    packed = pack(whole)
    for cut in (packed[: len(packed) // 2], packed[:-1], pack(whole.rstrip(b"\0")), whole[: 512 + 400_384]):
        with pytest.raises(InvalidImage) as caught:
            imported(store, cut)
        assert caught.value.stage == "truncated"
    assert imported(store, packed).digest == imported(store, whole).digest


def test_every_form_of_a_zstd_frame(store: ImageStore) -> None:
    def pack(data: bytes, **options: Any) -> bytes:
        return zstandard.ZstdCompressor(**options).compress(data)

    data = LAYERS[0] + bytes(1 << 20)
    skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    several = pack(data[:700], write_checksum=True) + skipped + pack(data[700:], write_content_size=False)
    streamed = zstandard.ZstdCompressor(level=19).compressobj()
    forms = [several, skipped + several, streamed.compress(data) + streamed.flush()]
    assert len({imported(store, one).digest for one in forms}) == 1
    for one in (several + skipped[:-1], several[:-1], several + b"\x28"):
        with pytest.raises(InvalidImage) as caught:
            imported(store, one)
        assert caught.value.stage == "truncated"


def test_history_is_text_whatever_was_typed(store: ImageStore) -> None:
    image = imported(store, LAYERS[0], message="\udcff\ud800!")
    assert describe.history(store, image)[0]["comment"] == "\ufffd\ufffd!"


def test_a_change_is_checked_before_anything_is_read(store: ImageStore) -> None:
    with pytest.raises(UsageError):
        import_archive(store, -1, change=["RUN rm"])
    with pytest.raises(IsolatError) as caught:
        imported(store, LAYERS[0], limits=Limits(total_bytes=100))
    assert caught.value.stage == "too-large"


# What is told of them


def test_images_by_the_layers_that_they_share(store: ImageStore) -> None:
    for layers, name in (([0], "base"), ([0, 1], "middle"), ([0, 1, 2], "top"), ([0, 3], "other"), ([4], "alone")):
        load(store, tar(docker_members([layer(str(at)) for at in layers], [name])))
    tree = describe.tree(store, store.list())

    def short(node: Mapping[str, Any]) -> tuple[Any, ...]:
        names = [name for image in node["images"] for name in image["names"]]
        return (len(node["layers"]), names, [short(one) for one in node["children"]])

    assert [short(node) for node in tree] == [
        (1, ["alone:latest"], []),
        (
            1,
            ["base:latest"],
            [(1, ["middle:latest"], [(1, ["top:latest"], [])]), (1, ["other:latest"], [])],
        ),
    ]


def test_everything_of_an_image(store: ImageStore) -> None:
    history = [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}, {"created": "2026", "comment": "c"}]
    ((image, _),) = load(store, tar(docker_members(LAYERS, history=history, created="2026-01-01T00:00:00Z")))
    found = describe.inspect(store, image)
    assert found["id"] == f"sha256:{image.digest}" and found["names"] == ["one:1"]
    assert found["created"] == "2026-01-01T00:00:00Z" and found["architecture"] == "amd64"
    assert [one["diff_id"] for one in found["layers"]] == [digest(one) for one in LAYERS]
    rows = describe.history(store, image)
    assert [(row["created_by"], row["size_bytes"] > 0) for row in rows] == [("", True), ("b", False), ("a", True)]
