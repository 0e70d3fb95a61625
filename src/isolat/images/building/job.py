"""One build, from its bases to its result, in a sandbox that is there for it alone."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import BuildFailed, NotFound, StoreError, UsageError
from isolat.images.building import bases, containerfile, interior, output, runtime, steps, tools
from isolat.images.building.group import Group
from isolat.images.building.sandbox import Sandbox, Settings, View
from isolat.images.building.storage import DISK_BYTES, Workplace
from isolat.images.image import Image
from isolat.images.oci import Descriptor, Manifest, Platform, own_platform
from isolat.images.progress import Progress
from isolat.images.reference import parse_reference
from isolat.images.store import Build, ImageStore

_STEP_S = 1800.0  # taking a base in, unpacking a context, writing the result
_ID = re.compile(rb"sha256:([0-9a-f]{64})\s*")
_NAMES = ("Containerfile", "Dockerfile")
_LISTING = "{{.ID}} {{.Name}}:{{.Tag}}"
_UID_COUNT = 65536

Pull = Callable[[str, Platform, Progress, Callable[[], bool]], Image]


@dataclass(frozen=True)
class Request:
    """``text``: of the Containerfile; None: it is in the archive, at ``path`` or at one of the usual names.

    ``context``: descriptor of a directory (O_PATH), or -1. ``archive``: descriptor of a tar archive, or -1.
    ``pull``: missing, never or always.
    """

    names: Sequence[str] = ()
    text: str | None = None
    path: str = ""
    context: int = -1
    archive: int = -1
    compression: str = ""
    pull: str = "missing"
    host_network: bool = False
    memory_bytes: int = 0
    disk_bytes: int = DISK_BYTES
    caller_uid: int = 0
    options: interior.Options = field(default_factory=interior.Options)

    @property
    def platform(self) -> Platform:
        return self.options.platform or own_platform()


@dataclass(frozen=True)
class Telling:
    """How a build is told of. ``gone``: nobody listens any more."""

    line: Callable[[str], None]
    progress: Progress
    gone: Callable[[], bool]


@dataclass(frozen=True)
class Found:
    """A base with the image that it is."""

    base: containerfile.Base
    image: Image
    manifest: Manifest


class CacheDamaged(StoreError):
    """What earlier builds left can't be read."""


