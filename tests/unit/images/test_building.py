"""What is pure of building: buildah's words understood, its command line, the runtime's configuration, the result."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from isolat.errors import InvalidImage, StoreError, Unsupported
from isolat.images.building import bases, interior, output, runtime
from isolat.images.building.group import Group
from isolat.images.building.interior import Options
from isolat.images.building.sandbox import LINE_BYTES, _Lines
from isolat.images.building.steps import Watch, network_hint
from isolat.images.image import Image, ImageConfig
from isolat.images.oci import CONFIG, LAYER_GZIP, Descriptor, Platform, digest_of, dump, write_manifest
from isolat.images.store import ImageStore
from isolat.linux.cgroup import Limits
from isolat.places.base import CgroupFacts, CgroupMode
from tests.support.archives import docker_members, layer, load, tar

# buildah's words


def watched(*lines: str) -> tuple[Watch, list[str]]:
    told: list[str] = []
    watch = Watch(told.append)
    for line in lines:
        watch.line(line)
    return watch, told


def test_a_failing_step_is_named_with_its_code() -> None:
    watch, told = watched(
        "[1/2] STEP 1/2: FROM debian AS a",
        "[1/2] STEP 2/2: RUN make",
        "make: *** [all] Error 2",
        'Error: building at STEP "RUN make": while running runtime: exit status 2',
    )
    assert watch.why() == "could not build: step 2 (RUN make) ended with code 2"
    assert list(watch.tail) == ["make: *** [all] Error 2"]
    assert told == ["[1/2] STEP 1/2: FROM debian AS a", "[1/2] STEP 2/2: RUN make", "make: *** [all] Error 2"]
    assert "--network host" in network_hint(watch, host_network=False)
    assert network_hint(watch, host_network=True) == ""


def test_a_step_that_is_no_run_fails_with_buildahs_reason() -> None:
    watch, _ = watched(
        "STEP 1/2: FROM debian",
        "STEP 2/2: COPY a /b",
        'Error: building at STEP "COPY a /b": checking on sources under "/context": copier: stat: "/a": no such file',
    )
    assert watch.why().startswith('could not build: step 2 (COPY a /b): checking on sources under "/context"')
    assert network_hint(watch, host_network=False) == ""


def test_what_never_began_is_told_without_a_step() -> None:
    watch, _ = watched('time="2026" level=error msg="exit status 125"', "Error: no FROM statement found")
    assert watch.why() == "could not build: no FROM statement found"


def test_go_structures_are_nobodys_business() -> None:
    watch, _ = watched(
        "STEP 1/1: RNU x",
        'Error: building at STEP "RNU x": Unknown instruction: "RNU" &imagebuilder.Step{Env:[]string{}}',
    )
    assert watch.why() == 'could not build: step 1 (RNU x): Unknown instruction: "RNU"'


def test_a_step_that_was_killed_is_not_said_to_have_ended() -> None:
    watch, _ = watched(
        "STEP 1/1: RUN x", "container exited on killed", 'Error: building at STEP "RUN x": exit status 1'
    )
    assert watch.why() == "could not build: step 1 (RUN x) was ended by a signal: killed"


def test_what_an_image_has_no_place_for_is_said_once() -> None:
    words = "SHELL is not supported for OCI image format, [sh] will be ignored"
    line = f'time="x" level=warning msg="{words}. Must use `docker` format"'
    _, told = watched("STEP 1/2: SHELL []", line, "STEP 2/2: RUN x", line)
    assert told == [
        "STEP 1/2: SHELL []",
        f"note: {words}.",
        "STEP 2/2: RUN x",
    ]


def test_a_long_step_is_cut_and_a_full_disk_noticed() -> None:
    watch, _ = watched(f"STEP 1/1: RUN {'x' * 5000}", "cat: write error: Disk quota exceeded")
    assert len(watch.step) < 150
    assert watch.full


def test_a_liar_can_only_lie_about_its_own_step() -> None:
    watch, told = watched("STEP 1/1: RUN sh liar", "STEP 99/99: RUN rm -rf /", "Error: exit status 0")
    assert told[-2:] == ["STEP 99/99: RUN rm -rf /", "Error: exit status 0"]
    assert watch.why().startswith("could not build: ")


def test_lines_are_bounded_and_a_moving_bar_ends_with_what_it_showed_last() -> None:
    found: list[str] = []
    lines = _Lines(found.append)
    lines.feed(b"a\r50 %\r100 %\nx" + b"y" * (3 * LINE_BYTES) + b"\xff\n")
    lines.feed(b"rest")
    lines.end()
    assert found[0] == "100 %"
    assert all(len(line) <= LINE_BYTES for line in found)
    assert found[-1] == "rest"


# its command line and surroundings


def test_every_option_is_one_word_so_no_value_becomes_an_option() -> None:
    options = Options(target="--bad", arguments={"A": "--privileged"}, labels=["--x=y"], timestamp=5, no_cache=True)
    argv = interior.build_argv(options, "/isolat/Containerfile", "/context", {"a@sha256:0": "id"})
    loose = [word for word in argv if not word.startswith("-")]
    assert loose == ["buildah", "build", "/isolat/Containerfile", "/context"]
    assert "--pull-never" in argv
    assert "--target=--bad" in argv
    assert "--timestamp=5" in argv


def test_buildah_may_take_images_from_nowhere_but_what_it_is_given() -> None:
    files = interior.files("x86_64", "/usr/bin/crun", "/usr/bin/python3", "#", "FROM x", {})
    policy = json.loads(files["/etc/containers/policy.json"][0])
    assert policy["default"] == [{"type": "reject"}]
    assert sorted(policy["transports"]) == ["containers-storage", "oci"]
    assert files["/isolat/runtime"][1] == 0o755


def test_without_the_hosts_network_no_proxy_is_told() -> None:
    from isolat.images.building.tools import network_files, proxies

    environment = {"HTTP_PROXY": "http://user:secret@proxy", "HOME": "/root"}
    assert proxies(environment, host_network=False) == {}
    assert proxies(environment, host_network=True) == {"HTTP_PROXY": "http://user:secret@proxy"}
    assert network_files(host_network=False)["/etc/resolv.conf"] == ""


# the runtime's configuration


def test_a_step_gets_what_a_container_gets_whatever_buildah_asked_for() -> None:
    asked: dict[str, Any] = {
        "process": {
            "args": ["sh"],
            "capabilities": {"bounding": ["CAP_SYS_ADMIN"]},
            "apparmorProfile": "x",
            "rlimits": [],
        },
        "linux": {
            "seccomp": None,
            "resources": {},
            "cgroupsPath": "/x",
            "devices": [1],
            "namespaces": [{"type": "pid"}],
        },
        "hooks": {"prestart": [{"path": "/x"}]},
        "root": {"path": "/r"},
    }
    ours = json.loads(interior.files("x86_64", "", "", "", None, {})["/isolat/ours.json"][0])
    found = runtime.harden(asked, ours)
    assert found["process"]["noNewPrivileges"] is True
    assert "CAP_SYS_ADMIN" not in found["process"]["capabilities"]["bounding"]
    assert found["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "/proc/kcore" in found["linux"]["maskedPaths"]
    assert found["linux"]["namespaces"] == [{"type": "pid"}]
    assert found["root"] == {"path": "/r"}
    gone = {"hooks", "apparmorProfile", "rlimits", "resources", "cgroupsPath", "devices"}
    assert not gone & {*found, *found["process"], *found["linux"]}


def test_mount_points_that_an_image_lacks_are_there_for_the_step_only(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hosts").write_text("the image's")
    made = runtime.make_stubs(str(tmp_path), ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"])
    assert made == ["/etc/hostname", "/etc/resolv.conf"]
    (tmp_path / "etc/resolv.conf").write_text("made more of by the step")
    runtime.remove_stubs(str(tmp_path), made)
    assert sorted(path.name for path in (tmp_path / "etc").iterdir()) == ["hosts", "resolv.conf"]


def test_a_mount_point_behind_a_link_is_left_to_the_runtime(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "etc").symlink_to(outside)
    assert runtime.make_stubs(str(root), ["/etc/hosts", "/none/hosts"]) == []
    (outside / "hosts").touch()
    runtime.remove_stubs(str(root), ["/etc/hosts", "/none/hosts"])
    assert (outside / "hosts").exists()
    (outside / "hosts").unlink()
    (root / "etc").unlink()
    (root / "etc").mkdir()
    (root / "etc/hosts").symlink_to(outside / "hosts")
    assert runtime.make_stubs(str(root), ["/etc/hosts"]) == []
    assert list(outside.iterdir()) == []


# its control group


def test_without_a_limit_nothing_is_built(tmp_path: Path) -> None:
    facts = CgroupFacts(CgroupMode.V2, mounts=(("unified", str(tmp_path)),))
    limits = Limits(memory_bytes=1 << 20, memory_swap_bytes=1 << 20, pids=10)
    with pytest.raises(StoreError, match=r"memory\.max: No such file"), Group(facts, "/isolat/x/build-1", limits, ()):
        raise AssertionError("it was made without a limit")
    assert not (tmp_path / "isolat/x/build-1").exists()


def test_on_v2_those_above_give_their_controllers(tmp_path: Path) -> None:
    group = tmp_path / "isolat/x/build-1"
    group.mkdir(parents=True)
    given = [tmp_path / "cgroup.subtree_control", tmp_path / "isolat/x/cgroup.subtree_control"]
    for file in (*given, group / "memory.max", group / "pids.max"):
        file.touch()
    facts = CgroupFacts(CgroupMode.V2, mounts=(("unified", str(tmp_path)),))
    with Group(
        facts, "/isolat/x/build-1", Limits(memory_bytes=1 << 20, memory_swap_bytes=1 << 20, pids=10), ()
    ) as made:
        assert made.join == (str(group / "cgroup.procs"),)
    assert [file.read_text() for file in given] == ["+cpu +memory +pids"] * 2
    assert ((group / "memory.max").read_text(), (group / "pids.max").read_text()) == (str(1 << 20), "10")


# the result


class Layout:
    """An OCI layout as a build leaves it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        self.layer = self.put(b"layer")
        diff = digest_of(b"uncompressed")
        self.config = self.put(
            dump({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [diff]}})
        )
        self.described = Descriptor(LAYER_GZIP, self.layer, 5)
        raw = write_manifest(Descriptor(CONFIG, self.config, 1), [self.described])
        self.index({"manifests": [{"digest": self.put(raw)}]})

    def path(self, digest: str) -> Path:
        return self.directory / "blobs/sha256" / digest.removeprefix("sha256:")

    def put(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.path(digest).write_bytes(data)
        return digest

    def index(self, data: object) -> None:
        (self.directory / "index.json").write_text(json.dumps(data))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "out")


