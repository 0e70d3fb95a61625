"""The guest's kernel: Debian's cloud kernel, fetched as a package and never installed.

Why that one: every Debian machine can fetch it with its own keys, it is small, and it has EROFS, overlayfs, cgroup 2,
namespaces and virtio. ``apt-get download`` checks the archive's signatures; ``dpkg-deb -x`` unpacks; no script of the
package runs and nothing of this machine changes: where the machine's own lists of packages are missing or out of date,
apt gets private ones.

QEMU starts an uncompressed kernel by the PVH entry point (QEMU's docs, "microvm": an ELF ``vmlinux`` instead of a
bzImage), which spares a machine without hardware virtualization the emulated decompression: so the ELF is taken out
of the bzImage once (Documentation/arch/x86/boot.rst: payload_offset, payload_length).

Its boot was measured under TCG (QEMU 7.2, microvm, one processor, 128 MiB, medians of 4): 1.7 s to the agent's first
answer, 1.4 s with ``KERNEL_ARGUMENTS``. Of no measurable use: lpj, no_timer_check, nowatchdog, random.trust_cpu,
audit=0, lsm=, rcupdate.rcu_expedited, leaving initcalls out, modules without their signatures. (For what runs later
some of them are: qemu/argv.py.)
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import pwd
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import StoreError, Unsupported, UsageError
from isolat.images.progress import Progress, no_progress
from isolat.linux import child

PACKAGE = "linux-image-cloud-amd64"
VMLINUX, MODULES, RELEASE = "vmlinux", "modules", "release"
VMLINUZ = "vmlinuz"  # the bzImage, for a boot loader
# Beside what QEMU's machine asks for (qemu/argv.py). The self-tests of the kernel's ciphers take 0.2 to 0.3 s emulated,
# and a kernel that came through the package's signature need not prove itself at each boot.
KERNEL_ARGUMENTS = ("cryptomgr.notests",)
_DOWNLOAD_S = 1800.0
_UNPACK_S = 300.0
_STAGE = "fetching a kernel"
_OTHER_WAY = "or give a kernel of your own: --kernel FILE"
_PART = re.compile(r"(linux-(?:image|binary|modules)-[a-z0-9.+-]+)(?: \(= ([^)]+)\))?")
_PARTS_MAX = 8
_RELEASE = re.compile(rb"Linux version ([0-9][^ ]{1,64}) ")
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Kernel:
    release: str  # as uname -r says it
    vmlinux: Path  # ELF
    modules: Path | None  # as /lib/modules/RELEASE; None: all that is needed is built in


def fetch(into: Path, package: str = PACKAGE, progress: Progress = no_progress, d: Deadline = NEVER) -> Kernel:
    """Fetch ``package``, and what it depends on for its kernel, and leave ``into``/vmlinux, vmlinuz and modules.

    ``into`` must not exist; after a failure it does not. Its parent gets a temporary directory meanwhile.
    Raises Unsupported where there is no apt, StoreError where nothing can be fetched or it is no kernel.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool, path=child.SAFE_PATH) is None:
            raise Unsupported(f"could not find {tool}, which is required to fetch a kernel", hint=_OTHER_WAY[3:])
    into.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".kernel-", dir=into.parent))
    try:
        _let_apt_write(work)
        debs = _download_all(work, package, progress, d.sooner(_DOWNLOAD_S))
        progress("unpacking the kernel", len(debs), len(debs) + 2)
        tree = _unpack(work, debs, d.sooner(_UNPACK_S))
        progress("decompressing the kernel", len(debs) + 1, len(debs) + 2)
        found = _assemble(tree, work / "kernel", package)
        (work / "kernel").rename(into)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(f"fetched Linux {found}", len(debs) + 2, len(debs) + 2)
    return Kernel(found, into / VMLINUX, into / MODULES)


def fetched(at: Path) -> Kernel | None:
    """What an earlier ``fetch`` left, or nothing."""
    try:
        return Kernel((at / RELEASE).read_text().strip(), at / VMLINUX, at / MODULES)
    except OSError:
        return None