class Job:
    """``settled``: buildah has ended by itself, so what it leaves may be the cache."""

    def __init__(
        self,
        store: ImageStore,
        request: Request,
        telling: Telling,
        place: Workplace,
        build: Build,
        group: Group,
        machine: str,
        pull: Pull | None,
    ) -> None:
        self._store = store
        self._request = request
        self._telling = telling
        self._place = place
        self._build = build
        self._group = group
        self._machine = machine
        self._pull = pull
        self._held = bases.Held(store, build.path / "blobs")
        self.settled = False

    def run(self, root: Path, uid_base: int, found_tools: tools.Tools) -> Image:
        """Raises BuildFailed, Cancelled, NotFound for a base, StoreError and its kinds."""
        request = self._request
        found = self._resolve(request.text) if request.text is not None else []
        self._make_directories()
        known = self._held.layers()
        bases.empty_layout(self._place.work / "out", tuple(known))
        settings = self._settings(root, uid_base, found_tools)
        with Sandbox(settings, self._telling.gone) as sandbox:
            where = self._containerfile(sandbox)
            if request.text is None:
                found = self._resolve(self._read(sandbox, where))
            self._give(sandbox, found)
            self._run_buildah(sandbox, where, found)
            image = self._id(sandbox)
            self._write_result(sandbox, image)
        return self._take_in(image, known)

    # before

    def _resolve(self, text: str) -> list[Found]:
        request = self._request
        if len(text.encode()) > containerfile.BYTES_MAX:
            raise UsageError(f"the Containerfile has more than {containerfile.BYTES_MAX >> 20} MiB")
        wanted = containerfile.bases(text, request.options.arguments, request.options.target, request.options.platform)
        if containerfile.has_heredoc(text):
            self._telling.line("note: here-documents (<<EOF) need buildah 1.33; older ones take their lines for steps")
        return [self._found(base) for base in wanted]

    def _found(self, base: containerfile.Base) -> Found:
        image = self._image(base.name)
        return Found(base, image, self._held.hold(image))

    def _image(self, name: str) -> Image:
        request = self._request
        image = None
        if request.pull != "always" or self._pull is None:
            with contextlib.suppress(NotFound):
                image = self._store.resolve(name)
        if image is None:
            image = self._pulled(name)
        bases.check(self._store, image, name, request.platform)
        return image

    def _pulled(self, name: str) -> Image:
        if self._pull is None or self._request.pull == "never":
            raise NotFound(
                f"the Containerfile stands on {name}, and there is no such image here",
                hint="`isolat images` lists what is; `isolat image bootstrap debian` makes debian"
                + ("" if self._pull is None else f", and `isolat pull {name}` brings this one"),
            )
        telling = self._telling
        return self._pull(name, self._request.platform, telling.progress, telling.gone)

    def _make_directories(self) -> None:
        for name in interior.WORK_DIRECTORIES:
            (self._place.work / name).mkdir(mode=0o755)
        (self._build.path / "bases").mkdir(mode=0o755)

    def _settings(self, root: Path, uid_base: int, found_tools: tools.Tools) -> Settings:
        request = self._request
        return Settings(
            root=str(root),
            uid_base=uid_base,
            uid_count=_UID_COUNT,
            join=self._group.join,
            host_network=request.host_network,
            views=(
                View("/usr", "/usr"),
                View(str(self._place.graph), interior.STORAGE, write=True, shifted=True),
                View(str(self._place.work), interior.WORK, write=True, shifted=True),
                View(str(self._build.path / "bases"), interior.BASES),
                *self._context_view(uid_base),
            ),
            files=interior.files(
                self._machine,
                found_tools.crun,
                found_tools.python,
                Path(runtime.__file__).read_text(),
                request.text,
                tools.network_files(host_network=request.host_network),
            ),
            environment=interior.environment(tools.proxies(os.environ, host_network=request.host_network)),
            inputs=(request.archive,) if request.archive >= 0 else (),
        )

    def _context_view(self, uid_base: int) -> tuple[View, ...]:
        """Root's files keep their owners' numbers; another caller's are root's inside, and nobody else's are."""
        request = self._request
        if request.context < 0:
            return ()
        if request.caller_uid == 0:
            return (View("the context", interior.CONTEXT, shifted=True, descriptor=request.context),)
        lines = ((request.caller_uid, uid_base, 1),)
        return (View("the context", interior.CONTEXT, descriptor=request.context, lines=lines),)

    # inside

    def _quietly(self, sandbox: Sandbox, argv: Sequence[str], what: str, *, with_input: bool = False) -> None:
        """A program whose output only matters when it fails."""
        lines: list[str] = []
        code = sandbox.run(argv, Deadline(_STEP_S), lines.append, with_input=with_input)
        if code:
            raise StoreError(f"{what} failed", stage=what, details=tuple(lines[-steps.TAIL_LINES :]), hint=self._hint())

    def _containerfile(self, sandbox: Sandbox) -> str:
        """Where it is inside; an archive is unpacked first."""
        request = self._request
        if request.archive >= 0:
            self._telling.progress("unpacking the context", 0, 0)
            argv = interior.unpack_argv(request.compression)
            self._quietly(sandbox, argv, "unpacking the context", with_input=True)
        if request.text is not None:
            return f"{interior.OURS}/Containerfile"
        for name in (request.path,) if request.path else _NAMES:
            path = f"{interior.UNPACKED}/{name}"
            if sandbox.run(["test", "-f", path], Deadline(_STEP_S), lambda _: None) == 0:
                return path
        wanted = request.path or " or ".join(_NAMES)
        raise UsageError(f"there is no {wanted} in the context", hint="name it with --file")

    def _read(self, sandbox: Sandbox, path: str) -> str:
        argv = ["head", "-c", str(containerfile.BYTES_MAX + 1), "--", path]
        return sandbox.read(argv, Deadline(_STEP_S), lambda _: None)[1].decode(errors="replace")

    def _give(self, sandbox: Sandbox, found: Sequence[Found]) -> None:
        """Let buildah have the bases, under the names that the Containerfile calls them by."""
        there = self._listed(sandbox)
        for image, manifest in {one.image.digest: (one.image, one.manifest) for one in found}.values():
            if image.digest not in {id for id, _ in there}:
                self._telling.progress(
                    f"unpacking the base image {image.names[0] if image.names else image.digest}", 0, 0
                )
                bases.export(manifest, self._held, self._build.path / "bases" / image.digest)
                argv = ["buildah", "pull", f"oci:{interior.BASES}/{image.digest}:{bases.TAG}"]
                self._quietly(sandbox, argv, "giving buildah a base image")
            names = [name for name in _tags(found, image) if (image.digest, name) not in there]
            if names:
                self._quietly(sandbox, ["buildah", "tag", image.digest, *names], "naming a base image")

    def _listed(self, sandbox: Sandbox) -> set[tuple[str, str]]:
        """Id and name of the images in buildah's storage."""
        if not self._place.cached:
            return set()
        argv = ["buildah", "images", "--all", "--no-trunc", f"--format={_LISTING}"]
        code, text = sandbox.read(argv, Deadline(_STEP_S), lambda _: None)
        if code:
            raise CacheDamaged("the cache of builds can't be read", hint="isolat builder prune removes it")
        found = set()
        for line in text.decode(errors="replace").splitlines():
            id, _, name = line.strip().partition(" ")
            found.add((id.removeprefix("sha256:"), name.strip()))
        return found

    def _run_buildah(self, sandbox: Sandbox, where: str, found: Sequence[Found]) -> None:
        request = self._request
        context = interior.CONTEXT if request.context >= 0 else interior.UNPACKED
        argv = interior.build_argv(request.options, where, context, _contexts(found))
        watch = steps.Watch(self._telling.line)
        try:
            code = sandbox.run(argv, NEVER, watch.line)
        except StoreError as error:
            raise BuildFailed(watch.why(), details=tuple(watch.tail), hint=self._hint() or error.hint) from error
        if code > 0:
            with contextlib.suppress(StoreError):  # containers that a failed build leaves are no cache
                sandbox.run(["buildah", "rm", "--all"], Deadline(_STEP_S), lambda _: None)
                self.settled = not watch.full
        if code:
            raise BuildFailed(watch.why(), stage="build", details=tuple(watch.tail), hint=self._hint(watch))

    def _hint(self, watch: steps.Watch | None = None) -> str:
        """The limit that was met, if one was."""
        if self._group.out_of_memory():
            return f"it met its memory limit of {self._request.memory_bytes >> 20} MiB: --memory gives it more"
        if watch is not None and watch.full:
            return f"it may write {self._place.bounded_by}: --disk and --memory give it more"
        if self._group.out_of_processes():
            return "it met its limit of processes"
        return steps.network_hint(watch, host_network=self._request.host_network) if watch is not None else ""

    def _id(self, sandbox: Sandbox) -> str:
        code, text = sandbox.read(["head", "-c", "100", "--", interior.ID_FILE], Deadline(_STEP_S), lambda _: None)
        found = _ID.fullmatch(text)
        if code or found is None:
            raise StoreError("buildah did not say what it built", stage="build")
        return found[1].decode()

    def _write_result(self, sandbox: Sandbox, image: str) -> None:
        self._telling.progress("writing the image", 0, 0)
        argv = ["buildah", "push", image, f"oci:{interior.RESULT}:image"]
        self._quietly(sandbox, argv, "writing the image")
        self.settled = True

    # after

    def _take_in(self, image: str, known: Mapping[str, Descriptor]) -> Image:
        layout = self._place.work / "out"
        raw, raw_config, copied = output.manifest(layout, known, f"sha256:{image}")
        # What is held already has been verified, and is the store's own: it must not be written to
        if not self._held.path(f"sha256:{image}").exists():
            self._held.path(f"sha256:{image}").write_bytes(raw_config)
        for layer in copied:
            if not self._held.path(layer.digest).exists():
                output.copy(layout, layer, self._held.path(layer.digest))
        return self._store.add_manifest(
            raw, self._held.find, self._request.names, build=self._build, progress=self._telling.progress
        )


def _tags(found: Sequence[Found], image: Image) -> list[str]:
    """The full references that mean this image; one with a digest can't be given."""
    names = []
    for one in found:
        reference = parse_reference(one.base.name)
        if one.image.digest == image.digest and not reference.digest:
            names.append(f"{reference.registry}/{reference.path}:{reference.tag}")
    return list(dict.fromkeys(names))


def _contexts(found: Sequence[Found]) -> dict[str, str]:
    """What buildah must be told apart: names with a digest, which no tag can have."""
    contexts: dict[str, str] = {}
    for one in found:
        if parse_reference(one.base.name).digest:
            contexts |= {one.base.written: one.image.digest, one.base.name: one.image.digest}
    return contexts