def test_the_result_is_read_and_its_new_layers_are_copied(layout: Layout, tmp_path: Path) -> None:
    raw, config, copied = output.manifest(layout.directory, {}, layout.config)
    assert digest_of(config) == layout.config
    assert [one.digest for one in copied] == [layout.layer]
    output.copy(layout.directory, copied[0], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"layer"
    assert json.loads(raw)["config"]["size"] == len(config)


def test_a_layer_that_the_store_has_is_named_as_it_is_there(layout: Layout) -> None:
    ours = Descriptor(LAYER_GZIP, digest_of(b"ours"), 99)
    raw, _, copied = output.manifest(layout.directory, {digest_of(b"uncompressed"): ours}, layout.config)
    assert copied == []
    assert json.loads(raw)["layers"][0]["digest"] == ours.digest


def test_another_image_than_the_one_that_was_built_is_refused(layout: Layout) -> None:
    with pytest.raises(InvalidImage, match="instead of"):
        output.manifest(layout.directory, {}, digest_of(b"other"))


@pytest.mark.parametrize("name", ["index.json", "blobs", "blobs/sha256"])
def test_a_link_in_the_result_is_not_followed(layout: Layout, tmp_path: Path, name: str) -> None:
    path = layout.directory / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidImage, match="left no image"):
        output.manifest(layout.directory, {}, layout.config)


