"""Everything that a machine boots from, kept below one directory of the state root and made when it is missing.

::

    GUEST/kernel/         vmlinux, release, and the modules that are loaded (guest/kernel.py)
    GUEST/initramfs.cpio  the agent and these modules
    GUEST/tools.erofs     crun and the init, for containers in machines
    GUEST/manifest.json   written last: from what the two were made, and the key
    GUEST/lock            flock: one maker at a time

Looking whether all is there costs a few stat(2): an input counts as the same when its size and time of change are.
Made anew from the same content, the bytes are the same, and so is the key.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import StoreError, Unsupported
from isolat.guest import initramfs, modules, tools
from isolat.guest import kernel as kernels
from isolat.images.progress import Progress, no_progress

AGENT, INIT = "isolat-agent", "isolat-init"
BUILDER_VERSION = 2
_KERNEL, _INITRAMFS, _TOOLS, _MANIFEST = "kernel", "initramfs.cpio", "tools.erofs", "manifest.json"
_STAGE = "making the guest's files"
_LOCK_POLL_S = 0.1

Inputs = dict[str, list[str | int]]


@dataclass(frozen=True)
class GuestFiles:
    release: str  # of the kernel
    vmlinux: Path
    initramfs: Path
    tools: Path
    key: str  # sha256 over the contents of the three, in hex
    has_crun: bool  # whether containers can be made inside
    live: bool = False  # whether its kernel can share directories with the host (virtiofs)


def found(directory: Path, native: Path) -> GuestFiles | None:
    """The guest's files as they are, or None where something would have to be made first."""
    try:
        return _load(directory, _inputs(native, None))
    except StoreError:
        return None


def ensure(
    directory: Path,
    native: Path,
    progress: Progress = no_progress,
    *,
    own_kernel: Path | None = None,
    own_modules: Path | None = None,
    d: Deadline = NEVER,
) -> GuestFiles:
    """The guest's files below ``directory``; what is missing or out of date is made.

    ``native``: where isolat-agent and isolat-init are. ``own_kernel``: instead of Debian's (a directory for each).
    Safe against other processes and against being killed at any instruction. Raises what guest/kernel.py and
    guest/tools.py raise, and StoreError where the programs are missing.
    """
    inputs = _inputs(native, own_kernel)
    there = _load(directory, inputs)
    if there is not None:
        return there
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    with _locked(directory, d):
        there = _load(directory, inputs)  # somebody else has made it meanwhile
        if there is None:
            _sweep(directory)
            kernel = _kernel(directory, own_kernel, own_modules, progress, d)
            there = _make(directory, native, kernel, inputs, progress, d)
    return there


def _inputs(native: Path, own_kernel: Path | None) -> Inputs:
    crun = tools.find_crun()
    found: Inputs = {}
    for name, path in (("agent", native / AGENT), ("init", native / INIT), ("crun", crun), ("kernel", own_kernel)):
        if path is None:
            continue
        try:
            stat = path.stat()
        except OSError as error:
            raise StoreError(f"could not find {path}, which a machine needs: {error.strerror}", stage=_STAGE) from error
        found[name] = [str(path), stat.st_size, stat.st_mtime_ns]
    return found


def _load(directory: Path, inputs: Inputs) -> GuestFiles | None:
    """What the manifest says, when it was made from the same and all is still there."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        if manifest["version"] != BUILDER_VERSION or manifest["inputs"] != inputs:
            return None
        files = GuestFiles(
            release=str(manifest["release"]),
            vmlinux=directory / manifest["vmlinux"],
            initramfs=directory / _INITRAMFS,
            tools=directory / _TOOLS,
            key=str(manifest["key"]),
            has_crun="crun" in inputs,
            live=bool(manifest["live"]),
        )
        sizes = {name: path.stat().st_size for name, path in _parts(files).items()}
        return files if sizes == manifest["sizes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parts(files: GuestFiles) -> dict[str, Path]:
    return {"vmlinux": files.vmlinux, "initramfs": files.initramfs, "tools": files.tools}


def _kernel(
    directory: Path, own: Path | None, own_modules: Path | None, progress: Progress, d: Deadline
) -> kernels.Kernel:
    if own is not None:
        return kernels.from_file(own, own_modules, directory / kernels.VMLINUX)
    at = directory / _KERNEL
    found = kernels.fetched(at)
    if found is None:
        found = kernels.fetch(at, progress=progress, d=d)
    elif found.modules is not None and not modules.is_pruned_for_this(found.modules):
        anew = _fetched_again(at, progress, d)
        if anew is None:
            return found
        found = anew
    assert found.modules is not None
    modules.prune(found.modules, [*modules.closure(found), *(modules.live(found) or ())])
    return found


def _fetched_again(at: Path, progress: Progress, d: Deadline) -> kernels.Kernel | None:
    """With the modules that an older Isolat has left out. None without the network: the old one goes on to serve."""
    anew = at.with_name(f"{_KERNEL}.anew")
    shutil.rmtree(anew, ignore_errors=True)
    try:
        kernels.fetch(anew, progress=progress, d=d)
    except (StoreError, Unsupported) as error:
        progress(f"the kernel stays as it is: {error.message}", 0, 0)
        return None
    shutil.rmtree(at)
    anew.rename(at)
    return kernels.fetched(at)


def _make(
    directory: Path, native: Path, kernel: kernels.Kernel, inputs: Inputs, progress: Progress, d: Deadline
) -> GuestFiles:
    (directory / _MANIFEST).unlink(missing_ok=True)
    progress("making the guest's initramfs and tools", 0, 1)
    initramfs.build(kernel, native / AGENT, directory / _INITRAMFS)
    tools.build(directory / _TOOLS, native / INIT, tools.find_crun(), d)
    files = GuestFiles(
        release=kernel.release,
        vmlinux=kernel.vmlinux,
        initramfs=directory / _INITRAMFS,
        tools=directory / _TOOLS,
        key="",
        has_crun="crun" in inputs,
        live=modules.live(kernel) is not None,
    )
    key = _key(_parts(files))
    _write_manifest(directory, files, key, inputs)
    progress(f"the guest's files are ready: Linux {kernel.release}", 1, 1)
    return GuestFiles(**{**vars(files), "key": key})


def _key(parts: Mapping[str, Path]) -> str:
    whole = hashlib.sha256(f"{BUILDER_VERSION}\n".encode())
    for name, path in sorted(parts.items()):
        with path.open("rb") as file:
            whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _write_manifest(directory: Path, files: GuestFiles, key: str, inputs: Inputs) -> None:
    manifest = {
        "version": BUILDER_VERSION,
        "release": files.release,
        "live": files.live,
        "vmlinux": str(files.vmlinux.relative_to(directory)),
        "inputs": inputs,
        "sizes": {name: path.stat().st_size for name, path in _parts(files).items()},
        "key": key,
    }
    beside = directory / f"{_MANIFEST}.tmp"
    beside.write_text(json.dumps(manifest, indent=1))
    beside.replace(directory / _MANIFEST)


def _sweep(directory: Path) -> None:
    """What makers that were killed have left."""
    for pattern in (".kernel-*", ".tools-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(directory: Path, d: Deadline) -> Iterator[None]:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, d)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, d: Deadline) -> None:
    """Wait for another maker; a blocking flock(2) would know no deadline."""
    if d.at_s is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            d.check("waiting for another process that makes the guest's files")
            time.sleep(_LOCK_POLL_S)
