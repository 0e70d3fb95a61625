"""Which QEMU is there and what it can do, asked of itself: of a version's number nothing can be concluded.

The answer is kept under the binary's identity, because asking costs a start of QEMU (about 50 ms).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import IsolatError, Unsupported
from isolat.linux.facts import find_tools
from isolat.qemu import process
from isolat.qemu.qmp import Qmp, QmpRefused

FULL = "qemu-system-x86_64"
SMALL = "qemu-system-x86_64-microvm"  # Debian's: KVM only, a third of the memory and two thirds of the start time
_PACKAGE = "apt-get install qemu-system-x86"
_FORMAT = 1
_ASK_S = 10.0

_MICROVM = ("virtio-blk-device", "virtio-net-device", "virtio-rng-device", "virtio-serial-device", "virtserialport")
_Q35 = ("VGA", "virtio-blk-pci", "virtio-net-pci", "virtio-rng-pci", "virtio-serial-pci", "virtserialport")
NEEDED = {"microvm": _MICROVM, "q35": _Q35}


@dataclass(frozen=True)
class Qemu:
    """One QEMU program."""

    binary: str  # without symbolic links
    version: str  # 7.2.22
    package: str  # the distribution's words for it
    machines: tuple[str, ...]  # with their aliases
    devices: tuple[str, ...]
    sandbox: bool  # it can confine itself to the system calls that it needs (-sandbox)
    identity: str  # another one whenever the program could be another

    def missing(self, machine: str) -> tuple[str, ...]:
        """What of a machine (``microvm``, ``q35``) this QEMU does not have."""
        lacking = [device for device in NEEDED[machine] if device not in self.devices]
        return (*(() if machine in self.machines else (f"the machine {machine}",)), *lacking)


def find(d: Deadline, cache: Path | None = None, *, kvm: bool = False, path: str | None = None) -> Qemu:
    """The QEMU to use. With ``kvm`` the small one may do, where it can confine itself; Debian 12's can't, so it won't.

    ``cache``: a JSON file of ours. ``path``: where to look instead of PATH. Raises Unsupported where there is none,
    StartFailed or DeadlineExceeded where it can't be asked.
    """
    found = dict(find_tools((SMALL, FULL), path))
    if kvm and SMALL in found:
        small = describe(found[SMALL], d, cache)
        if small.sandbox and not small.missing("microvm"):
            return small
    if FULL not in found:
        raise Unsupported(f"could not find {FULL}, which makes the machines", hint=_PACKAGE)
    return describe(found[FULL], d, cache)


def describe(binary: str, d: Deadline, cache: Path | None = None) -> Qemu:
    """What this program is, from the cache where it was asked before."""
    real = os.path.realpath(binary)
    about = os.stat(real)  # noqa: PTH116 - beside realpath
    file = f"{real} {about.st_size} {about.st_mtime_ns}"
    kept = _kept(cache, file)
    if kept is not None:
        return kept
    qemu = _asked(real, file, d.sooner(_ASK_S))
    if cache is not None:
        _keep(cache, file, qemu)
    return qemu


def _asked(binary: str, file: str, d: Deadline) -> Qemu:
    """Start it without a machine and ask. Accelerators are tried in turn, and either binary has one of these two."""
    with process.pair() as (ours, theirs):
        monitor = (*("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"), *("-mon", "chardev=qmp,mode=control"))
        bare = ("-nodefaults", "-no-user-config", "-display", "none", "-machine", "none")
        with process.run((binary, *bare, "-accel", "tcg", "-accel", "qtest", *monitor), (theirs.fileno(),)) as short:
            theirs.close()
            try:
                with Qmp.connect(ours, d) as qmp:
                    return _described(qmp, binary, file, d)
            except IsolatError as error:
                error.details = (*error.details, short.words())
                raise


def _described(qmp: Qmp, binary: str, file: str, d: Deadline) -> Qemu:
    found = qmp.execute("query-version", {}, d)
    version = ".".join(str(found["qemu"][part]) for part in ("major", "minor", "micro"))
    package = str(found.get("package", ""))
    rows = qmp.execute("query-machines", {}, d)
    names = {str(row[key]) for row in rows for key in ("name", "alias") if key in row}
    types = qmp.execute("qom-list-types", {"implements": "device", "abstract": False}, d)
    devices = {str(row["name"]) for row in types}
    machines, sandbox = tuple(sorted(names)), _has_option(qmp, "sandbox", d)
    return Qemu(binary, version, package, machines, tuple(sorted(devices)), sandbox, f"{version} {package} {file}")


def _has_option(qmp: Qmp, name: str, d: Deadline) -> bool:
    """Whether the command line has it: one that was left out of the build is an unknown name here."""
    try:
        return bool(qmp.execute("query-command-line-options", {"option": name}, d))
    except QmpRefused:
        return False


# the cache: whatever is wrong with it, it is as good as empty


def _read(cache: Path) -> dict[str, Any]:
    try:
        data = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) and data.get("format") == _FORMAT else {}


def _kept(cache: Path | None, file: str) -> Qemu | None:
    row: Any = _read(cache).get("files", {}).get(file) if cache is not None else None
    if not isinstance(row, dict):
        return None
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    try:
        return Qemu(**values)
    except TypeError:
        return None


def _keep(cache: Path, file: str, qemu: Qemu) -> None:
    """Only what is asked for now: a binary that was replaced never comes back. Two are used at most."""
    others = list(_read(cache).get("files", {}).items())[-1:]
    files = {name: row for name, row in others if name != file}
    write(cache, {"format": _FORMAT, "files": {**files, file: asdict(qemu)}})


def write(cache: Path, data: dict[str, Any]) -> None:
    """Whole or not at all; that it could not be kept is no failure."""
    beside = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(data, indent=1), encoding="utf-8")
        beside.replace(cache)
    except OSError:
        beside.unlink(missing_ok=True)