def test_a_fifo_in_the_result_is_no_file(layout: Layout) -> None:
    layout.path(layout.config).unlink()
    os.mkfifo(layout.path(layout.config))
    with pytest.raises(InvalidImage, match="is no file"):
        output.manifest(layout.directory, {}, layout.config)


@pytest.mark.parametrize(
    "index", [[], {}, {"manifests": []}, {"manifests": [1]}, {"manifests": [{"digest": "../../etc/passwd"}]}, "x"]
)
def test_a_malformed_index_is_refused(layout: Layout, index: object) -> None:
    layout.index(index)
    with pytest.raises(InvalidImage):
        output.manifest(layout.directory, {}, layout.config)


@pytest.mark.parametrize("data", [b"laye", b"layers", b"LAYER"])
def test_a_layer_that_is_something_else_is_refused(layout: Layout, tmp_path: Path, data: bytes) -> None:
    layout.path(layout.layer).write_bytes(data)
    with pytest.raises(InvalidImage, match="something else"):
        output.copy(layout.directory, layout.described, tmp_path / "copy")


def test_layers_that_are_known_seem_to_be_there(tmp_path: Path) -> None:
    bases.empty_layout(tmp_path / "out", [digest_of(b"a")])
    assert (tmp_path / "out/blobs/sha256" / hashlib.sha256(b"a").hexdigest()).stat().st_size == 0


def test_a_base_that_is_removed_while_it_is_built_on_is_no_loss(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    ((image, _),) = load(store, tar(docker_members([layer("one")], ["one:1"])))
    manifest = store.manifest(image)
    with store.build() as build:
        held = bases.Held(store, build.path / "blobs")
        assert list(held.layers().values()) == list(manifest.layers)
        held.hold(image)  # which it is already
        store.remove("one:1")
        assert list(store.blobs.all()) == []
        bases.export(manifest, held, tmp_path / "out")
        assert store.add_manifest(manifest.raw, held.find, ["two"], build=build).digest == image.digest


def test_an_image_without_files_of_its_own_is_no_base(tmp_path: Path) -> None:
    host = Image("0" * 64, ImageConfig("host", binds=(("/usr", "/usr"),)), 0, 0)
    with pytest.raises(Unsupported, match="this machine's own"):
        bases.check(ImageStore(tmp_path), host, "host", Platform("linux", "amd64"))
