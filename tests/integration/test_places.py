"""Images to and from other places than registries: directories and archives, as skopeo names them; and the SDK."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.client import transports
from isolat.errors import NotFound, UsageError
from isolat.images.oci import digest_of
from tests.support import registry
from tests.support.hostile import archive, copy, make_layout
from tests.support.roots import Root, private_root

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry.running(tmp_path_factory.mktemp("r") / "registry") as found:
        yield found


@pytest.fixture(scope="module")
def shared() -> Iterator[Root]:
    with private_root(image=False) as found:
        found.ensure_daemon()
        yield found


def test_what_skopeo_has_written_anywhere_is_pulled(shared: Root, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", [archive({"a": b"b"}), archive({"c": b"d"})])
    source = f"oci:{layout}"
    copy(source, f"oci:{tmp_path}/layout:one", "--preserve-digests")
    copy(source, f"dir:{tmp_path}/dir", "--preserve-digests")
    copy(source, f"oci-archive:{tmp_path}/oci.tar:one", "--preserve-digests")
    copy(source, f"docker-archive:{tmp_path}/docker.tar:one:1")
    config = digest_of(
        next(path.read_bytes() for path in layout.rglob("blobs/sha256/*") if b"diff_ids" in path.read_bytes())
    )
    for place in ("oci:layout:one", "oci:layout", "dir:dir", "oci-archive:oci.tar:one"):
        assert shared.cli("pull", "-q", place, cwd=tmp_path).stdout.decode().strip() == config.removeprefix("sha256:")
        shared.ok("rmi", config)
    shared.ok("pull", "-q", f"docker-archive:{tmp_path}/docker.tar:one:1")
    shared.ok("rmi", "one:1")
    for place, said in (
        ("oci:layout:two", b"two"), ("oci:absent", b"no directory"), ("dir:layout", b"manifest.json"),
        ("oci-archive:absent.tar", b"absent.tar"), ("docker-daemon:x:1", b"skopeo copy"),
    ):  # fmt: skip
        done = shared.cli("pull", place, cwd=tmp_path)
        assert done.returncode == 125 and said in done.stderr, done.stderr
    assert shared.ok("images", "-q") == ""


def test_an_archive_of_several_is_chosen_from(shared: Root, tmp_path: Path) -> None:
    for name in ("one", "two"):
        copy(f"oci:{make_layout(tmp_path / name, [archive({name: b'b'})])}", f"oci:{tmp_path}/both:{name}")
    done = shared.cli("pull", f"oci:{tmp_path}/both")
    assert done.returncode == 125 and b"one:latest, two:latest" in done.stderr, done.stderr
    shared.ok("pull", f"oci:{tmp_path}/both:two")
    assert shared.ok("images", "-q") == "two:latest"
    shared.ok("rmi", "two")


def test_a_directory_is_read_with_the_callers_rights(shared: Root, tmp_path: Path) -> None:
    """A blob that is a link to something that is no file, and one to a file that is something else."""
    layer = archive({"a": b"b"})
    layout = make_layout(tmp_path / "layout", [layer])
    blob = layout / "blobs/sha256" / digest_of(layer).removeprefix("sha256:")
    for target, said in (("/dev/zero", b"no plain file"), ("/etc/passwd", b"something else"), ("/absent", b"No such")):
        blob.unlink()
        blob.symlink_to(target)
        done = shared.cli("pull", f"oci:{layout}")
        assert done.returncode == 125 and said in done.stderr, done.stderr
    assert shared.ok("images", "-q") == ""


def test_pushed_anywhere_skopeo_reads_it(shared: Root, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", [archive({"a": b"b"})])
    shared.ok("pull", f"oci:{layout}")
    (image,) = json.loads(shared.ok("images", "--json"))
    shared.ok("tag", image["digest"], "mine:1")
    for place in (f"oci:{tmp_path}/layout:tag", f"dir:{tmp_path}/dir", f"oci-archive:{tmp_path}/oci.tar"):
        assert shared.ok("push", "mine:1", place).endswith(f" {image['manifest']}")
        found = subprocess.run(["skopeo", "inspect", "--raw", place], capture_output=True, check=True).stdout
        assert digest_of(found) == image["manifest"]
    shared.ok("push", "mine:1", f"docker-archive:{tmp_path}/docker.tar")
    found = subprocess.run(
        ["skopeo", "inspect", "--config", "--raw", f"docker-archive:{tmp_path}/docker.tar:mine:1"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert digest_of(found) == f"sha256:{image['digest']}"
    done = shared.cli("push", "mine:1", f"dir:{tmp_path}/dir")
    assert done.returncode == 125 and b"not empty" in done.stderr
    shared.ok("rmi", image["digest"])


def test_a_credential_helper_is_asked(shared: Root, tmp_path: Path) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread -r server\nprintf \'{"Username": "me", "Secret": "secret"}\'\n')
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    users = tmp_path / "htpasswd"
    users.write_text("me:$2y$05$a/OnCCyZk7DhReHmvzekjOEtWkh26r0ISE1LYOpIVacwY.v2/rdxu\n")  # bcrypt of `secret`
    with registry.running(tmp_path / "registry", f"auth: {{htpasswd: {{realm: test, path: {users}}}}}\n") as closed:
        copy(
            f"oci:{make_layout(tmp_path / 'layout', [archive({'a': b'b'})])}", f"docker://{closed}/x",
            "--dest-creds", "me:secret",
        )  # fmt: skip
        auth = tmp_path / "auth.json"
        auth.write_text(json.dumps({"credHelpers": {closed: "test"}}))
        env = {"REGISTRY_AUTH_FILE": str(auth), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = shared.cli("pull", f"{closed}/x", env=env)
        assert done.returncode == 0, done.stderr
        shared.ok("rmi", f"{closed}/x")
        helper.write_text("#!/bin/sh\nexit 1\n")
        done = shared.cli("pull", f"{closed}/x", env=env)
        assert done.returncode == 125 and b"isolat login" in done.stderr


def test_the_client_in_python(shared: Root, address: str, tmp_path: Path) -> None:
    from isolat.client.sdk import Client

    copy(f"oci:{make_layout(tmp_path / 'layout', [archive({'a': b'sdk'})])}", f"docker://{address}/sdk:1")
    client = Client(shared.path)
    told: list[tuple[str, int, int]] = []
    image = client.pull(f"{address}/sdk:1", on_progress=lambda *one: told.append(one))
    assert image["names"] == [f"{address}/sdk:1"]
    assert any(text.startswith("pulling") and done == total for text, done, total in told)
    pushed = client.push(f"{address}/sdk:1", f"{address}/sdk:2")
    assert pushed["digest"] == image["manifest"]
    with pytest.raises(NotFound):
        client.pull(f"{address}/sdk:absent")
    client.rmi(image["digest"])


def test_names_of_places() -> None:
    assert transports.parse("docker://a.b/c:1") == transports.Location("docker", "a.b/c:1")
    assert transports.parse("debian:12") == transports.Location("docker", "debian:12")
    assert transports.parse("docker:dind").remote
    assert transports.parse("oci:a/b:c") == transports.Location("oci", "a/b", "c")
    assert transports.parse("docker-archive:f.tar:a/b:c").name == "a/b:c"
    assert transports.parse("dir:/a:b") == transports.Location("dir", "/a:b")
    with pytest.raises(UsageError):
        transports.parse("containers-storage:x")
