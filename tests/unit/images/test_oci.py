"""Documents from elsewhere: what is read of them, and that nothing else than InvalidImage ever comes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.errors import InvalidImage, NotFound
from isolat.images import oci
from isolat.images.oci import Index, Manifest, Platform

A, B = "sha256:" + "aa" * 32, "sha256:" + "bb" * 32
CONFIG = {"mediaType": oci.CONFIG, "digest": A, "size": 10}
LAYER = {"mediaType": oci.LAYER_GZIP, "digest": B, "size": 20}
MANIFEST: dict[str, Any] = {"schemaVersion": 2, "mediaType": oci.MANIFEST, "config": CONFIG, "layers": [LAYER]}


def raw(data: object) -> bytes:
    return json.dumps(data).encode()


def manifest(**changes: object) -> bytes:
    return raw(MANIFEST | changes)


def test_a_manifest_names_its_blobs() -> None:
    found = oci.parse_manifest(manifest())
    assert isinstance(found, Manifest)
    assert [one.digest for one in found.blobs] == [A, B]
    assert found.layers[0].size_bytes == 20
    assert found.digest == oci.digest_of(manifest())


def test_what_is_written_can_be_read_and_is_always_the_same() -> None:
    found = oci.parse_manifest(manifest())
    assert isinstance(found, Manifest)
    again = oci.write_manifest(found.config, found.layers)
    assert again == oci.write_manifest(found.config, found.layers)
    read = oci.parse_manifest(again)
    assert isinstance(read, Manifest)
    assert (read.config, read.layers) == (found.config, found.layers)


def test_the_platform_is_chosen_from_an_index() -> None:
    def one(digest: str, **platform: str) -> dict[str, Any]:
        return {"mediaType": oci.MANIFEST, "digest": digest, "size": 1, "platform": platform}

    data = {"schemaVersion": 2, "mediaType": oci.INDEX}
    found = oci.parse_manifest(
        raw(
            data
            | {
                "manifests": [
                    one(A, os="linux", architecture="arm64", variant="v8"),
                    one(B, os="linux", architecture="amd64"),
                ]
            }
        )
    )
    assert isinstance(found, Index)
    assert oci.choose(found, Platform("linux", "amd64")).digest == B
    assert oci.choose(found, Platform("linux", "arm64")).digest == A
    assert oci.choose(found, Platform("linux", "arm64", "v8")).digest == A
    with pytest.raises(NotFound) as caught:
        oci.choose(found, Platform("linux", "s390x"))
    assert "linux/amd64, linux/arm64/v8" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "stage"),
    [
        (b"", "bad-manifest"),
        (b"[]", "bad-manifest"),
        (b"\xff", "bad-manifest"),
        (b"[" * 100_000, "bad-manifest"),
        ('{"a": "\ud800"}'.encode(errors="surrogatepass"), "bad-manifest"),
        (manifest().decode().encode("utf-16"), "bad-manifest"),
        (b" " * (5 << 20), "too-large"),
        (manifest(schemaVersion=1), "bad-manifest"),
        (manifest(mediaType="text/plain"), "bad-manifest"),
        (manifest(config=None), "bad-manifest"),
        (manifest(layers={}), "bad-manifest"),
        (manifest(layers=[3]), "bad-manifest"),
        (manifest(layers=[LAYER] * 600), "bad-manifest"),
        (manifest(layers=[LAYER | {"size": -1}]), "bad-manifest"),
        (manifest(layers=[LAYER | {"size": 1 << 60}]), "bad-manifest"),
        (manifest(layers=[LAYER | {"size": True}]), "bad-manifest"),
        (manifest(layers=[LAYER | {"size": "1"}]), "bad-manifest"),
        (manifest(layers=[LAYER | {"digest": "md5:1"}]), "bad-digest"),
        (manifest(layers=[LAYER | {"digest": "sha256:../../etc/passwd"}]), "bad-digest"),
        (manifest(config=CONFIG | {"mediaType": "application/x-tar"}), "bad-manifest"),
    ],
)
def test_a_malformed_manifest_has_a_named_error(data: bytes, stage: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        oci.parse_manifest(data)
    assert caught.value.stage == stage


def config(**changes: object) -> bytes:
    return raw({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [B]}} | changes)


def test_a_configuration_is_read_and_null_counts_as_nothing() -> None:
    inner: dict[str, object] = {
        "Env": ["A=1", "B=x=y"],
        "Cmd": None,
        "Entrypoint": ["/x"],
        "Labels": {"a": "b"},
        "Volumes": {"/d": {}},
    }
    found = oci.parse_config(config(config=inner, history=[{"created_by": "RUN x", "empty_layer": True}], created=None))
    assert found.env == (("A", "1"), ("B", "x=y"))
    assert (found.command, found.entrypoint, found.labels) == ((), ("/x",), (("a", "b"),))
    assert found.volumes == ("/d",)
    assert found.history[0].empty_layer
    assert found.diff_ids == (B,)


def test_whole_pairs_of_surrogates_are_text() -> None:
    assert oci.parse_config(config(author="\U0001f98a")).author == "\U0001f98a"
    assert b"\\ud83e" in config(author="\U0001f98a")


def test_what_an_index_names_makes_no_long_error() -> None:
    one = {"mediaType": oci.MANIFEST, "digest": A, "size": 1}
    many = [one | {"platform": {"os": "linux", "architecture": f"{at}{'x' * 1000}"}} for at in range(1000)]
    found = oci.parse_manifest(raw({"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": many}))
    assert isinstance(found, Index)
    with pytest.raises(NotFound) as caught:
        oci.choose(found, Platform("linux", "amd64"))
    assert len(caught.value.hint) < 2000 and "and 980 more" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"rootfs": None},
        {"rootfs": {"diff_ids": ["x"]}},
        {"rootfs": {"diff_ids": [1]}},
        {"config": []},
        {"config": {"Env": "A=1"}},
        {"config": {"Cmd": [1]}},
        {"config": {"User": 3}},
        {"config": {"User": "a\0b"}},
        {"config": {"Labels": {"a": 1}}},
        {"history": [1]},
        {"architecture": {}},
        {"config": {"Env": ["A=\ud800"]}},
        {"of nobody's knowledge": {"\udfff": 1}},
    ],
)
def test_a_malformed_configuration_has_a_named_error(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidImage):
        oci.parse_config(config(**changes))


def test_a_manifest_and_a_configuration_of_different_lengths_are_refused() -> None:
    found = oci.parse_manifest(manifest(layers=[LAYER, LAYER]))
    assert isinstance(found, Manifest)
    with pytest.raises(InvalidImage, match="2 layers"):
        oci.check_together(found, oci.parse_config(config()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["config", "layers", "mediaType", "schemaVersion", "manifests"]), JSON)
def test_whatever_a_field_of_a_manifest_holds(name: str, value: object) -> None:
    try:
        oci.parse_manifest(manifest(**{name: value}))
    except InvalidImage as error:
        assert error.stage in {"bad-manifest", "bad-digest"}


@given(st.sampled_from(["config", "rootfs", "history", "os", "architecture", "created"]), JSON)
def test_whatever_a_field_of_a_configuration_holds(name: str, value: object) -> None:
    try:
        oci.parse_config(config(**{name: value}))
    except InvalidImage as error:
        assert error.stage in {"bad-config", "bad-digest"}
