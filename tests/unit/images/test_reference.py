"""How images are named, by Docker's rules."""

from __future__ import annotations

import pytest

from isolat.errors import UsageError
from isolat.images.reference import parse_name, parse_reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "name", "remote"),
    [
        ("debian", "debian:latest", "docker.io/library/debian:latest"),
        ("docker.io/library/debian:12", "debian:12", "docker.io/library/debian:12"),
        ("index.docker.io/debian", "debian:latest", "docker.io/library/debian:latest"),
        ("team/tool", "team/tool:latest", "docker.io/team/tool:latest"),
        ("docker.io/team/tool", "team/tool:latest", "docker.io/team/tool:latest"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("localhost:5000/x:1", "localhost:5000/x:1", "localhost:5000/x:1"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest", "127.0.0.1:5000/a/b:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("Host.Example/x", "Host.Example/x:latest", "Host.Example/x:latest"),
        (f"a.example/x@{DIGEST}", "", f"a.example/x@{DIGEST}"),
        (f"a.example/x:1@{DIGEST}", "a.example/x:1", f"a.example/x@{DIGEST}"),
    ],
)
def test_a_name_has_a_short_and_a_long_form(text: str, name: str, remote: str) -> None:
    found = parse_reference(text)
    assert (found.name, found.remote) == (name, remote)


WRONG = " / a//b a/ A a: a@ a@sha256:12 a@md5:12 -a host.example/ a:b:c ../a a/../b h.example:99999999/a".split(" ")


@pytest.mark.parametrize("text", [*WRONG, "a" * 300, "a b", "a\n", "a@sha256:" + "AB" * 32])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


def test_a_digest_can_not_be_given_as_a_name() -> None:
    with pytest.raises(UsageError, match="digest"):
        parse_name(f"debian@{DIGEST}")
