"""``save``, ``load`` and ``import`` with a daemon, beside skopeo, through files and pipes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.client.sdk import Client
from isolat.errors import InvalidImage
from isolat.images.store import ImageStore
from tests.support import images
from tests.support.archives import docker_members, layer, tar
from tests.support.roots import Root, private_root

pytestmark = pytest.mark.root
FORMATS = ("docker-archive", "oci-archive")


@pytest.fixture(scope="module")
def shared() -> Iterator[Root]:
    with private_root(image=False) as root:
        root.ensure_daemon()
        images.add_small(root.path, "kept")
        yield root


@pytest.fixture
def small(shared: Root) -> Root:
    """With an image ``small``, whose command shows its name and ends with 3, and ``kept``, which is like it."""
    for image in shared.ask("images")["images"]:
        if "kept:latest" not in image["names"]:
            shared.ask("rmi", {"image": image["digest"], "force": True})
    images.add_small(shared.path, "small")
    return shared


def skopeo(*words: str) -> str:
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo")
    done = subprocess.run(["skopeo", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(root: Root, name: str) -> str:
    found = json.loads(root.ok("image", "inspect", name))
    return str(found[0]["id"])


@pytest.mark.parametrize("format", FORMATS)
def test_saved_removed_loaded_run(small: Root, tmp_path: Path, format: str) -> None:
    before = json.loads(small.ok("image", "inspect", "small"))[0]
    file = tmp_path / "saved.tar"
    small.ok("save", "--format", format, "-o", str(file), "small")
    assert [path.name for path in tmp_path.iterdir()] == ["saved.tar"]
    small.ok("rmi", "small")
    assert small.ok("load", "-i", str(file)) == "Loaded image: small:latest"
    after = json.loads(small.ok("image", "inspect", "small"))[0]
    assert {key: after[key] for key in ("id", "manifest", "layers")} == {
        key: before[key] for key in ("id", "manifest", "layers")
    }
    done = small.cli("run", "--rm", "small")
    assert (done.returncode, done.stdout) == (3, b"small\n")
    assert small.ok("system", "check", "--deep") == "all is well"


@pytest.mark.parametrize("format", FORMATS)
def test_skopeo_reads_what_is_saved(small: Root, tmp_path: Path, format: str) -> None:
    file = tmp_path / "saved.tar"
    small.ok("save", "--format", format, "-o", str(file), "small")
    assert json.loads(skopeo("inspect", f"{format}:{file}"))["Architecture"] == "amd64"
    raw = skopeo("inspect", "--config", "--raw", f"{format}:{file}")
    assert "sha256:" + hashlib.sha256(raw.encode()).hexdigest() == digest(small, "small")
    skopeo("copy", f"{format}:{file}", f"dir:{tmp_path}/copied")


@pytest.mark.parametrize("format", FORMATS)
def test_what_skopeo_writes_is_loaded(small: Root, tmp_path: Path, format: str) -> None:
    small.ok("save", "--format", "oci-archive", "-o", str(tmp_path / "saved.tar"), "small")
    skopeo("copy", f"oci-archive:{tmp_path}/saved.tar", f"oci:{tmp_path}/layout:x")
    skopeo("copy", f"oci:{tmp_path}/layout:x", f"{format}:{tmp_path}/theirs.tar:other:1")
    before = digest(small, "small")
    small.ok("rmi", "small")
    assert small.ok("load", "-i", str(tmp_path / "theirs.tar")) == "Loaded image: other:1"
    assert digest(small, "other:1") == before
    assert small.cli("run", "--rm", "other:1").returncode == 3


def test_a_name_that_is_taken_from_another_image_is_told(small: Root, tmp_path: Path) -> None:
    old, file = digest(small, "small"), tmp_path / "other.tar"
    file.write_bytes(tar(docker_members([layer("other")], ["small:latest"])))
    for told in (f"note: small:latest has meant {old} until now, which stays without it\n", ""):
        done = small.cli("load", "--json", "-i", str(file))
        assert (done.returncode, done.stderr.decode()) == (0, told)
    small.ok("image", "inspect", old)


def test_through_pipes_and_compressed(small: Root) -> None:
    done = small.cli("save", "small")
    before = digest(small, "small")
    assert done.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "manifest.json" in archive.getnames()
    for data in (done.stdout, gzip.compress(done.stdout)):
        small.ok("rmi", "small")
        assert small.ok("load", input=data) == "Loaded image: small:latest"
        assert digest(small, "small") == before
    assert small.ok("load", "-q", input=data) == before


def test_several_images_in_one(small: Root, tmp_path: Path) -> None:
    small.ok("tag", "small", "team/further:1", "debian-like")
    images.add_small(small.path, "second")
    small.ok("save", "-o", str(tmp_path / "all.tar"), "small", "second", "team/further:1")
    for name in ("small", "second", "team/further:1", "debian-like"):
        small.ok("rmi", name)
    loaded = small.ok("load", "-i", str(tmp_path / "all.tar")).splitlines()
    assert sorted(loaded) == [
        "Loaded image: second:latest",
        "Loaded image: small:latest",
        "Loaded image: team/further:1",
    ]


def test_a_tree_of_tar_becomes_an_image_that_runs(small: Root, tmp_path: Path) -> None:
    mounted = ImageStore(small.path).mount(digest(small, "small").removeprefix("sha256:"))
    done = subprocess.run(["tar", "-C", mounted, "-c", "."], capture_output=True, check=True)
    words = ("import", "-c", 'CMD ["/bin/show"]', "-m", "from tar", "-", "imported")
    first = small.ok(*words, input=done.stdout)
    assert small.ok(*words, input=gzip.compress(done.stdout)) == first
    assert small.cli("run", "--rm", "imported").stdout == b"small\n"
    assert "from tar" in small.ok("history", "imported")
    assert small.ok("system", "check", "--deep") == "all is well"


def test_what_fails_leaves_no_file_and_tells_why(small: Root, tmp_path: Path) -> None:
    file = tmp_path / "saved.tar"
    done = small.cli("save", "-o", str(file), "small", "nothing")
    assert done.returncode == 125 and b"nothing" in done.stderr and list(tmp_path.iterdir()) == []
    done = small.cli("load", input=b"no archive")
    assert done.returncode == 125 and b"the archive" in done.stderr
    done = small.cli("load", "-i", str(tmp_path))
    assert done.returncode == 125 and b"is a directory" in done.stderr
    assert small.cli("load", "-i", str(file)).returncode == 125
    assert list((small.path / "images/tmp").iterdir()) == []


def test_whoever_reads_may_leave_early(small: Root) -> None:
    small.ok("import", "-", "large", input=layer("".join(map(str, range(400_000)))))
    command = small.popen("save", "large", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and command.stderr is not None
    with command:
        assert len(command.stdout.read(4096)) == 4096
        command.stdout.close()
        said = command.stderr.read()
        assert command.wait(30) != 0
    assert b"Traceback" not in said and b"defect" not in said


def test_a_client_that_is_killed_leaves_nothing(small: Root) -> None:
    command = small.popen("load", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdin is not None
    with command:
        command.stdin.write(tar(docker_members([layer()]))[:1000])
        command.stdin.flush()
        command.kill()
    end = time.monotonic() + 10
    while list((small.path / "images/tmp").iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_client_in_python(small: Root, tmp_path: Path) -> None:
    client = Client(small.path)
    client.tag("small", "other")
    client.save(["other"], tmp_path / "saved.tar")
    client.rmi("other")
    (loaded,) = client.load(tmp_path / "saved.tar")
    assert loaded["names"] == ["other:latest", "small:latest"]
    assert client.inspect_image("other")["manifest"] == loaded["manifest"]
    assert client.history("other")[0]["size_bytes"] > 0
    (tmp_path / "tree.tar").write_bytes(layer())
    found = client.import_image(tmp_path / "tree.tar", "tree", changes=["CMD x"], message="words")
    assert found["command"] == ["/bin/sh", "-c", "x"]
    (tmp_path / "bad.tar").write_bytes(b"bad")
    with pytest.raises(InvalidImage):
        client.load(tmp_path / "bad.tar")


def test_listings(small: Root) -> None:
    small.ok("tag", "small", "other:2")
    assert "MANIFEST" in small.ok("images", "--digests")
    assert "other:2, small:latest" in small.ok("image", "tree")
    assert "└─ " in small.ok("image", "tree")
    assert json.loads(small.ok("image", "tree", "--json"))
    assert small.ok("history", "small").splitlines()[0].split() == ["CREATED", "CREATED", "BY", "SIZE", "COMMENT"]
    assert json.loads(small.ok("image", "history", "--json", "small"))
    assert small.cli("tag", "small", "A B").returncode == 125


def test_a_digest_of_several_names_goes_by_force_only(small: Root) -> None:
    digest = next(one["digest"] for one in small.ask("images")["images"] if "small:latest" in one["names"])
    small.ok("tag", "small", "again:1")
    done = small.cli("rmi", digest)
    assert done.returncode == 125 and b"several names: again:1, small:latest" in done.stderr
    small.ok("rmi", "-f", digest[:12])
    assert "again" not in small.ok("images")
