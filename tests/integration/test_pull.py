"""Images to and from a real registry: the same digests there and back, the work done once, and nothing believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.client.sdk import Client
from isolat.errors import ImageNotFound
from isolat.images.flatten.pack import pack
from isolat.images.oci import digest_of
from isolat.images.store import ImageStore
from isolat.linux import mounts
from tests.support import registry
from tests.support.hostile import (
    CONFIG,
    INDEX,
    LAYER,
    MANIFEST,
    Handler,
    archive,
    documents,
    endless,
    make_layout,
    put_manifest,
    serving,
    stall,
)
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

SECRET = "$2y$05$a/OnCCyZk7DhReHmvzekjOEtWkh26r0ISE1LYOpIVacwY.v2/rdxu"  # bcrypt of `secret`


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry.running(tmp_path_factory.mktemp("r") / "registry") as found:
        yield found


def _image(root: Root, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(root.ok("images", "--json"))
    return next(image for image in found if name in image["names"])


def _tree(root: Root, digest: str, at: Path) -> str:
    """The digest of the whole tree of an image, as one archive."""
    at.mkdir()
    mounts.mount_erofs(str(ImageStore(root.path).file(digest)), str(at))
    try:
        return pack(at, _Nowhere())
    finally:
        mounts.umount(str(at))


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def test_there_and_back(fresh_root: Root, address: str, tmp_path: Path) -> None:
    root, name = fresh_root, f"{address}/team/debian:1"
    before = _image(root, "debian:latest")
    told = root.ok("push", "debian", name)
    assert told == f"{name} {before['manifest']}"
    tree = _tree(root, before["digest"], tmp_path / "before")
    root.ok("rmi", before["digest"])
    assert root.ok("images", "-q") == ""
    assert root.ok("pull", "--quiet", name) == before["digest"]
    after = _image(root, name)
    assert (after["digest"], after["manifest"]) == (before["digest"], before["manifest"])
    assert after["repo_digests"] == [f"{address}/team/debian@{before['manifest']}"]
    assert _tree(root, after["digest"], tmp_path / "after") == tree
    assert root.ok("run", "--rm", name, "python3", "-c", "print(6*7)") == "42"
    assert root.ok("run", "--rm", f"{address}/team/debian@{before['manifest']}", "echo", "by digest") == "by digest"
    assert root.ok("system", "check", "--deep") == "all is well"


def test_run_pulls_what_is_missing(fresh_root: Root, address: str) -> None:
    root, name, client = fresh_root, f"{address}/missing", Client(fresh_root.path)
    root.ok("push", "debian", name)
    id = _image(root, "debian:latest")["digest"]
    root.ok("rmi", id)
    refused = root.cli("run", "--rm", "--pull", "never", name, "true")
    assert (refused.returncode, b"there is no image" in refused.stderr) == (125, True)
    with pytest.raises(ImageNotFound):
        client.run(name, ["true"], pull="never")
    told = root.cli("run", "--rm", name, "echo", "here")
    assert (told.returncode, told.stdout) == (0, b"here\n")
    assert b"pulling" in told.stderr
    again = root.cli("run", "--rm", name, "echo", "again")
    assert (again.stdout, again.stderr) == (b"again\n", b"")
    always = root.cli("run", "--rm", "--pull", "always", name, "echo", "asked")
    assert (always.stdout, b"asking" in always.stderr) == (b"asked\n", True)
    root.ok("rmi", id)
    assert client.run(name, ["echo", "here"]).check().text == "here\n"


def test_what_is_neither_here_nor_there_is_said_with_both_reasons(root: Root, address: str) -> None:
    name = f"{address}/nowhere"
    refused = root.cli("run", "--rm", name, "true")
    assert refused.returncode == 125
    for said in (b"there is no image", b"could not be pulled"):
        assert said in refused.stderr
    with pytest.raises(ImageNotFound, match="could not be pulled"):
        Client(root.path).run(name, ["true"])
    assert root.cli("run", "--rm", "oci:nowhere", "true").returncode == 125


def test_others_read_what_was_pushed(root: Root, address: str, tmp_path: Path) -> None:
    name = f"{address}/others"
    root.ok("push", "debian", name)
    digest = _image(root, "debian:latest")["manifest"]
    found = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", f"docker://{name}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == digest
    storage = ["--root", str(tmp_path / "storage"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs"]
    buildah = ["buildah", *storage]
    subprocess.run([*buildah, "pull", "--tls-verify=false", name], capture_output=True, check=True)
    told = subprocess.run([*buildah, "inspect", "--type", "image", name], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["FromImageDigest"] == digest


def test_what_others_pushed_is_read(root: Root, address: str, tmp_path: Path) -> None:
    """skopeo as a writer, of Docker's own manifest type."""
    name = f"{address}/docker"
    layout = make_layout(tmp_path / "layout", [archive({"hello": b"from elsewhere"})])
    command = ["skopeo", "copy", "--format", "v2s2", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{name}"]
    subprocess.run([*command[:2], "--insecure-policy", *command[2:]], capture_output=True, check=True)
    digest = root.ok("pull", "--quiet", name)
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"], capture_output=True, check=True
    ).stdout
    assert json.loads(raw)["config"]["digest"] == f"sha256:{digest}"  # Docker's own id of it, not one of ours
    assert _image(root, f"{name}:latest")["manifest"] == digest_of(raw)
    at = tmp_path / "at"
    at.mkdir()
    mounts.mount_erofs(str(ImageStore(root.path).file(digest)), str(at))
    try:
        assert (at / "hello").read_text() == "from elsewhere"
    finally:
        mounts.umount(str(at))
    root.ok("rmi", name)


