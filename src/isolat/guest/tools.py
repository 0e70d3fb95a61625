"""What a guest needs of ours beside its agent: an OCI runtime and the init of containers, in one small EROFS.

It is the machine's third disk (/dev/vdc), mounted at ``AT``, and holds

::

    bin/crun                the runtime that this machine uses, as its distribution built it
    bin/isolat-init         the first process of a container
    lib/                    the shared libraries of crun, flat, with the loader under its own name and as ld.so
    lib/TRIPLET, lib64      links to lib: where a loader looks when nobody tells it anything

crun is dynamically linked, and the guest's root has no libraries. The agent's own root (native/boot.c) has /bin, /lib
and /lib64 as links into ``AT``, so ``CRUN`` starts there as on any machine. Where the root is another one, as in a
whole operating system, ``CRUN_ARGV`` names the loader itself; crun makes a sealed copy of /proc/self/exe and executes
it with the arguments that it had (CVE-2019-5736), which holds for the loader, too.

Without crun here, the image has none: machines work, containers in them do not.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import StoreError, Unsupported
from isolat.linux import child

AT = "/run/isolat/tools"
CRUN = f"{AT}/bin/crun"
INIT = f"{AT}/bin/isolat-init"
CRUN_ARGV = (f"{AT}/lib/ld.so", "--library-path", f"{AT}/lib", CRUN)
_UUID = "00000000-0000-4000-8000-000000000002"
_STAGE = "making the guest's tools"
_MKFS_S = 120.0
_LIBRARY = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$")


def build(out: Path, init: Path, crun: Path | None, d: Deadline = NEVER) -> None:
    """Write ``out``, replacing it atomically; the same bytes for the same programs.

    Raises Unsupported without mkfs.erofs, StoreError when it fails.
    """
    if shutil.which("mkfs.erofs", path=child.SAFE_PATH) is None:
        raise Unsupported(
            "could not find mkfs.erofs, which is required to make the guest's tools", hint="apt-get install erofs-utils"
        )
    with tempfile.TemporaryDirectory(prefix=".tools-", dir=out.parent) as name:
        work = Path(name)
        tree(work / "tree", init, crun)
        child.run(mkfs_argv(work / "image", work / "tree"), _STAGE, d.sooner(_MKFS_S))
        (work / "image").replace(out)


def mkfs_argv(out: Path, source: Path) -> list[str]:
    return [
        *("mkfs.erofs", "--quiet", "-x-1", "-T0", "-U", _UUID, "--all-root", "-E", "noinline_data"),
        *(str(out), str(source)),
    ]


def tree(at: Path, init: Path, crun: Path | None) -> None:
    """The directory that becomes the image."""
    programs, libraries = at / "bin", at / "lib"
    for directory in (at, programs, libraries):
        directory.mkdir(mode=0o755)
        directory.chmod(0o755)
    _copy(init, programs / "isolat-init")
    (at / "lib64").symlink_to("lib")
    if crun is None:
        return
    _copy(crun, programs / "crun")
    found = libraries_of(crun)
    for path in found:
        _copy(path, libraries / path.name)
    for name in sorted({path.parent.name for path in found if path.parent.name.count("-") == 2}):
        (libraries / name).symlink_to(".")
    loader = next((path.name for path in found if path.name.startswith("ld-linux")), "")
    if loader:
        (libraries / "ld.so").symlink_to(loader)


def libraries_of(program: Path) -> list[Path]:
    """The shared libraries and the loader of a dynamically linked program; nothing of a static one."""
    asked = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=False, env=child.clean_environment(), timeout=30
    )
    if "not found" in asked.stdout:
        raise StoreError(f"{program} lacks a library here", stage=_STAGE, details=tuple(asked.stdout.splitlines()))
    return parse_ldd(asked.stdout.splitlines())


def parse_ldd(lines: Iterable[str]) -> list[Path]:
    """``name => /path (0x…)`` and ``/loader (0x…)``; the kernel's own vdso has no path."""
    matches = (_LIBRARY.match(line) for line in lines)
    return [Path(match[1]) for match in matches if match]


def find_crun() -> Path | None:
    found = shutil.which("crun", path=child.SAFE_PATH)
    return Path(found) if found else None


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)
