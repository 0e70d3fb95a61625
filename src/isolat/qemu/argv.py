"""QEMU's command lines, as pure functions of plain data: what a machine is can be read, compared and kept in a test.

Descriptors of QEMU's process: 0 nothing, 1 and 2 the keeper's words (QEMU's own and the guest's serial console), 3 the
agent's port, then what the keeper holds (``Descriptors``). Everything else QEMU gets later over its monitor, as
descriptors too, so it needs no path but its own files, the guest's kernel and /proc/self/fd.

A template, its clones and a machine that is booted for good have the very same devices in the same order: a saved
state names them by their places (virtio-mmio slots), and nothing but ``-kernel`` and its like, ``share``,
``-incoming`` and what is behind the disks differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TEMPLATE_VERSION = 1  # raise it when a saved template of before can't be used any more
PLACEHOLDER_BYTES = 1 << 40  # a guest keeps the capacity that it booted with: larger than any disk put there later
DISKS = (
    ("vda", True), ("vdb", False), ("vdc", True), ("vdd", False),  # device id, read-only
    ("vde", True), ("vdf", True), ("vdg", True), ("vdh", True),  # for what is put in while it runs: layers/hosting.py
)  # fmt: skip
AGENT_PORT = "isolat"
NIC = "nic0"
LIVE_ARGUMENT = "isolat.live"  # the agent then loads the modules that virtiofs needs (native/boot.c)
NIC_MAC = "52:54:00:00:00:01"  # travels in a saved state whatever is said here; the agent sets the real one
TCG_CPU = "Westmere-v1"  # boots a quarter faster than `max`; x86-64-v2, and without the warnings of `Westmere`
KVM_CPU = "host,migratable=on,-svm,-vmx"

_OVERHEAD_MIB = 48  # see overhead_bytes
_SMP_OVERHEAD_MIB = 4
_GUARD = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
_BARE = ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")


@dataclass(frozen=True)
class Descriptors:
    """The numbers that QEMU finds its descriptors at; -1: not there."""

    agent: int = 3
    ram: int = 4
    qmp: int = 5
    live: int = 6  # the first of those to servers of files


@dataclass(frozen=True)
class Machine:
    """One microVM, as QEMU is told of it. Paths are as QEMU sees them, in its jail."""

    binary: str
    accel: str  # tcg, kvm
    cpu: str
    memory_mib: int
    cpus: int = 1
    tb_size_mib: int = 0  # of translated code, TCG only; 0: by the memory. QEMU's own default is up to 1 GiB
    tsc_khz: int = 0  # the host's, measured; 0 (KVM): the guest finds out
    vmlinux: str = ""  # boots only
    initramfs: str = ""
    incoming: bool = False  # wait for a saved state
    share: bool = False  # a template: what it writes to its memory is seen by the memfd's other users
    firmware: str = ""  # empty: QEMU's own for this machine
    kernel_arguments: tuple[str, ...] = ()  # further ones
    live: int = 0  # how many directories are shared with it: only where its memory is
    sandbox: bool = True  # QEMU's own system call filter: only off where ``features.Qemu`` says that it has none
    descriptors: Descriptors = field(default=Descriptors())

    @property
    def code_mib(self) -> int:
        """How much translated code is kept: an eighth of the memory, from 20 to 64 MiB.

        A clone of a template of its image that has started something has 13 MiB of it, with its exercise and an exec
        16, one without an image 18 and 21, and `python3 -c pass` takes as much again. When there is no more room all of
        it goes: an exec then takes 100 ms. With less than it needs at a time, what runs in turns is translated in turns
        (python3: 500 ms instead of 86). With more, 128 MiB of guest cost more than 40 MiB of anonymous memory.
        """
        return self.tb_size_mib or min(64, max(20, self.memory_mib // 8))


def microvm_argv(m: Machine) -> tuple[str, ...]:
    """The command line of a microVM. It starts stopped: a boot waits for ``cont``, a clone for its state."""
    return (
        m.binary,
        *("-machine", _microvm(m)),
        *("-accel", accelerator(m.accel, m.cpus, m.code_mib)),
        *("-cpu", m.cpu),
        *("-smp", str(m.cpus)),
        *("-m", f"{m.memory_mib}M"),
        *("-object", _ram(m)),
        *common(m.sandbox, m.descriptors.qmp),
        *("-global", "migration.send-configuration=off"),  # else a state saved with other capabilities is refused
        *("-global", "migration.store-global-state=off"),  # it was stopped when it was saved, and is to run when loaded
        *agent_port("virtio-serial-device", m.descriptors.agent),
        *(word for id, read_only in DISKS for word in _placeholder(id, read_only)),
        *late_network("virtio-net-device,guest_announce=off"),  # nobody is there whom a restored one could tell
        *("-device", "virtio-rng-device"),
        *(_shared(m) if m.live else ()),
        *(("-incoming", "defer") if m.incoming else _boot(m)),
    )


@dataclass(frozen=True)
class HeldDisk:
    """A raw image behind a descriptor of QEMU's, open for exactly what its device's ``read_only`` says."""

    name: str
    descriptor: int


def with_disks(words: tuple[str, ...], disks: Mapping[str, HeldDisk]) -> tuple[str, ...]:
    """A microVM's command line with disks instead of placeholders, which saves five answers of its monitor for each."""
    for id, read_only in DISKS:
        if id in disks:
            words = _replaced(words, _placeholder(id, read_only), _held(id, disks[id], read_only))
    return words