def test_of_an_index_the_platforms_own_is_taken(root: Root, address: str, tmp_path: Path) -> None:
    name = f"{address}/several"
    layouts = {
        arch: make_layout(tmp_path / arch, [archive({"arch": arch.encode()})], arch) for arch in ("amd64", "s390x")
    }
    entries = []
    for arch, layout in layouts.items():
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{layout}",
             f"docker://{name}:{arch}"], capture_output=True, check=True,
        )  # fmt: skip
        (found,) = json.loads((layout / "index.json").read_text())["manifests"]
        entries.append(found | {"platform": {"os": "linux", "architecture": arch}})
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
    put_manifest(address, "several", "latest", INDEX, index)
    native = {"x86_64": "amd64"}.get(os.uname().machine)
    if native:
        root.ok("pull", name)
        assert _image(root, f"{name}:latest")["architecture"] == native
    root.ok("pull", "--platform", "linux/s390x", name)
    assert _image(root, f"{name}:latest")["architecture"] == "s390x"
    done = root.cli("run", "--rm", name, "true")
    assert done.returncode == 125 and b"s390x" in done.stderr
    done = root.cli("pull", "--platform", "linux/riscv64", name)
    assert done.returncode == 125 and b"linux/amd64, linux/s390x" in done.stderr
    root.ok("rmi", name)


def test_two_at_once_do_the_work_once(fresh_root: Root, address: str) -> None:
    root, name = fresh_root, f"{address}/once"
    root.ok("push", "debian", name)
    root.ok("rmi", _image(root, "debian:latest")["digest"])
    both = [root.popen("pull", name, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    answers = [one.communicate(timeout=120) for one in both]
    assert {one.returncode for one in both} == {0}
    assert len({out for out, _ in answers}) == 1
    assert len(json.loads(root.ok("images", "--json"))) == 1
    assert list((root.path / "images" / "tmp").iterdir()) == []


def test_credentials_are_the_callers(root: Root, tmp_path: Path) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(f"me:{SECRET}\n")
    more = f"auth: {{htpasswd: {{realm: test, path: {users}}}}}\n"
    with registry.running(tmp_path / "registry", more) as closed:
        env = {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
        done = root.cli("push", "debian", f"{closed}/mine", env=env)
        assert done.returncode == 125 and b"isolat login" in done.stderr
        assert root.cli("login", "-u", "me", "-p", "wrong", closed, env=env).returncode != 0
        done = root.cli("login", "-u", "me", "--password-stdin", closed, input=b"secret", env=env)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "auth.json").stat().st_mode & 0o777 == 0o600
        assert root.cli("push", "debian", f"{closed}/mine", env=env).returncode == 0
        assert root.cli("pull", f"{closed}/mine", env=env).returncode == 0
        assert root.cli("logout", closed, env=env).returncode == 0
        assert root.cli("pull", f"{closed}/mine", env=env).returncode == 125
    root.ok("rmi", f"{closed}/mine")


def test_a_policy_is_honoured(fresh_root: Root, address: str, tmp_path: Path) -> None:
    """Simple signing: only what this key has signed is accepted, and nothing else."""
    root, signed, unsigned = fresh_root, f"{address}/signed", f"{address}/unsigned"
    layout = make_layout(tmp_path / "layout", [archive({"a": b"b"})])
    home, lookaside = tmp_path / "gnupg", tmp_path / "lookaside"
    home.mkdir(mode=0o700)
    lookaside.mkdir()
    env = os.environ | {"GNUPGHOME": str(home)}
    gpg = ["gpg", "--batch", "--pinentry-mode", "loopback", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-gen-key", "tester@example", "default", "default", "0"], env=env, check=True,
                   capture_output=True)  # fmt: skip
    key = root.path / "key.gpg"
    subprocess.run(["gpg", "--output", str(key), "--export", "tester@example"], env=env, check=True)
    where = root.path / "registries.d"
    where.mkdir()
    (where / "all.yaml").write_text(f"default-docker:\n  lookaside: file://{lookaside}\n")
    for name, options in ((signed, ["--sign-by", "tester@example"]), (unsigned, [])):
        subprocess.run(
            ["skopeo", "--insecure-policy", "--registries.d", str(where), "copy", *options, "--dest-tls-verify=false",
             f"oci:{layout}", f"docker://{name}"], env=env, check=True, capture_output=True,
        )  # fmt: skip
    subprocess.run(["gpgconf", "--kill", "all"], env=env, check=False)
    for path in lookaside.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    rule = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)}
    (root.path / "policy.json").write_text(json.dumps({"default": [rule]}))
    done = root.cli("pull", unsigned)
    assert done.returncode == 125 and b"policy" in done.stderr, done.stderr
    done = root.cli("pull", signed)
    assert done.returncode == 0, done.stderr
    (signature,) = (path for path in lookaside.rglob("signature-*"))
    signature.write_bytes(signature.read_bytes()[:-20])
    root.ok("rmi", signed)
    assert root.cli("pull", signed).returncode == 125
    done = root.cli("load", input=root.cli("save", "debian").stdout)
    assert done.returncode == 125 and b"policy" in done.stderr, done.stderr
    (root.path / "policy.json").write_text("{")
    done = root.cli("pull", signed)
    assert done.returncode == 125 and b"can't be read" in done.stderr
    shutil.rmtree(where)  # what a user has put into a state root is kept when everything is reset
    key.unlink()
    (root.path / "policy.json").unlink()


