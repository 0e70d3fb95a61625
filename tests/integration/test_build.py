"""``isolat build``: from a Containerfile to an image that runs, the cache, and every way in which it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.client.sdk import Client
from isolat.errors import BuildFailed
from isolat.images.building.storage import Storage
from isolat.images.pool import Pool
from isolat.images.store import ImageStore
from tests.support import builds, registry, traces
from tests.support.builds import build, built
from tests.support.roots import Root

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def builder_root() -> Iterator[Root]:
    with builds.shared_root() as root:
        yield root


@pytest.fixture
def root(builder_root: Root) -> Iterator[Root]:
    """With a daemon, and afterwards without a trace of any build."""
    builder_root.ensure_daemon()
    yield builder_root
    builder_root.ensure_daemon()
    builder_root.remove_all()
    assert builds.left(builder_root) == []


def run(root: Root, image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    return root.ok("run", "--rm", *options, image, *command)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A small program with what must not be sent."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/greeting.txt").write_text("hello from the context\n")
    (tmp_path / "secret.key").write_text("do not send\n")
    (tmp_path / "notes.md").write_text("nor this\n")
    (tmp_path / ".dockerignore").write_text("*.key\nnotes.md\n.dockerignore\n")
    return tmp_path


MULTI_STAGE = """\
ARG RELEASE=base
FROM ${RELEASE} AS compile
ARG WHO=nobody
WORKDIR /src
COPY src/ .
RUN tr a-z A-Z < greeting.txt > /greeting && echo "for $WHO" >> /greeting && chmod 640 /greeting
RUN ["sh", "-c", "id -u > /who-ran"]

FROM ${RELEASE}
LABEL org.example.kind="a test" version=2
ENV GREETING=/opt/app/greeting \\
    PATH=/opt/app/bin:$PATH