def kernel_arguments(m: Machine) -> str:
    """The kernel's command line (Documentation/admin-guide/kernel-parameters.txt).

    Under TCG there is nothing to calibrate a clock against: without ``tsc_early_khz`` the boot hangs, and with a
    wrong one the guest's clock runs wrong, for RDTSC is the host's. ``reboot=t``: a triple fault, which
    ``-no-reboot`` turns into QEMU's end. ``mitigations=off`` only under TCG: translated code does not speculate as
    the guest's kernel fears.

    ``tsc=reliable``: the only other clock that this machine has are its ticks. A busy host makes the kernel's watchdog
    distrust the counter and count ticks, and then the clock stands still while the machine is parked (seen in 2 of 6
    clones beside a load of 4).

    ``norandmaps``: QEMU 7.2 finds translated code by its address in the guest. With programs at other addresses each
    time, every start of one is translated anew (2,200 blocks, 1.2 MiB for ``true``): 25 to 30 ms of CPU time instead
    of 8 to 12, and after every eighth the whole buffer is full and thrown away. docs/threats.md has what that costs.

    ``lsm``, ``psi``: without security modules that have no policy in a guest, and without pressure's bookkeeping, a
    start has 1,000 blocks of code less that are translated.

    ``rcu_expedited``: a process that joins a control group waits for an RCU grace period, some ticks of a kernel that
    has nothing else to do: exec took 21 ms, takes 11. What it costs, interrupts of other processors, hardly any has.
    """
    tsc = (f"tsc_early_khz={m.tsc_khz}", "tsc=reliable", "lpj=4000000") if m.tsc_khz else ()
    slow = ("mitigations=off", "norandmaps", "nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1")
    less = ("lsm=landlock,lockdown,yama", "psi=0")
    tcg = (*slow, *less) if m.accel == "tcg" else ()
    always = ("console=ttyS0", "quiet", "panic=-1", "reboot=t", "no_timer_check", "rcupdate.rcu_expedited=1")
    live = (LIVE_ARGUMENT,) if m.live else ()
    return " ".join((*always, *tsc, *tcg, *live, *m.kernel_arguments))


def memory_overhead_bytes(m: Machine) -> int:
    """What a machine's control group gets on top of the guest's memory."""
    return overhead_bytes(m.accel, m.cpus, m.memory_mib, m.code_mib)


