"""Names and descriptions of images."""

from __future__ import annotations

import json

import pytest

from isolat.errors import StoreError, UsageError
from isolat.images.image import Image, ImageConfig, digest_prefix, image_from_json
from isolat.images.reference import parse_name


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("debian", "debian:latest"),
        ("debian:bookworm", "debian:bookworm"),
        ("team/tool", "team/tool:latest"),
        ("host.example/team/tool:1.2_3", "host.example/team/tool:1.2_3"),
        ("a-b__c.d", "a-b__c.d:latest"),
    ],
)
def test_a_name_without_a_tag_is_latest(text: str, full: str) -> None:
    assert parse_name(text) == full


@pytest.mark.parametrize(
    "text", ["", ":", "debian:", ":x", "Debian", "a b", "../up", "a/../b", "a:b:c", "-a", "a\n", "a:\n"]
)
def test_what_cannot_be_a_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_name(text)


@pytest.mark.parametrize(
    ("text", "prefix"),
    [("abcdef", "abcdef"), ("sha256:" + "0" * 64, "0" * 64), ("abcde", ""), ("xyzxyz", ""), ("0" * 65, "")],
)
def test_a_digest_is_recognised_from_six_digits_on(text: str, prefix: str) -> None:
    assert digest_prefix(text) == prefix


def test_a_description_survives_json() -> None:
    config = ImageConfig(kind="host", command=("bash", "-l"), user="1:2", binds=(("/usr", "/usr"),), env=(("A", "b"),))
    image = Image("ab" * 32, config, size_bytes=4096, created_ns=17)
    assert image_from_json(json.dumps(image.description())) == image


def test_the_interface_tells_the_names_beside_the_defaults() -> None:
    told = Image("ab" * 32, ImageConfig(kind="host"), 4096, 17, ("host:latest", "x:1")).to_json()
    assert (told["name"], told["names"], told["kind"]) == ("host:latest", ["host:latest", "x:1"], "host")
    assert Image("ab" * 32, ImageConfig(kind="host"), 4096, 17).to_json()["name"] == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 3}',
        '{"version": 1, "config": {"nothing": 1}, "digest": "a"}',
        '{"version": 1, "config": 3}',
    ],
)
def test_a_damaged_description_is_told_as_such(text: str) -> None:
    with pytest.raises(StoreError, match="damaged"):
        image_from_json(text)
