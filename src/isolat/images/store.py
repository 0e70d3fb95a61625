"""The images of one state root: each one EROFS file, named by what is in it.

::

    STATE_ROOT/images/DIGEST.erofs   the root file system, flattened, uncompressed (read under emulation too)
    STATE_ROOT/images/DIGEST.json    its defaults; written last, so an image is there whole or not at all
    STATE_ROOT/images/blobs          its OCI form as it came (blobs.py): manifest, configuration, layers
    STATE_ROOT/images/names.json     name:tag to digest, replaced by rename
    STATE_ROOT/images/lock           flock: names, blobs, and which build directories belong to somebody alive
    STATE_ROOT/images/tmp/PID-xxxx   one build; its `lock` is held by the builder and by its children
    STATE_ROOT/mounts/DIGEST         the image mounted, once for the whole machine

The digest is that of the OCI configuration, which names every layer by its content: the same content is one image, from
wherever it came. Nothing that was not made here is ever mounted: a crafted EROFS is an attack on the kernel.

A blob comes in under the lock, together with the description that names it, and what no description names is collected
under the same lock: so nothing that is in use, or about to be, is ever collected. Whether an image may go is decided
under it, too, from what is true then: its names, and who stands on it.

The file system and the blobs are on the disk before the description that stands for them (durable.py).

A killed build leaves nothing for long: its lock is free as soon as the last of its processes is gone, and then the
next opening of the store removes its directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import Conflict, ImageNotFound, NotFound, StoreError, Unsupported, UsageError
from isolat.images import durable, intake
from isolat.images.blobs import Blobs, verify_file
from isolat.images.image import Image, ImageConfig, digest_prefix, image_from_json
from isolat.images.oci import DOCUMENT_BYTES_MAX, Manifest, parse_manifest
from isolat.images.progress import Progress, no_progress
from isolat.images.reference import parse_name, parse_reference
from isolat.linux import mounts

_BOOTSTRAP_HINT = (
    "`isolat pull` fetches one and `isolat image bootstrap debian` makes one, both over the network; "
    "`isolat image bootstrap host` needs none"
)
_LOCK_S = 60.0  # nobody has it for longer than some blobs take to be read
_LOCK_POLL_S = 0.02

InUse = Callable[[], Collection[str]]  # the digests that somebody stands on, asked for while nobody can begin to
Names = dict[str, tuple[str, ...]]


class ImageStore:
    """Safe for several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dir = root / "images"
        for directory in (self.root, self.dir):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.mounts_dir = root / "mounts"
        self.blobs = Blobs(self.dir / "blobs")
        self._mounted: dict[str, int] = {}  # digest to device number
        self._thread_lock = threading.Lock()
        for directory in (self._tmp, self.mounts_dir):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.sweep()

    @property
    def _tmp(self) -> Path:
        return self.dir / "tmp"

    def file(self, digest: str) -> Path:
        """The EROFS file, for a machine's disk or for sending elsewhere."""
        return self.dir / f"{digest}.erofs"

    # Names

    def list(self) -> list[Image]:
        """Every image, the youngest first."""
        return sorted(self._all(self._names_by_digest()), key=lambda image: (-image.created_ns, image.digest))

    def _all(self, names: Names) -> tuple[Image, ...]:
        return tuple(self._each(names))

    def _each(self, names: Names) -> Iterator[Image]:
        for path in self.dir.glob("*.json"):
            with contextlib.suppress(NotFound):  # it has just been removed
                if path.stem != "names":
                    yield self._read(path.stem, names)

    def resolve(self, name: str) -> Image:
        """The image of that name or digest. Raises NotFound, and Conflict when a digest's beginning is ambiguous."""
        with contextlib.suppress(UsageError):
            reference = parse_reference(name)
            if reference.digest:
                return self._by_repo_digest(reference.by_digest, reference.digest)
            digest = self._names().get(reference.name)
            if digest is not None:
                return self._read(digest, self._names_by_digest())
        prefix = digest_prefix(name)
        found = sorted(self.dir.glob(f"{prefix}*.json")) if prefix else []
        found = [path for path in found if path.name != "names.json"]
        if len(found) > 1:
            raise Conflict(f"{name} is the beginning of {len(found)} images' digests", hint="give more digits")
        if not found:
            raise ImageNotFound(f"there is no image {name!r}", hint=_BOOTSTRAP_HINT)
        return self._read(found[0].stem, self._names_by_digest())

    def names(self) -> tuple[tuple[str, str], ...]:
        """Every name, with the digest that it means."""
        return tuple(sorted(self._names().items()))

    def unused(self, in_use: Collection[str], named: bool) -> tuple[Image, ...]:
        """The images that nothing stands on: only those without a name, or also those that have one."""
        return tuple(image for image in self.list() if image.digest not in in_use and (named or not image.names))

    def bytes_of(self, image: Image) -> int:
        """What it takes of the disk: its file system, and its blobs, also those that it shares."""
        size = image.size_bytes
        with contextlib.suppress(StoreError, NotFound, Unsupported):
            size += sum(one.size_bytes for one in self.manifest(image).blobs)
        return size

    @property
    def used_bytes(self) -> int:
        """What all images take of the disk."""
        files = sum(path.stat().st_blocks * 512 for path in self.dir.glob("*.erofs"))
        return files + sum(size for _, size in self.blobs.all())

    def _by_repo_digest(self, name: str, digest: str) -> Image:
        """What was pulled as NAME@DIGEST, and still is here."""
        for image in self.list():
            if name in image.repo_digests or image.manifest == digest:
                return image
        raise ImageNotFound(f"there is no image {name!r}", hint=f"isolat pull {name}")

    def tag(self, digest: str, names: Collection[str]) -> None:
        """Let the names mean this image from now on. Raises NotFound where it has gone."""
        full = [parse_name(name) for name in names]
        with self._lock():
            self._read(digest, {})
            self._write_names({**self._names(), **dict.fromkeys(full, digest)})

    def confirm(self, digest: str) -> bool:
        """Whether it is here, and nobody is about to remove it who asked before now who stands on it."""
        with self._lock():
            return (self.dir / f"{digest}.json").exists()

    def remove(self, name: str, in_use: InUse = frozenset) -> None:
        """Remove a name, and with the last name (or when given by digest) the image.

        Raises NotFound, and Conflict while somebody stands on it.
        """
        with self._lock():
            if not self._forget_dangling(name):
                image = self.resolve(name)
                gone = set(image.names) if _is_by_digest(name, image) else {parse_name(name)}
                self._remove(name, image, gone, in_use)

    def remove_nameless(self, digest: str, in_use: InUse = frozenset) -> None:
        """Remove an image that nobody has given a name meanwhile. Raises NotFound, and Conflict for one that has."""
        with self._lock():
            image = self._read(digest, self._names_by_digest())
            if image.names:
                raise Conflict(f"image {digest[:12]} has the name {image.names[0]} now")
            self._remove(digest[:12], image, set(), in_use)

    def _remove(self, name: str, image: Image, gone: Collection[str], in_use: InUse) -> None:
        last = set(gone) >= set(image.names)
        if last and image.digest in in_use():
            raise Conflict(
                f"image {name} is in use",
                hint="`isolat ps -a` and `isolat snapshot ls` show by what; remove that first",
            )
        if gone:
            self._write_names({key: value for key, value in self._names().items() if key not in gone})
        if last:
            self._delete(image.digest)

    def _forget_dangling(self, name: str) -> bool:
        """Whether it was a name of an image that is not there any more; then it is none now."""
        with contextlib.suppress(UsageError):
            names, reference = self._names(), parse_reference(name)
            digest = "" if reference.digest else names.get(reference.name, "")
            if digest and not (self.dir / f"{digest}.json").exists():
                self._write_names({key: value for key, value in names.items() if key != reference.name})
                return True
        return False

    def _delete(self, digest: str) -> None:
        self._unmount(digest)
        (self.dir / f"{digest}.json").unlink(missing_ok=True)
        self.file(digest).unlink(missing_ok=True)
        self._collect()

    def _unmount(self, digest: str) -> None:
        self._mounted.pop(digest, None)
        target = self.mounts_dir / digest
        mounts.umount(str(target), mounts.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()

    def _collect(self) -> int:
        """Remove the blobs that no description names; with the lock. Nothing where one can't be read: it may name any.

        Returns the bytes that this freed.
        """
        try:
            used = {digest for image in self._all({}) for digest in self._blobs_of(image)}
        except (StoreError, NotFound):
            return 0
        return sum(self.blobs.remove(digest) for digest, _ in list(self.blobs.all()) if digest not in used)

    def _blobs_of(self, image: Image) -> set[str]:
        if not image.manifest:
            return set()
        found = parse_manifest(self.blobs.read(image.manifest, DOCUMENT_BYTES_MAX))
        assert isinstance(found, Manifest)  # an index is never taken in
        return {image.manifest, *(one.digest for one in found.blobs)}

    def _names(self) -> dict[str, str]:
        try:
            data = json.loads((self.dir / "names.json").read_text())
            return {str(name): str(digest) for name, digest in data.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:
            raise StoreError(
                f"the table of image names is damaged: {self.dir}/names.json: {error}",
                hint="remove that file: the images stay and can be named by their digests",
            ) from error

    def _names_by_digest(self) -> Names:
        found: Names = {}
        for name, digest in sorted(self._names().items()):
            found[digest] = (*found.get(digest, ()), name)
        return found

    def _write_names(self, names: dict[str, str]) -> None:
        durable.replace(self.dir / "names.json", json.dumps(names, indent=1, sort_keys=True))

    def _read(self, digest: str, names: Names) -> Image:
        try:
            text = (self.dir / f"{digest}.json").read_text()
        except FileNotFoundError:
            raise NotFound(f"image {digest[:12]} has gone", hint=_BOOTSTRAP_HINT) from None
        return image_from_json(text, names.get(digest, ()))

    # Builds

    @contextlib.contextmanager
    def build(self) -> Iterator[Build]:
        """A private directory for one build, removed at its end whatever happens.

        A full disk becomes a StoreError, whatever it was that noticed.
        """
        with self._lock():
            path = self._tmp / f"{os.getpid()}-{secrets.token_hex(8)}"
            path.mkdir(mode=0o711)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield Build(self, path, lock)
        except OSError as error:
            raise _told(error, self.root) from error
        finally:
            _remove_tree(path)
            os.close(lock)

    def add_tree(
        self,
        tree: Path,
        config: ImageConfig,
        names: Collection[str] = (),
        d: Deadline = NEVER,
        progress: Progress = no_progress,
    ) -> Image:
        """Make an image of a directory, which is only read. Raises what ``add_manifest`` does."""
        with self.build() as build:
            progress("packing the file system", 0, 1)
            return build.finish(tree, config, names, d)

    def sweep(self) -> None:
        """Remove the builds whose processes are all gone, and files that never became a part of an image."""
        with self._lock():
            durable.sweep(self.dir)
            durable.make_private(self.dir.glob("*.json"))
            for path in self._tmp.iterdir():
                if _abandoned(path):
                    _remove_tree(path)
            for file in self.dir.glob("*.erofs"):
                if not file.with_suffix(".json").exists():
                    file.unlink(missing_ok=True)
            self.blobs.sweep()
            self._collect()

    def add_manifest(
        self,
        raw: bytes,
        find: Callable[[str], Path],
        names: Collection[str] = (),
        *,
        build: Build,
        d: Deadline = NEVER,
        progress: Progress = no_progress,
        repo_digest: str = "",
        config: ImageConfig | None = None,
    ) -> Image:
        """Make an image of an OCI manifest; ``find`` says where the blob of a digest lies, root's and read-only.

        Every digest is verified. ``config``: the defaults, where they are not just those of the OCI configuration.
        Raises InvalidImage, StoreError.
        """
        prepared = intake.prepare(self, raw, find, build, d, progress)
        with self._lock():
            for digest in prepared.blobs:
                self.blobs.take(find(digest), digest)
            self._keep(prepared, find)
            self.blobs.put(raw)
            self.blobs.sync()
            if prepared.file is not None:
                self._place(prepared.file, prepared.digest)
            self._describe(prepared.digest, config or prepared.config, prepared.manifest, repo_digest)
            self._write_names({**self._names(), **dict.fromkeys(map(parse_name, names), prepared.digest)})
        return self._read(prepared.digest, self._names_by_digest())

    def _place(self, file: Path, digest: str) -> None:
        """Put an image's file system where it is looked for, also in the place of one that a power cut has cut short.

        Environments that stand on the old one keep it until they end.
        """
        file.chmod(0o400)
        os.chown(file, os.geteuid(), os.getegid())
        if self.file(digest).exists():
            self._unmount(digest)
        file.rename(self.file(digest))
        durable.sync([self.dir])

    def _keep(self, prepared: intake.Prepared, find: Callable[[str], Path]) -> None:
        """What was here and has been removed meanwhile comes from elsewhere, or the image does not. Raises Conflict."""
        try:
            for digest in prepared.there:
                if not self.blobs.has(digest):
                    verify_file(find(digest), digest)
                    self.blobs.take(find(digest), digest)
            if prepared.file is None:
                self.file(prepared.digest).stat()
        except (FileNotFoundError, NotFound) as error:
            raise Conflict("what this image stands on was removed meanwhile", hint="try again") from error

    def _describe(self, digest: str, config: ImageConfig, manifest: str, repo_digest: str) -> None:
        """Write the description; of an image that was here, only what is new: its manifest and where it was seen."""
        size_bytes = self.file(digest).stat().st_size
        try:
            old = self._read(digest, {})
        except (NotFound, StoreError):
            old = Image(digest, config, size_bytes, time.time_ns())
        seen = dict.fromkeys([*old.repo_digests, *([repo_digest] if repo_digest else [])])
        new = replace(old, size_bytes=size_bytes, manifest=old.manifest or manifest, repo_digests=tuple(seen))
        if new != old or not (self.dir / f"{digest}.json").exists():
            durable.replace(self.dir / f"{digest}.json", json.dumps(new.description(), indent=1))

    def find(self, digest: str) -> Image | None:
        """The image of this whole digest, if it is here whole."""
        with contextlib.suppress(NotFound, StoreError, FileNotFoundError):
            image = self._read(digest, {})
            if self.file(digest).stat().st_size == image.size_bytes:
                return image
        return None

    def manifest(self, image: Image) -> Manifest:
        """The OCI form of an image. Raises Unsupported for one that has none: it was made by an older version."""
        if not image.manifest:
            raise Unsupported(
                f"the image {image.digest[:12]} has no OCI form: it was made before images had one",
                hint="make it again: isolat image bootstrap",
            )
        found = parse_manifest(self.blobs.read(image.manifest, DOCUMENT_BYTES_MAX))
        assert isinstance(found, Manifest)
        return found

    def copy_from(self, other: ImageStore, image: Image, names: Collection[str]) -> Image:
        """Take in an image of another store of ours, without copying it where the file system can link."""
        with self.build() as build, self._lock():
            for digest in other._blobs_of(image):
                if not self.blobs.has(digest):
                    _link_or_copy(other.blobs.path(digest), self.blobs.path(digest))
                    durable.sync([self.blobs.path(digest)])
            self.blobs.sync()
            if self.find(image.digest) is None:
                _link_or_copy(other.file(image.digest), build.path / "image.erofs")
                durable.sync([build.path / "image.erofs"])
                self._place(build.path / "image.erofs", image.digest)
                durable.replace(self.dir / f"{image.digest}.json", json.dumps(image.description(), indent=1))
            self._write_names({**self._names(), **dict.fromkeys(map(parse_name, names), image.digest)})
        return self._read(image.digest, self._names_by_digest())

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """The one lock of the store: against our own threads first, then against other processes.

        Under it nobody is waited for who may want it. Raises StoreError instead of waiting forever.
        """
        d = Deadline(_LOCK_S)
        if not self._thread_lock.acquire(timeout=_LOCK_S):
            raise self._stuck()
        try:
            descriptor = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while not _locked(descriptor):
                    if d.passed:
                        raise self._stuck()
                    time.sleep(_LOCK_POLL_S)
                yield
            finally:
                os.close(descriptor)
        finally:
            self._thread_lock.release()

    def _stuck(self) -> StoreError:
        return StoreError(
            f"somebody else has had the image store for {_LOCK_S:.0f} s: {self.dir}/lock",
            stage="lock",
            hint="`lslocks` shows which process; a disk that hangs is another reason",
        )

    # Mounts

    def mount(self, digest: str) -> Path:
        """Where the image is mounted, once for the whole machine. Raises StoreError, NotFound."""
        target = self.mounts_dir / digest
        known = self._mounted.get(digest)
        with contextlib.suppress(OSError):
            if known is not None and target.stat().st_dev == known:
                return target
        with self._lock():
            if not self._is_ours(digest):
                self._mount(digest)
            self._mounted[digest] = target.stat().st_dev
        return target

    def _is_ours(self, digest: str) -> bool:
        """Whether exactly our file is mounted there. Raises StoreError when it is something else."""
        target = self.mounts_dir / digest
        entry = mounts.mounted_at(str(target))
        if entry is None:
            return False
        source = mounts.backing_file(entry)
        if entry.fstype != "erofs" or os.path.realpath(source) != os.path.realpath(self.file(digest)):
            raise StoreError(
                f"{target} is occupied: {entry.fstype} from {entry.source} is mounted there",
                stage="mount",
                hint=f"unmount it: umount {target}",
            )
        return True

    def _mount(self, digest: str) -> None:
        file = self.file(digest)
        if not file.exists():
            raise NotFound(f"image {digest[:12]} has gone", hint=_BOOTSTRAP_HINT)
        target = self.mounts_dir / digest
        target.mkdir(mode=0o755, exist_ok=True)
        mounts.mount_erofs(str(file), str(target))

    def unmount_all(self) -> None:
        """Unmount every image of this root. Environments that still use one keep it until they end."""
        with self._lock():
            self._mounted.clear()
            mounts.umount_below(str(self.mounts_dir))
            for directory in self.mounts_dir.iterdir():
                with contextlib.suppress(OSError):
                    directory.rmdir()


class Build:
    """One build: a private directory, and the lock that its children hold with it."""

    def __init__(self, store: ImageStore, path: Path, lock: int) -> None:
        self.store = store
        self.path = path
        self.lock = lock

    def finish(self, tree: Path, config: ImageConfig, names: Collection[str], d: Deadline) -> Image:
        """Take ``tree`` into the store, as the one layer of a new image."""
        from isolat.images import authoring  # which needs this module
        from isolat.images.flatten.pack import pack

        layer = authoring.make_layer(self, lambda out: pack(tree, out, skip=_devices(tree)))
        step = authoring.Step(config.source or f"a tree of the kind {config.kind}")
        return authoring.derive(self.store, self, None, layer, step, names, config=config, d=d)


def _devices(tree: Path) -> list[str]:
    """What is in a tree's /dev, which is empty in every image: the rest of it must not depend on that."""
    dev = tree / "dev"
    return [] if dev.is_symlink() or not dev.is_dir() else [f"dev/{name}" for name in os.listdir(dev)]  # noqa: PTH208


def _told(error: OSError, root: Path) -> Exception:
    """A full disk as an error of ours; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return StoreError(
        f"there is no room left for the image below {root}",
        stage="no-space",
        errno=error.errno,
        hint="free some space: `isolat system df` tells what takes it, `isolat system prune` removes what nobody needs",
    )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _is_by_digest(name: str, image: Image) -> bool:
    prefix = digest_prefix(name)
    return "@" in name or (name not in image.names and prefix != "" and image.digest.startswith(prefix))


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _abandoned(path: Path) -> bool:
    """Whether nobody holds the build's lock any more."""
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove_tree(path: Path) -> None:
    """Remove a build's directory; twice, should a dying child have put a last file into it."""
    for _ in range(3):
        mounts.umount_below(str(path))
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
    raise StoreError(f"could not remove the build directory {path}", stage="sweep", hint="remove it by hand")