def overhead_bytes(accel: str, cpus: int, memory_mib: int, tb_size_mib: int) -> int:
    """The same from what it depends on: translated code at its most, and what QEMU itself needs.

    Measured with 7.2 and ``tb-size=32``, in anonymous memory beside the guest's: restored 18 to 19 MiB, used 24 to
    26 (1 and 4 processors), booted with a kernel of 51 MiB 51 to 54; part of each is translated code, which is counted
    twice here for a margin, because a machine over its limit is killed whole. Page tables take 1/512 of what is mapped.
    """
    code = tb_size_mib if accel == "tcg" else 0
    return (_OVERHEAD_MIB + _SMP_OVERHEAD_MIB * (cpus - 1) + memory_mib // 256 + code) << 20


def template_key(m: Machine, guest_key: str, qemu_identity: str) -> str:
    """What a template may be used for: machines of which everything that its state depends on is the same.

    ``guest_key``: kernel and initramfs by content; ``qemu_identity``: see ``features.Qemu``. Which descriptors and
    paths a process has does not matter.
    """
    bare = replace(m, incoming=True, share=False, vmlinux="", initramfs="", descriptors=Descriptors())
    parts = {
        "version": TEMPLATE_VERSION,
        "argv": microvm_argv(bare),
        "kernel": kernel_arguments(m),
        "guest": guest_key,
        "qemu": qemu_identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# parts


def _microvm(m: Machine) -> str:
    """acpi=on: Debian's cloud kernel knows no virtio-mmio devices of its command line, but of ACPI's tables."""
    options = "acpi=on,isa-serial=on,rtc=on,pit=on,pic=on,pcie=off,usb=off,mem-merge=off,dump-guest-core=off"
    firmware = f",firmware={_escaped(m.firmware)}" if m.firmware else ""
    return f"microvm,{options}{firmware},memory-backend=ram"


def accelerator(kind: str, cpus: int, tb_size_mib: int) -> str:
    if kind != "tcg":
        return kind
    return f"tcg,thread={'multi' if cpus > 1 else 'single'},tb-size={tb_size_mib}"


def _ram(m: Machine) -> str:
    share = "on" if m.share else "off"
    path = f"/proc/self/fd/{m.descriptors.ram}"  # opened anew by QEMU: a sealed memfd can be mapped privately
    return f"memory-backend-file,id=ram,size={m.memory_mib}M,mem-path={path},share={share},merge=off,dump=off"


def common(sandbox: bool, qmp: int) -> tuple[str, ...]:
    """What every QEMU of ours has: nothing by default, its filter, its monitor, the guest's serial console."""
    return (
        *_BARE,
        *(_GUARD if sandbox else ()),
        *("-chardev", f"socket,id=qmp,fd={qmp}"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-serial", "chardev:console"),
    )


def agent_port(controller: str, fd: int) -> tuple[str, ...]:
    return (
        *("-device", f"{controller},id=serial0,max_ports=2"),
        *("-chardev", f"socket,id=agent,fd={fd}"),
        *("-device", f"virtserialport,bus=serial0.0,nr=1,chardev=agent,id=port1,name={AGENT_PORT}"),
    )


def placeholder(device_id: str) -> str:
    """The name of the node that stands for no disk at ``device_id``."""
    return f"no-{device_id}"


def _placeholder(device_id: str, read_only: bool) -> tuple[str, ...]:
    node = placeholder(device_id)
    mode = ",read-only=on" if read_only else ""
    return (
        *("-blockdev", f"driver=null-co,node-name={node},size={PLACEHOLDER_BYTES},read-zeroes=on{mode}"),
        *("-device", f"virtio-blk-device,id={device_id},drive={node},serial={device_id}"),
    )


def _held(device_id: str, disk: HeldDisk, read_only: bool) -> tuple[str, ...]:
    """Opened through a descriptor set, as in ``dialogue.swap_disk``."""
    mode = f"read-only={'on' if read_only else 'off'},discard=unmap"
    file = ("driver=file", f"filename=/dev/fdset/{disk.descriptor}", "locking=off", *mode.split(","))
    below = ",".join(f"file.{option}" for option in file)
    return (
        *("-add-fd", f"fd={disk.descriptor},set={disk.descriptor}"),
        *("-blockdev", f"driver=raw,node-name={disk.name},{mode},{below}"),
        *("-device", f"virtio-blk-device,id={device_id},drive={disk.name},serial={device_id}"),
    )


def _replaced(words: tuple[str, ...], some: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    """With ``others`` where ``some`` are, one after the other. Raises ValueError where they are not."""
    at = next((n for n in range(len(words)) if words[n : n + len(some)] == some), None)
    if at is None:
        raise ValueError(f"{' '.join(some)} is no part of this command line")
    return words[:at] + others + words[at + len(some) :]


def live_tag(n: int) -> str:
    """By which the guest mounts the shared directory of this number."""
    return f"live-{n}"


def _shared(m: Machine) -> tuple[str, ...]:
    """A server of files is at each descriptor's other end (docs/system/devices/vhost-user.rst).

    It knows no devices of before version 1 of virtio, and virtio-mmio makes these unless told otherwise.
    """
    modern = ("-global", "virtio-mmio.force-legacy=off")
    return (*modern, *(word for n in range(m.live) for word in _live(n, m.descriptors.live + n)))


def _live(n: int, descriptor: int) -> tuple[str, ...]:
    tag = live_tag(n)
    return (
        *("-chardev", f"socket,id={tag},fd={descriptor}"),
        *("-device", f"vhost-user-fs-device,chardev={tag},tag={tag}"),
    )


def late_network(card: str) -> tuple[str, ...]:
    """A network card at a hub to which a tap is plugged once the machine is somebody's."""
    return (
        *("-netdev", "hubport,id=hub0,hubid=0"),
        *("-device", f"{card},id={NIC},netdev=hub0,mac={NIC_MAC}"),
    )


def _boot(m: Machine) -> tuple[str, ...]:
    if not m.vmlinux:
        return ("-S",)
    return (
        "-S",
        *("-kernel", m.vmlinux),
        *(("-initrd", m.initramfs) if m.initramfs else ()),
        *("-append", kernel_arguments(m)),
    )


def _escaped(value: str) -> str:
    """A comma ends a QEMU option's value and is doubled to be part of it."""
    return value.replace(",", ",,")
