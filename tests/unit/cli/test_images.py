"""Listings of images, and what is done to several of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..client.daemon import Daemon, Request
from .conftest import Command


def image(digit: str, *names: str, **labels: str) -> dict[str, Any]:
    found = {"digest": digit * 64, "names": list(names), "name": names[0] if names else "", "kind": "oci"}
    return {**found, "size_bytes": 1, "created_ns": 0, "labels": [list(pair) for pair in labels.items()]}


IMAGES = [
    image("a", "debian:12", "debian:latest"),
    image("b", "team/app:1", "reg.example:5000/app:2", team="red", old=""),
    image("c", team="blue"),
]
C = "c" * 64


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["debian:12", "debian:latest", "team/app:1", "reg.example:5000/app:2", C]),
        (["debian"], ["debian:12", "debian:latest"]),
        (["docker.io/library/debian:12"], ["debian:12"]),
        (["deb*"], ["debian:12", "debian:latest"]),
        (["app"], []),
        (["*"], ["debian:12", "debian:latest"]),
        (["--filter", "reference=*/app"], ["team/app:1", "reg.example:5000/app:2"]),
        (["--filter", "reference=reg.example:5000/app"], ["reg.example:5000/app:2"]),
        (["--filter", "dangling=true"], [C]),
        (["--filter", "dangling=false", "debian:latest"], ["debian:latest"]),
        (["--filter", "label=team"], ["team/app:1", "reg.example:5000/app:2", C]),
        (["--filter", "label=team=red", "--filter", "label=old"], ["team/app:1", "reg.example:5000/app:2"]),
        (["--filter", "label=team", "--filter", "dangling=true"], [C]),
    ],
)
def test_which_are_listed(
    isolat: Command, daemon: Daemon, words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.replies("images", images=IMAGES)
    assert isolat("images", "-q", *words) == 0
    assert capsys.readouterr().out.split() == names
    assert isolat("images", "--digests", "--no-trunc", *words) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == names


@pytest.mark.parametrize("text", ["dangling=maybe", "before=x", "label"])
def test_a_filter_that_is_none(isolat: Command, daemon: Daemon, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isolat("images", "--filter", text) != 0
    assert f"not a filter: {text}" in capsys.readouterr().err


def _answer(request: Request) -> None:
    name = request.args["images"][0] if "images" in request.args else request.args["image"]
    if name == "nothere":
        request.error("image-not-found", "there is no image nothere")
    else:
        request.ok(images=[{"names": [name]}])


def test_what_can_be_inspected_is(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("image_inspect", _answer)
    assert isolat("image", "inspect", "a", "nothere", "b") == 125
    shown = capsys.readouterr()
    assert [one["names"] for one in json.loads(shown.out)] == [["a"], ["b"]]
    assert "there is no image nothere" in shown.err
    assert isolat("image", "inspect", "nothere") == 125
    assert json.loads(capsys.readouterr().out) == []


def test_removing_goes_on(isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("rmi", _answer)
    assert isolat("rmi", "a", "nothere", "b") == 125
    assert capsys.readouterr().out.split() == ["a", "b"]
    assert isolat("rmi", "-f", "nothere") == 0
    assert [request.args["force"] for request in daemon.requests] == [False] * 3 + [True]


def test_an_image_that_is_inspected_as_an_environment(
    isolat: Command, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.on("inspect", lambda request: request.error("not-found", "there is no environment"))
    daemon.on("image_inspect", _answer)
    assert isolat("inspect", "app") == 125
    assert "it is an image: isolat image inspect app" in capsys.readouterr().err
    assert isolat("inspect", "nothere") == 125
    assert "image inspect" not in capsys.readouterr().err
