"""What an environment has changed, told and kept: as Docker tells it, and exactly."""

from __future__ import annotations

import json

import pytest

from tests.support.roots import Root

pytestmark = pytest.mark.root

CHANGE = """
set -e
echo new > /new; chmod 4751 /new
mkdir -p /srv/deep; echo x > /srv/deep/file; ln -s ../deep /srv/deep/link; ln /srv/deep/file /srv/deep/second
echo more >> /etc/issue
rm /etc/debian_version
rm -r /etc/default; mkdir /etc/default; echo only > /etc/default/only
touch -d @1500000000.123456789 /srv/deep/file
mkdir /srv/theirs; chown 1000:2000 /srv/theirs
truncate -s 1G /srv/sparse
"""
LOOK = """
cat /new; stat -c %a /new
stat -c '%h %Y' /srv/deep/file; readlink /srv/deep/link
tail -n 1 /etc/issue
test ! -e /etc/debian_version && echo gone
ls /etc/default
stat -c %u:%g /srv/theirs
stat -c %s /srv/sparse
"""
SEEN = "new\n4751\n2 1500000000\n../deep\nmore\ngone\nonly\n1000:2000\n1073741824"


@pytest.mark.parametrize("state", ["running", "ended"])
def test_what_was_changed_is_in_the_new_image_and_nothing_else(fresh_root: Root, state: str) -> None:
    root = fresh_root
    root.ok("run", "-d", "--name", "it", "debian", "sh", "-c", f"{CHANGE}\necho ready; exec sleep 600")
    while "ready" not in root.ok("logs", "it"):
        pass
    if state == "ended":
        root.ok("kill", "it")
        root.ok("wait", "it")
    id = root.ok(
        "commit", "-q", "-m", "some words", "-a", "me", "-c", 'CMD ["cat", "/new"]', "-c", "ENV A=b", "it", "kept"
    )
    assert root.ok("run", "--rm", "kept") == "new"
    assert root.ok("run", "--rm", "kept", "sh", "-c", LOOK) == SEEN
    assert root.ok("run", "--rm", "kept", "sh", "-c", "echo $A; cat /etc/hostname | wc -l") == "b\n1"
    (told,) = json.loads(root.ok("image", "inspect", "kept"))
    assert told["id"] == f"sha256:{id}"
    history = json.loads(root.ok("image", "history", "--json", "kept"))
    assert history[0]["comment"] == "some words"
    assert len(history) == 2
    if state == "running":
        assert root.ok("exec", "it", "echo", "goes on") == "goes on"
    assert root.ok("system", "check", "--deep") == "all is well"
    root.ok("rm", "-f", "it")
    root.ok("rmi", "debian")  # what stands on it keeps its layers
    assert root.ok("run", "--rm", "kept") == "new"


def test_a_committed_image_can_be_committed_again(fresh_root: Root) -> None:
    root = fresh_root
    root.ok("run", "--name", "one", "debian", "sh", "-c", "echo 1 > /one")
    root.ok("commit", "one", "first")
    root.ok("run", "--name", "two", "first", "sh", "-c", "rm /one; echo 2 > /two")
    root.ok("commit", "two", "second")
    assert root.ok("run", "--rm", "second", "sh", "-c", "cat /two; test -e /one || echo none") == "2\nnone"
    assert root.ok("run", "--rm", "first", "cat", "/one") == "1"


def test_differences_are_told_as_docker_tells_them(root: Root) -> None:
    root.ok("run", "--name", "it", "debian", "sh", "-c", CHANGE)
    found = {path: kind for kind, path in (line.split(" ", 1) for line in root.ok("diff", "it").splitlines())}
    assert found["/new"] == "A"
    assert (found["/srv"], found["/srv/deep"], found["/srv/deep/file"]) == ("C", "A", "A")
    assert (found["/etc"], found["/etc/issue"], found["/etc/debian_version"]) == ("C", "C", "D")
    assert (found["/etc/default"], found["/etc/default/only"]) == ("C", "A")
    assert {
        kind for path, kind in found.items() if path.startswith("/etc/default/") and path != "/etc/default/only"
    } <= {"D"}
    assert not {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"} & set(found)
    assert json.loads(root.ok("diff", "--json", "it"))[0]["kind"] in "ACD"
    root.ok("rm", "it")


def test_what_can_not_be_committed_is_refused_with_its_reason(root: Root) -> None:
    root.ok("run", "--name", "it", "debian", "true")
    for words, reason in (
        (("-c", "RUN x", "it", "name"), b"--change"),
        (("it", "BAD NAME"), b"can't be the name"),
        (("nobody", "name"), b"no environment"),
    ):
        done = root.cli("commit", *words)
        assert done.returncode == 125 and reason in done.stderr, done.stderr
    root.ok("rm", "it")