RUN useradd --create-home --uid 1234 app
COPY --from=compile --chown=app:app /greeting /opt/app/greeting
COPY --from=0 /who-ran /opt/app/
COPY . /opt/app/context/
WORKDIR /opt/app
USER app
ENTRYPOINT ["cat"]
CMD ["greeting"]
"""


def test_several_stages_become_an_image_that_runs_as_it_says(root: Root, context: Path) -> None:
    found = built(
        root,
        MULTI_STAGE,
        "-t",
        "app:1",
        "-t",
        "app:latest",
        "--build-arg",
        "WHO=you",
        "--label",
        "more=yes",
        context=context,
    )
    assert any("STEP" in line and "USER app" in line for line in found.lines)
    image = next(one for one in json.loads(root.ok("images", "--json")) if one["digest"] == found.digest)
    assert sorted(image["names"]) == ["app:1", "app:latest"]
    assert (image["working_dir"], image["user"], image["kind"]) == ("/opt/app", "app", "oci")
    assert (image["entrypoint"], image["command"]) == (["cat"], ["greeting"])
    assert dict(image["labels"]).items() >= {"org.example.kind": "a test", "version": "2", "more": "yes"}.items()
    assert run(root, "app:1") == "HELLO FROM THE CONTEXT\nfor you"
    assert run(root, "app", "/opt/app/who-ran") == "0"
    seen = run(root, "app", "-c", "id -u; pwd; ls -A context context/src; stat -c %U:%a greeting; echo $GREETING $PATH",
               options=("--entrypoint", "sh"))  # fmt: skip
    words = seen.split()
    assert words[:2] == ["1234", "/opt/app"]
    assert "secret.key" not in words
    assert "notes.md" not in words
    assert "app:640" in words
    assert words[-2] == "/opt/app/greeting"
    assert words[-1].startswith("/opt/app/bin:/usr/local/sbin")


def test_the_second_build_takes_its_steps_from_the_first(root: Root, context: Path) -> None:
    text = f"FROM {builds.SMALL}\nCOPY src /src\nRUN cat /proc/sys/kernel/random/uuid > /when\n"
    first = built(root, text, context=context)
    begun = time.monotonic()
    second = built(root, text, context=context)
    took = time.monotonic() - begun
    assert second.digest == first.digest
    assert sum("Using cache" in line for line in second.lines) == 2
    assert took < 10
    anew = built(root, text, "--no-cache", context=context)
    assert anew.digest != first.digest
    (context / "src/greeting.txt").write_text("changed")
    changed = built(root, text, context=context)
    assert changed.digest not in (first.digest, anew.digest)


def test_what_builds_keep_is_counted_and_goes_with_the_rest(root: Root) -> None:
    built(root, f"FROM {builds.SMALL}\nRUN echo to be counted\n")
    row = next(row for row in root.ask("usage")["usage"] if row["kind"] == "builds")
    assert row["size_bytes"] == row["reclaimable_bytes"] > 0
    assert root.ask("prune", {"kinds": ["builds"]})["bytes"] == row["size_bytes"]
    assert json.loads(root.ok("builder", "prune", "--json"))["bytes"] == 0
    assert next(row for row in root.ask("usage")["usage"] if row["kind"] == "builds")["size_bytes"] == 0


def test_without_a_pool_a_build_works_in_memory_and_keeps_nothing(tmp_path: Path) -> None:
    class NoPool(Pool):
        def ensure(self) -> bool:
            return False

    storage = Storage(tmp_path, NoPool(tmp_path))
    with storage.workplace("x", 1 << 30, 64 << 20) as place:
        assert not place.cached
        assert os.statvfs(place.graph).f_blocks * os.statvfs(place.graph).f_frsize == 48 << 20
        (place.graph / "layer").write_text("x")
        assert not storage.keep(place)
    assert storage.usage_bytes() == 0
    assert traces.mounts(str(tmp_path)) == []
    with storage.workplace("y", 1 << 30, 64 << 20) as place:
        storage.sweep()  # as the next daemon does after this one was killed
        assert not place.graph.exists()


@pytest.mark.soak
def test_a_damaged_cache_is_told_and_does_not_keep_anything_from_being_built(root: Root) -> None:
    built(root, f"FROM {builds.SMALL}\nRUN true\n")
    (root.path / "pool/builder/graph/overlay-layers/layers.json").write_text("{nonsense")
    found = built(root, f"FROM {builds.SMALL}\nRUN echo built anyway\n")
    assert "built anyway" in found.lines
    assert any("cache of builds was damaged" in line for line in found.lines)


def test_layers_of_the_base_are_stored_once(root: Root) -> None:
    store = ImageStore(root.path)
    ours = store.manifest(store.resolve(builds.SMALL)).layers
    text = f"FROM {builds.SMALL}\nRUN echo x > /x\nRUN true\nRUN true # again\n"
    found = built(root, text, SOURCE_DATE_EPOCH="1700000000")  # else the second that they are of tells them apart
    theirs = store.manifest(store.resolve(found.digest)).layers
    assert [one.digest for one in theirs[: len(ours)]] == [one.digest for one in ours]
    assert len(theirs) == len(ours) + 3
    assert len({one.digest for one in theirs}) == len(ours) + 2


def test_a_step_leaves_in_the_image_what_it_made_and_nothing_else(root: Root) -> None:
    found = built(root, f"FROM {builds.SMALL}\nRUN cat /etc/hosts; echo x > /etc/own; ln -s own /etc/link\n")
    store = ImageStore(root.path)
    layer = store.manifest(store.resolve(found.digest)).layers[-1]
    with tarfile.open(store.blobs.path(layer.digest)) as tar:
        assert sorted(tar.getnames()) == ["etc", "etc/link", "etc/own", "run"]  # in which buildah mounts something


def test_with_a_fixed_time_the_same_content_is_the_same_image(root: Root) -> None:
    text = f"FROM {builds.SMALL}\nRUN echo x > /x\n"
    digests = {built(root, text, "--no-cache", SOURCE_DATE_EPOCH="1700000000").digest for _ in range(2)}
    assert len(digests) == 1


def test_only_the_digest_is_printed_when_asked(root: Root) -> None:
    found = built(root, f"FROM {builds.SMALL}\n", "--quiet")
    assert found.lines == []
    assert len(found.digest) == 64


def test_a_target_ends_the_build_at_its_stage(root: Root) -> None:
    text = f"FROM {builds.SMALL} AS one\nRUN echo one > /one\nFROM nowhere:1 AS two\n"
    found = built(root, text, "--target", "one")
    assert run(root, found.digest, "cat", "/one") == "one"


def test_nothing_at_all_is_a_base_too(root: Root, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = built(root, 'FROM scratch\nCOPY file /file\nCMD ["/file"]\n', context=tmp_path)
    assert ImageStore(root.path).resolve(found.digest).command == ("/file",)


# contexts


def archive(**files: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/"))
            entry.size = len(text)
            entry.uid = 4242
            tar.addfile(entry, io.BytesIO(text.encode()))
    return target.getvalue()


def test_an_archive_on_standard_input_is_a_context(root: Root) -> None:
    text = f"FROM {builds.SMALL}\nCOPY file sub/other /\nRUN cat /file /other; stat -c %u /file\n"
    data = archive(Dockerfile=text, file="in the archive\n", sub__other="below\n")
    found = builds.finished(root.cli("build", "-", input=data))
    assert found.code == 0, found.text
    assert {"in the archive", "below", "0"} <= set(found.lines)
    missing = builds.finished(root.cli("build", "--file", "sub/other", "-", input=archive(file=text)))
    assert missing.code == 125
    assert "there is no sub/other in the context" in missing.text


def test_an_archive_that_is_none_is_told(root: Root) -> None:
    found = builds.finished(root.cli("build", "-", input=b"\x1f\x8bnonsense"))
    assert found.code == 125
    assert "unpacking the context failed" in found.text


def test_a_containerfile_elsewhere_builds_a_context_here(root: Root, context: Path, tmp_path: Path) -> None:
    file = tmp_path / "File"
    file.write_text(f"FROM {builds.SMALL}\nCOPY src/greeting.txt /\nRUN cat /greeting.txt\n")
    found = builds.finished(root.cli("build", "-f", str(file), str(context)))
    assert "hello from the context" in found.lines, found.text


def test_files_of_a_caller_who_is_not_root_are_roots_inside(root: Root, tmp_path: Path) -> None:
    """The socket is root's, so what the daemon does for another caller is asked of its sandbox directly."""
    from isolat.deadline import Deadline
    from isolat.images.building.sandbox import Sandbox, Settings, View

    context = tmp_path / "context"
    context.mkdir()
    for name, owner in (("own", 1000), ("others", 1001)):
        (context / name).write_text(name)
        (context / name).chmod(0o600)
        os.chown(context / name, owner, owner)
    fd = os.open(context, os.O_PATH)
    base = 0x7FFF0000
    settings = Settings(
        root=str(root.path / "builder"), uid_base=base, uid_count=65536, join=(), host_network=False, files={},
        views=(View("/usr", "/usr"), View("context", "/context", descriptor=fd, lines=((1000, base, 1),))),
        environment={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    lines: list[str] = []
    with Sandbox(settings, lambda: False) as sandbox:
        sandbox.run(["sh", "-c", "cat /context/own /context/others; stat -c %u /context/own; touch /context/x"],
                    Deadline(20), lines.append)  # fmt: skip
    os.close(fd)
    text = "\n".join(lines)
    assert "own" in text
    assert "others: Permission denied" in text
    assert "0" in lines
    assert "Read-only file system" in text


# failing


def test_a_failing_step_is_told_with_its_number_words_code_and_output(root: Root) -> None:
    found = build(root, f"FROM {builds.SMALL}\nRUN true\nRUN echo this is why; exit 7\n")
    assert found.code == 1
    assert found.digest == ""
    assert "isolat: could not build: step 3 (RUN echo this is why; exit 7) ended with code 7" in found.lines
    assert found.lines.count("this is why") + found.lines.count("  this is why") == 2
    assert any("--network host" in line for line in found.lines)


def test_steps_before_a_failing_one_are_cached(root: Root) -> None:
    text = f"FROM {builds.SMALL}\nRUN echo a long step\nRUN test -e /nowhere\n"
    assert build(root, text).code == 1
    again = build(root, text)
    assert any("Using cache" in line for line in again.lines), again.text


def test_a_base_that_is_not_here_is_told_before_anything_is_made(root: Root) -> None:
    found = build(root, "FROM no/such/image:1\nRUN true\n", "--pull", "never")
    assert found.code == 125
    assert "stands on no/such/image:1, and there is no such image here" in found.text
    assert not any("STEP" in line for line in found.lines)


def test_a_base_that_is_not_here_is_pulled(root: Root, tmp_path: Path) -> None:
    with registry.running(tmp_path / "registry") as address:
        name = f"{address}/bases/small:1"
        text = f"FROM {name}\nRUN echo on what was pulled\n"
        root.ok("push", builds.SMALL, name)
        refused = build(root, text, "--pull", "never")
        assert "no such image here" in refused.text
        assert "on what was pulled" in built(root, text).lines
    root.ok("rmi", name)
    gone = build(root, text)
    assert gone.code == 125
    assert "STEP" not in gone.text


def test_the_image_host_is_no_base(root: Root) -> None:
    root.ok("image", "bootstrap", "host")
    found = build(root, "FROM host\nRUN true\n", "--pull", "never")
    assert found.code == 125
    assert "its /usr is this machine's own" in found.text


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("RUN true\n", (), "has no FROM"),
        ("FROM small\nRNU true\n", (), "Unknown instruction"),
        ("FROM small\nCOPY nothing /\n", (), "no such file"),
        ("FROM small\n", ("--target", "x"), "no stage 'x'"),
        ("FROM small\n", ("-t", "UPPER"), "can't be the name of an image"),
        ("FROM small\n", ("--memory", "lots"), "must be a size"),
        ("FROM small\n", ("--network", "bridge"), "network can't be 'bridge'"),
        ("FROM small\n", ("--platform", "linux/!"), "is no platform"),
        ("FROM small\n", ("--platform", "linux/s390x"), "is for linux/s390x"),
    ],
)
def test_what_can_not_be_built_says_why(root: Root, text: str, options: tuple[str, ...], reason: str) -> None:
    found = build(root, text, *options)
    assert found.code != 0
    assert reason in found.text


