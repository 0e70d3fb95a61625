"""Which of a kernel's modules the guest loads, and in which order.

A package's modules.dep is written by depmod when the package is installed, which never happens here; so dependencies
are read where depmod reads them: in each module's own ``.modinfo`` section (``depends=``, ``softdep=pre: …``). What
is in none of the files and in modules.builtin is built into the kernel.

The order is that of need: a module comes after everything it depends on, so the agent only has to load them one after
the other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from isolat.errors import Unsupported
from isolat.guest.kernel import Kernel, read_compressed

REQUIRED = ("virtio_mmio", "virtio_console", "virtio_blk", "virtio_rng", "virtio_net", "erofs", "overlay", "ext4")
WANTED = ("virtio_pci",)  # on a machine with a PCI bus; and what only some kernels have as modules
LIVE = ("virtiofs",)  # loaded by machines that share directories with the host, and by no others
_KEPT = "kept"  # for which modules a directory was pruned
_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")
_SOFT = {"crc32c": ("crc32c_generic",)}  # a softdep may name an algorithm (crypto_alloc_shash) and not a module
_LOADS_WITHOUT = {"ext4": ("crc32c",), "libcrc32c": ("crc32c",)}  # asked for at run time; not every kernel says so


def closure(kernel: Kernel, required: Sequence[str] = REQUIRED, wanted: Sequence[str] = WANTED) -> list[Path]:
    """The files of these modules and of all they need, in load order; what is built in is left out.

    Raises Unsupported, with their names, for ``required`` ones that the kernel does not have.
    """
    if kernel.modules is None:
        return []
    files = _files(kernel.modules)
    builtin = _builtin(kernel.modules)
    missing = [name for name in required if name not in files and name not in builtin] if builtin else []
    if missing:
        raise Unsupported(
            f"the kernel {kernel.release} has no {', '.join(missing)}, which a machine requires",
            hint="give a kernel that has virtio, EROFS, overlayfs and ext4, built in or as modules",
        )
    order: dict[str, Path] = {}
    for name in (*required, *wanted):
        _visit(name, files, order, ())
    return list(order.values())


def live(kernel: Kernel) -> list[Path] | None:
    """What ``LIVE`` needs beside the others, in load order; None where this kernel lacks it.

    Of a kernel without modules nothing is known: it is taken to have everything.
    """
    if kernel.modules is None:
        return []
    there = {*_files(kernel.modules), *_builtin(kernel.modules)}
    if any(name not in there for name in LIVE):
        return None
    always = set(closure(kernel))
    return [path for path in closure(kernel, LIVE, ()) if path not in always]


def _visit(name: str, files: dict[str, Path], order: dict[str, Path], above: tuple[str, ...]) -> None:
    """Depth first; a cycle, which only soft dependencies can make, is cut where it closes."""
    if name in order or name in above or name not in files:
        return
    for need in needs(module_info(read_compressed(files[name])), name):
        _visit(need, files, order, (*above, name))
    order[name] = files[name]


def needs(info: Iterable[tuple[str, str]], name: str) -> list[str]:
    """What has to be loaded before: ``depends`` and ``softdep: pre``, names normalised."""
    found: list[str] = []
    for key, value in info:
        if key == "depends":
            found += [normal(part) for part in value.split(",") if part]
        elif key == "softdep":
            found += _soft_names(value)
    for algorithm in _LOADS_WITHOUT.get(name, ()):
        found += _SOFT[algorithm]
    return list(dict.fromkeys(found))


def _soft_names(value: str) -> list[str]:
    found: list[str] = []
    before = False
    for word in value.split():
        if word.endswith(":"):
            before = word == "pre:"
        elif before:
            found += _SOFT.get(word, (normal(word),))
    return found


def module_info(elf: bytes) -> list[tuple[str, str]]:
    """The ``key=value`` strings of a 64-bit module's .modinfo section. Raises ValueError where it is no module."""
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
        sections = [struct.unpack_from("<II4QIIQQ", elf, table + i * size) for i in range(count)]
        names = sections[names_at][4]
        for section in sections:
            start = names + section[0]
            if elf[start : start + 9] == b".modinfo\0":
                return _pairs(elf[section[4] : section[4] + section[5]])
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError("this is no kernel module") from error
    raise ValueError("this module has no .modinfo")


def _pairs(text: bytes) -> list[tuple[str, str]]:
    entries = (entry.decode("utf-8", "replace").partition("=") for entry in text.split(b"\0") if entry)
    return [(key, value) for key, _, value in entries]


def file_name(path: Path) -> str:
    """What a module is called in the initramfs: always uncompressed."""
    return f"{_module_name(path)}.ko"


def normal(name: str) -> str:
    return name.replace("-", "_")


def prune(modules: Path, keep: Iterable[Path]) -> None:
    """Remove every module but these; what remains is still a directory to take a closure of."""
    kept = set(keep)
    (modules / _KEPT).write_text(_purpose())
    for path in modules.rglob("*.ko*"):
        if path not in kept:
            path.unlink()
    for path in sorted((p for p in modules.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def is_pruned_for_this(modules: Path) -> bool:
    """Whether what would be kept today can still be there."""
    try:
        return (modules / _KEPT).read_text() == _purpose()
    except OSError:
        return False


def _purpose() -> str:
    return "".join(f"{name}\n" for name in (*REQUIRED, *WANTED, *LIVE))


def _files(modules: Path) -> dict[str, Path]:
    return {_module_name(path): path for path in sorted(modules.rglob("*.ko*")) if path.name.endswith(_SUFFIXES)}


def _module_name(path: Path) -> str:
    return normal(path.name.partition(".ko")[0])


def _builtin(modules: Path) -> set[str]:
    try:
        lines = (modules / "modules.builtin").read_text().split()
    except OSError:
        return set()
    return {_module_name(Path(line)) for line in lines}
