"""The command line of a whole PC: firmware, a chipset with PCI, a screen, and disks that a boot loader can find.

What ``argv`` says of descriptors holds here too. Differences: the disks are there when it starts (a firmware looks for
them), so they are held descriptors from 5 on; the memory is QEMU's own, for a PC is no template's clone; a reboot asked
for inside ends it (``-no-reboot``), as a power-off does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isolat.qemu import argv

FIRST_DISK = 5
_PC_OVERHEAD_MIB = 40  # beyond a microVM's: the screen's memory, PCI, firmware, disks' caches


@dataclass(frozen=True)
class Disk:
    """A raw image behind a held descriptor, open for what ``read_only`` says. The first one is booted from."""

    read_only: bool = False


@dataclass(frozen=True)
class Pc:
    binary: str
    accel: str  # tcg, kvm
    cpu: str
    memory_mib: int
    cpus: int = 1
    tb_size_mib: int = 128  # an ordinary system runs far more different code than a microVM's application
    disks: tuple[Disk, ...] = (Disk(),)
    firmware: str = ""  # empty: SeaBIOS
    sandbox: bool = True
    descriptors: argv.Descriptors = field(default=argv.Descriptors(agent=3, ram=-1, qmp=4))


def pc_argv(pc: Pc) -> tuple[str, ...]:
    """The command line of a PC. It starts stopped and waits for ``cont``."""
    return (
        pc.binary,
        *("-machine", "q35,usb=off,mem-merge=off,dump-guest-core=off"),
        *("-accel", argv.accelerator(pc.accel, pc.cpus, pc.tb_size_mib)),
        *("-cpu", pc.cpu),
        *("-smp", str(pc.cpus)),
        *("-m", f"{pc.memory_mib}M"),
        *(("-bios", pc.firmware) if pc.firmware else ()),
        *argv.common(pc.sandbox, pc.descriptors.qmp),
        *("-boot", "menu=off,strict=on"),
        *("-global", "ICH9-LPC.disable_s3=1"),  # the power button shall end it, not put it to sleep
        *("-global", "ICH9-LPC.disable_s4=1"),
        *argv.agent_port("virtio-serial-pci", pc.descriptors.agent),
        *(word for index, disk in enumerate(pc.disks) for word in _disk(index, disk)),
        *argv.late_network("virtio-net-pci,romfile="),  # nothing is booted from a network
        *("-device", "virtio-rng-pci"),
        *("-device", "VGA,id=screen"),
        "-S",
    )


def memory_overhead_bytes(pc: Pc) -> int:
    """What its control group gets on top of the guest's memory."""
    return argv.overhead_bytes(pc.accel, pc.cpus, pc.memory_mib, pc.tb_size_mib) + (_PC_OVERHEAD_MIB << 20)


def _disk(index: int, disk: Disk) -> tuple[str, ...]:
    """vda, vdb, …: opened through a descriptor set, so that QEMU needs no path."""
    id, read_only = f"vd{chr(ord('a') + index)}", "on" if disk.read_only else "off"
    number = index + 1
    file = f"driver=file,filename=/dev/fdset/{number},locking=off"
    raw = f"driver=raw,node-name=disk-{id},read-only={read_only},discard=unmap,file.read-only={read_only}"
    return (
        *("-add-fd", f"fd={FIRST_DISK + index},set={number}"),
        *("-blockdev", f"{raw},{_below('file', file)},file.discard=unmap"),
        *("-device", f"virtio-blk-pci,id={id},drive=disk-{id},serial={id},bootindex={number}"),
    )


def _below(name: str, options: str) -> str:
    return ",".join(f"{name}.{option}" for option in options.split(","))