def test_the_sdk_builds_and_its_error_has_the_lines(root: Root, context: Path) -> None:
    client = Client(root.path)
    (context / "Containerfile").write_text(f"FROM {builds.SMALL}\nARG A\nRUN echo $A; exit $A\n")
    lines: list[str] = []
    image = client.build(context, names=["sdk"], arguments={"A": "0"}, on_line=lines.append)
    assert image["names"] == ["sdk:latest"]
    assert "0" in lines
    with pytest.raises(BuildFailed, match="ended with code 3") as caught:
        client.build(context, arguments={"A": "3"})
    assert caught.value.details == ("3",)
    assert caught.value.exit_code == 1


# ends


@contextlib.contextmanager
def begun(root: Root, text: str, sign: str) -> Iterator[subprocess.Popen[bytes]]:
    """A build that has come so far that it says the sign."""
    process = root.popen("build", "-", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        process.stdin.write(text.encode())
        process.stdin.close()
        said = []
        for line in process.stderr:
            said.append(line)
            if line.strip() == sign.encode():
                break
        else:
            raise AssertionError(f"the build did not come so far: {b''.join(said).decode()}")
        yield process


def rest(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    return process.stderr.read().decode()


LONG = f"FROM {builds.SMALL}\nRUN echo working; echo x > /x; sleep 6543 & sleep 6543\n"


def sleeping() -> bool:
    """Whether both of its processes are seen."""
    end = time.monotonic() + 10
    while len(sleepers()) != 2 and time.monotonic() < end:
        time.sleep(0.02)
    return len(sleepers()) == 2


def sleepers() -> list[int]:
    return [pid for pid, words in traces.processes("sleep 6543").items() if words.startswith("sleep 6543")]


def test_who_hangs_up_ends_the_build_and_keeps_the_cache(root: Root) -> None:
    cached = f"FROM {builds.SMALL}\nRUN echo before the interruption\n"
    built(root, cached)
    with begun(root, LONG, "working") as process:
        assert sleeping()
        process.kill()
        process.wait(10)
    assert traces.settled(lambda: [*map(str, sleepers()), *builds.left(root)], 10) == []
    assert any("Using cache" in line for line in built(root, cached).lines)


def test_a_base_that_is_removed_while_it_is_built_on_is_no_loss(root: Root) -> None:
    built(root, f"FROM {builds.SMALL}\nRUN echo passing > /passing\n", "--tag", "passing")
    with begun(root, "FROM passing\nRUN echo working; sleep 2; echo x > /x\n", "working") as process:
        root.ok("rmi", "passing")
        text = rest(process)
        assert process.wait(30) == 0, text
    assert root.ok("system", "check", "--deep") == "all is well"


def test_a_killed_daemon_takes_its_builds_with_it_and_the_next_one_sweeps(root: Root) -> None:
    with begun(root, LONG, "working") as process:
        assert sleeping()
        root.kill_daemon()
        assert process.wait(10) == 125
    assert traces.settled(lambda: [str(pid) for pid in sleepers()], 5) == []
    assert traces.processes("isolat/images/building/inside.py") == {}
    root.start_daemon()
    assert builds.left(root) == []
    assert traces.mounts(f"{root.path}/builder") == []
    assert built(root, f"FROM {builds.SMALL}\nRUN echo goes on\n").code == 0


def test_shutting_down_ends_builds_and_tells_so(root: Root) -> None:
    with begun(root, LONG, "working") as process:
        root.ok("system", "shutdown")
        assert "the daemon ends" in rest(process)
        assert process.wait(10) == 125
    root.ensure_daemon()
    assert builds.left(root) == []


def test_builds_at_once_do_not_wait_for_each_other_or_share_a_uid(root: Root) -> None:
    text = f"FROM {builds.SMALL}\nRUN echo working; cat /proc/self/uid_map; sleep 1 # {{}}\n"
    maps = set()
    with contextlib.ExitStack() as stack:
        for process in [stack.enter_context(begun(root, text.format(n), "working")) for n in range(2)]:
            maps |= {line for line in rest(process).splitlines() if line.split()[:1] == ["0"]}
            assert process.wait(60) == 0
    assert len(maps) == 2, maps