def from_file(path: Path, modules: Path | None = None, into: Path | None = None) -> Kernel:
    """A kernel given by the user: a vmlinux, or a bzImage, whose ELF is then written to ``into``.

    ``modules``: its modules as in /lib/modules/RELEASE; by default what is there under this name or beside it under
    ``modules/RELEASE``, or nothing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"can't read the kernel {path}: {error.strerror}") from error
    release = release_of(data)
    vmlinux = path
    if not data.startswith(_ELF):
        elf = extract(data, str(path))
        if into is None:
            raise UsageError(f"{path} is a compressed kernel, and there is no place for its ELF")
        release = release or release_of(elf)
        vmlinux = into
        into.parent.mkdir(parents=True, exist_ok=True)
        into.write_bytes(elf)
    if not release:
        raise UsageError(f"{path} says nowhere which version of Linux it is", hint="give a vmlinux or a bzImage")
    return Kernel(release, vmlinux, modules or _modules_near(path, release))


def _modules_near(path: Path, release: str) -> Path | None:
    near = (path.parent / "modules" / release, path.parent / "lib" / "modules" / release, Path("/lib/modules", release))
    return next((directory for directory in near if directory.is_dir()), None)


# apt


def _let_apt_write(directory: Path) -> None:
    """apt downloads as the user _apt, where there is one and we may make it the owner; else as ourselves."""
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(directory, pwd.getpwnam("_apt").pw_uid, -1)


def _download_all(work: Path, package: str, progress: Progress, d: Deadline) -> list[Path]:
    """The package and what it depends on for its kernel, each once: a metapackage, image, binary, modules."""
    wanted, debs = [package], list[Path]()
    for count in range(_PARTS_MAX):
        if count == len(wanted):
            break
        name = wanted[count].partition("=")[0]
        progress(f"fetching {name}", count, len(wanted) + 2)
        debs.append(_download(work, wanted[count], d))
        wanted += [part for part in _parts(debs[-1], d) if part not in wanted]
    return debs


def _download(work: Path, package: str, d: Deadline) -> Path:
    before = set(work.glob("*.deb"))
    lists = work / "lists"
    try:
        _apt(work, ["download", package], lists.exists(), d)
    except StoreError as error:
        if lists.exists():
            raise _no_download(error) from error
        for directory in (lists / "partial", work / "cache" / "archives" / "partial"):
            directory.mkdir(parents=True)
        try:
            _apt(work, ["update"], True, d)
            _apt(work, ["download", package], True, d)
        except StoreError as again:
            raise _no_download(again) from again
    found = set(work.glob("*.deb")) - before
    if len(found) != 1:
        raise StoreError(f"apt-get downloaded nothing for {package}", stage=_STAGE)
    return found.pop()


def _no_download(error: StoreError) -> StoreError:
    return StoreError(
        "the guest's kernel could not be fetched (the network is needed once)",
        hint=f"look at the network and at /etc/apt/sources.list, {_OTHER_WAY}",
        stage=_STAGE,
        details=error.details,
    )


def _apt(work: Path, words: Sequence[str], private: bool, d: Deadline) -> None:
    own = ["-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}/cache"] if private else []
    child.run(
        ["env", "--chdir", str(work), "apt-get", "-qq", *own, *words],
        _STAGE,
        d,
        environment={"DEBIAN_FRONTEND": "noninteractive"},
    )


def _parts(deb: Path, d: Deadline) -> list[str]:
    lines: list[str] = []
    child.run(["dpkg-deb", "-f", str(deb), "Depends"], _STAGE, d, on_line=lines.append)
    return parse_parts(" ".join(lines))


def parse_parts(depends: str) -> list[str]:
    """What of a Depends field is a part of a kernel: the first of each choice, as ``name`` or ``name=version``."""
    found = []
    for choice in depends.split(","):
        match = _PART.match(choice.partition("|")[0].strip())
        if match:
            found.append(f"{match[1]}={match[2]}" if match[2] else match[1])
    return found


# the package's content


def _unpack(work: Path, debs: Sequence[Path], d: Deadline) -> Path:
    tree = work / "tree"
    for deb in debs:
        child.run(["dpkg-deb", "-x", str(deb), str(tree)], "unpacking a kernel", d)
    return tree


def _assemble(tree: Path, out: Path, package: str) -> str:
    """``out``/vmlinux and ``out``/modules from an unpacked package; its release."""
    images = sorted((tree / "boot").glob("vmlinu[xz]-*")) or sorted((tree / "usr/lib/modules").glob("*/vmlinuz"))
    directories = [d for base in ("lib/modules", "usr/lib/modules") for d in sorted((tree / base).glob("*"))]
    if len(images) != 1 or not directories:
        raise StoreError(f"the package {package} is no kernel, or more than one", stage=_STAGE)
    out.mkdir()
    (out / VMLINUX).write_bytes(extract(images[0].read_bytes(), package))
    (out / RELEASE).write_text(f"{directories[0].name}\n")
    images[0].rename(out / VMLINUZ)
    directories[0].rename(out / MODULES)
    return directories[0].name


# bzImage


def release_of(image: bytes) -> str:
    """The release that a bzImage's header or a vmlinux's banner tells, or nothing."""
    if image.startswith(_ELF):
        match = _RELEASE.search(image)
        return match[1].decode(errors="replace") if match else ""
    if not is_bzimage(image):
        return ""
    (offset,) = struct.unpack_from("<H", image, 0x20E)  # kernel_version, from 0x200 on
    return image[0x200 + offset : 0x200 + offset + 128].partition(b"\0")[0].partition(b" ")[0].decode(errors="replace")


def is_bzimage(image: bytes) -> bool:
    return len(image) > 0x250 and image[0x202:0x206] == b"HdrS" and struct.unpack_from("<H", image, 0x206)[0] >= 0x208


def extract(image: bytes, name: str) -> bytes:
    """The ELF that a bzImage holds; an ELF is returned as it is. ``name`` is for errors.

    Raises StoreError for what is neither, Unsupported where its compression can't be undone here.
    """
    if image.startswith(_ELF):
        return image
    if not is_bzimage(image):
        raise StoreError(f"{name} is neither a vmlinux nor a bzImage of protocol 2.08 or later", stage=_STAGE)
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    elf = _decompress(image[start : start + length], name)
    if not elf.startswith(_ELF):
        raise StoreError(f"what {name} holds is no ELF: it can't be started by its PVH entry point", stage=_STAGE)
    return elf


def _decompress(payload: bytes, name: str) -> bytes:
    """By its magic number. The last 4 bytes are the decompressed size where the format itself does not hold it."""
    for magic, label, undo in _COMPRESSIONS:
        if payload.startswith(magic):
            try:
                return undo(payload)
            except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise StoreError(f"{name} is damaged: its {label} payload: {error}", stage=_STAGE) from error
    raise Unsupported(f"{name} is compressed in a way that is not known here ({payload[:4].hex()})", hint=_HINT)


_HINT = "give the uncompressed vmlinux"


def _by_command(*argv: str) -> Callable[[bytes], bytes]:
    def undo(payload: bytes) -> bytes:
        if shutil.which(argv[0], path=child.SAFE_PATH) is None:
            raise Unsupported(
                f"could not find {argv[0]}, which is required to decompress the kernel",
                hint=f"apt-get install {argv[0]}",
            )
        done = subprocess.run(
            argv, input=payload[:-4], capture_output=True, check=False, env=child.clean_environment(), timeout=120
        )
        if done.returncode:
            raise ValueError(done.stderr.decode(errors="replace").strip()[-200:])
        return done.stdout

    return undo


def _gunzip(payload: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload)


def _unxz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(payload)


def _bunzip(payload: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload)


_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x02\x21\x4c\x18", "lz4", _by_command("lz4", "-dc")),
    (b"\x28\xb5\x2f\xfd", "zstd", _by_command("zstd", "-dc")),
    (b"\x1f\x8b", "gzip", _gunzip),
    (b"\xfd7zXZ", "xz", _unxz),
    (b"BZh", "bzip2", _bunzip),
)


def read_compressed(path: Path) -> bytes:
    """A module's file, as it is or compressed the way newer Debian does it (.xz), or .gz, .zst."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return _by_command("zstd", "-dc")(data + bytes(4))
    return data
