"""KVM or emulation: what this machine really gives, found by booting a guest.

That /dev/kvm opens says little. On a paravirtual KVM it opens, makes machines and even runs a ``hlt``, but no ordinary
kernel ever boots. So KVM counts as working when the guest's own kernel and agent come up and answer, within a
deadline. The verdict holds until this machine boots again, or QEMU or the guest's files are others.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, IsolatError, ProtocolError, Unsupported, UsageError
from isolat.guest.files import GuestFiles
from isolat.qemu import argv, dialogue, features, process
from isolat.qemu.qmp import Qmp
from isolat.wire import kinds as k
from isolat.wire.codec import Decoder, Frame, pack

KINDS = ("auto", "tcg", "kvm")
GUEST_S = 10.0  # a guest under KVM is there in half a second
_MEMORY_MIB = 128
_FORMAT = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KVM = "/dev/kvm"
_HELLO_ID = 1


@dataclass(frozen=True)
class Accel:
    kind: str  # tcg, kvm
    reason: str  # for people: why this one
    qemu: features.Qemu  # the program to use with it


def choose(qemu: features.Qemu, guest: GuestFiles, cache: Path, d: Deadline, asked: str = "auto") -> Accel:
    """How machines run here. ``qemu``: the full program; ``cache``: a JSON file of ours.

    Raises Unsupported when ``kvm`` is asked for and does not work, UsageError for another word than ``KINDS``,
    DeadlineExceeded when ``d`` ends before it is known.
    """
    if asked not in KINDS:
        raise UsageError(f"there is no accelerator {asked!r}", hint=f"it may be {', '.join(KINDS)}")
    if asked == "tcg":
        return Accel("tcg", "emulation was asked for", qemu)
    reason = _closed()
    if not reason:
        program = features.find(d, cache.with_name(f"{cache.stem}-programs.json"), kvm=True)
        works, reason = _verdict(program, guest, cache, d)
        if works:
            return Accel("kvm", reason, program)
    if asked == "kvm":
        raise Unsupported(f"KVM does not work on this machine: {reason}", hint="leave the choice to Isolat, or use tcg")
    return Accel("tcg", reason, qemu)


def _closed() -> str:
    """Why KVM is out of the question; empty where it is worth a try."""
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {_KVM}"
    except OSError as error:
        return f"{_KVM} can't be opened: {error.strerror}"
    return ""


def _verdict(qemu: features.Qemu, guest: GuestFiles, cache: Path, d: Deadline) -> tuple[bool, str]:
    key = f"{_BOOT_ID.read_text().strip()} {qemu.identity} {guest.key}"
    kept = _kept(cache, key)
    if kept is not None:
        return kept
    found = _try(qemu, guest, d)
    features.write(cache, {"format": _FORMAT, "key": key, "works": found[0], "reason": found[1]})
    return found


def _kept(cache: Path, key: str) -> tuple[bool, str] | None:
    try:
        data = json.loads(cache.read_text(encoding="utf-8"))
        if data["format"] == _FORMAT and data["key"] == key:
            return bool(data["works"]), str(data["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _try(qemu: features.Qemu, guest: GuestFiles, d: Deadline) -> tuple[bool, str]:
    """Boot one. Only what the guest did not do in its own time is held against KVM."""
    ram = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(ram, _MEMORY_MIB << 20)
        with process.pair() as (agent, port), process.pair() as (monitor, peer):
            machine = _machine(qemu, guest, argv.Descriptors(port.fileno(), ram, peer.fileno()))
            with process.run(argv.microvm_argv(machine), (port.fileno(), ram, peer.fileno())) as short:
                port.close()
                peer.close()
                try:
                    _greet(agent, monitor, d.sooner(GUEST_S))
                except DeadlineExceeded:
                    d.check("trying KVM")
                    return False, _told(f"a guest under KVM did not come up within {GUEST_S:.0f} s", short.words())
                except (IsolatError, OSError) as error:
                    return False, _told("QEMU ended under KVM", short.words() or str(error))
    finally:
        os.close(ram)
    return True, "a guest came up under KVM"


def _told(what: str, words: str) -> str:
    return f"{what}: {words[-300:]}" if words else what


def _machine(qemu: features.Qemu, guest: GuestFiles, descriptors: argv.Descriptors) -> argv.Machine:
    return argv.Machine(
        binary=qemu.binary,
        accel="kvm",
        cpu=argv.KVM_CPU,
        memory_mib=_MEMORY_MIB,
        vmlinux=str(guest.vmlinux),
        initramfs=str(guest.initramfs),
        sandbox=qemu.sandbox,
        descriptors=descriptors,
    )


def _greet(agent: socket.socket, monitor: socket.socket, d: Deadline) -> None:
    """Let it run and wait for the agent's answer. The question waits in the socket until the agent opens its port."""
    agent.sendall(pack(k.HELLO, _HELLO_ID, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "keeper")]))
    with Qmp.connect(monitor, d) as qmp:
        dialogue.cont(qmp, d)
        decoder = Decoder()
        while not any(_is_greeting(frame) for frame in decoder.feed(_receive(agent, d))):
            pass


def _receive(agent: socket.socket, d: Deadline) -> bytes:
    left = d.left_s()
    d.check("the guest's greeting")
    agent.settimeout(left)
    try:
        data = agent.recv(4096)
    except TimeoutError as error:
        raise DeadlineExceeded("the guest's greeting did not come in time", stage="hello") from error
    if not data:
        raise ProtocolError("the guest's port was closed")
    return data


def _is_greeting(frame: Frame) -> bool:
    return frame.kind == k.OK and frame.id == _HELLO_ID