# A registry that is not what it should be


@pytest.mark.parametrize(
    "what", ["other bytes", "too few", "endless", "stalls", "no tar", "negative", "huge", "no JSON"]
)
def test_a_hostile_registry_gets_a_named_error_and_touches_nothing(fresh_root: Root, what: str) -> None:
    root = fresh_root
    layer = b"this is no archive" * 100 if what == "no tar" else archive({"a": b"b" * 5000})
    changes = {"negative": {"size": -1}, "huge": {"size": 1 << 50}}.get(what, {})
    manifest, config = documents(layer, **changes)
    blob: dict[str, Callable[[Handler], None]] = {
        "other bytes": lambda h: h.send(bytes(len(layer))),
        "too few": lambda h: h.send(layer[:-100]),
        "endless": endless,
        "stalls": stall,
    }
    answers: dict[str, Callable[[Handler], None]] = {
        "/manifests/": lambda h: h.send(b"[" if what == "no JSON" else manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(layer): blob.get(what, lambda h: h.send(layer)),
    }
    root.kill_daemon()
    root.start_daemon(ISOLAT_STALL_S="3")
    before = _bytes(root.path / "images")
    with serving(answers) as address:
        done = root.cli("pull", f"{address}/bad")
    assert done.returncode == 125
    assert b"Traceback" not in done.stderr and b"defect" not in done.stderr, done.stderr
    assert b"bad" in done.stderr
    assert _bytes(root.path / "images") < before + (1 << 20)
    assert root.ok("images", "-q").splitlines() == ["debian:latest"]
    assert list((root.path / "images" / "tmp").iterdir()) == []
    assert [path.name for path in (root.path / "images" / "incoming").glob("*") if path.name != "blobs"] == []
    assert root.ok("system", "check") == "all is well"


def test_a_killed_pull_goes_on(fresh_root: Root) -> None:
    """What came whole is not asked for again."""
    root = fresh_root
    first, second = archive({"one": os.urandom(300_000)}), archive({"two": os.urandom(300_000)})
    rootfs = {"type": "layers", "diff_ids": [digest_of(first), digest_of(second)]}
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}).encode()
    layers = [{"mediaType": LAYER, "digest": digest_of(one), "size": len(one)} for one in (first, second)]
    described = {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers}).encode()
    asked: list[str] = []

    def counted(name: str, data: bytes) -> Callable[[Handler], None]:
        def answer(handler: Handler) -> None:
            asked.append(name)
            if name == "second" and asked.count("second") == 1:
                stall(handler)
            else:
                handler.send(data)

        return answer

    answers = {
        "/manifests/": lambda h: h.send(manifest, MANIFEST),
        digest_of(config): lambda h: h.send(config),
        digest_of(first): counted("first", first),
        digest_of(second): counted("second", second),
    }
    with serving(answers) as address:
        pid = root.ensure_daemon()
        pulling = root.popen("pull", f"{address}/two", stderr=subprocess.DEVNULL)
        incoming = root.path / "images/incoming/blobs/sha256" / digest_of(first).removeprefix("sha256:")
        end = time.monotonic() + 30
        while not incoming.exists() or "second" not in asked:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(pid, 9)
        root.daemon_gone(pid)
        assert pulling.wait(30) == 125
        root.start_daemon()
        root.ok("pull", f"{address}/two")
    assert asked.count("first") == 1
    assert root.ok("system", "check", "--deep") == "all is well"


def _bytes(top: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in top.rglob("*"))
