"""The whole PC: firmware, boot loader, the distribution's kernel and its systemd, on emulated hardware.

Nothing in it knows that it is a guest but one service, the agent (images/units.py), which starts what is asked for. Its
disk is a copy of one that was made once from the image (images/disks.py) and goes with the environment; its memory is
its own, so it shares nothing with any other machine. It is always booted, never cloned.

Around QEMU everything is as it is around a microVM's: no privileges, namespaces and a uid of its own, open descriptors
instead of paths.

When the application ends the machine is killed: nobody will see its disk again, and switching it off takes longer than
many applications run. ``stop`` does switch it off, as somebody at a PC would: the application first, then the system.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace
from typing import ClassVar

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, InternalError, IsolatError, Unsupported
from isolat.images import disk
from isolat.layers import common, files, machines
from isolat.layers.base import (
    GUEST,
    Boundary,
    Capabilities,
    Descriptor,
    Frame,
    Job,
    Layer,
    MachineKit,
    Plan,
    Probe,
    Source,
    ask_to_end,
)
from isolat.places.base import CgroupFacts, CgroupMode, Command, Exit, Facts, Io, Needs, Place, Proc
from isolat.places.steps import PutFile, Step
from isolat.qemu import argv, dialogue, machine, pc
from isolat.trace import mark

MEMORY_MIN_BYTES = 128 << 20
DISK_MIN_BYTES = 512 << 20  # the kernel with all its modules is 0.1 GiB of it
OFF_MOST_S = 25.0  # switching off takes 2 to 5 s under emulation; less than what the engine's own settling waits
KILL_S = 1.0
GRACE_S = 60.0  # for the keeper: longer than any stop takes from the application's end on
OFF = ("systemctl", "poweroff", "--no-block", "--no-wall")


class VmLayer(Layer):
    name: ClassVar[str] = "vm"
    capabilities: ClassVar[Capabilities] = Capabilities(
        boundary=Boundary.KERNEL,
        enter=True,
        limits=frozenset({"memory", "cpus", "disk"}),
        networks=frozenset({"none"}),
        users=True,
        hostname=True,
        own_uids=True,
        machine=True,
        boots=True,
        screen=True,
        copies=True,
    )

    def probe(self, place: Place, d: Deadline) -> Probe:
        found = machines.probe(place)
        try:
            disk.check_tools()
        except Unsupported as error:
            return found if not found.ready else Probe(False, error.message, error.hint)
        return found

    def plan(self, job: Job, probe: Probe) -> Plan:
        common.check(job, self.name, self.capabilities)
        common.check_options(self.name, job.spec.option(self.name), ())
        _refuse(job)
        kit = machines.kit_of(job, self.name)
        asked = _pc(job, kit)
        host = common.hostname(job)
        guest = machines.guest(job, kit, pc.pc_argv(asked), (f"{machine.MONITOR}-peer", "disk"))
        return Plan(
            steps=machines.outside(job, pc.memory_overhead_bytes(asked)),
            guest=replace(guest, grace_s=GRACE_S),
            main=common.main(job, host),
            needs=Needs(job.spec.memory_bytes, job.spec.cpus, job.spec.disk_bytes, machines.digests(job)),
            descriptors=(Descriptor(machine.MONITOR, Source.PAIR), _disk(job)),
            inside=_names(host),
            options=(("host", host),),
        )

    def start(self, frame: Frame, place: Place, io: Io, d: Deadline) -> Proc | None:
        if frame.guest is None or frame.main is None:
            raise InternalError("a PC has no command")
        machine.boot(place, frame.guest, {}, d)
        inside = place.inside(GUEST, place.facts)
        inside.resume(machines.identity(frame), d)
        inside.carry_out(frame.inside, d)
        mark("machine-prepared")
        return place.spawn(frame.main_key, frame.main, replace(io, main=True), d)

    def stop(self, frame: Frame, place: Place, grace_s: float, d: Deadline) -> Exit:
        """Ask the application, wait ``grace_s``, switch the machine off; what does not end is killed.

        The machine has what the application has left of ``d``. ``forced`` where either had to be killed.
        """
        try:
            ended = ask_to_end(frame, place, d.sooner(grace_s))
        except DeadlineExceeded:
            place.signal(GUEST, signal.SIGKILL, d)
            return replace(place.wait(frame.main_key, d), forced=True)
        return replace(ended, forced=not self._switch_off(frame, place, d))

    @staticmethod
    def _switch_off(frame: Frame, place: Place, d: Deadline) -> bool:
        """Whether it went off by itself.

        Asked of systemd and not by the power button: what listens to that button is not there yet in the first
        seconds, and not in every image.
        """
        env = frame.main.env if frame.main else ()
        d = d.sooner(max(0.0, (d.left_s(OFF_MOST_S + KILL_S) or 0.0) - KILL_S))
        try:
            place.inside(GUEST, place.facts).spawn("off", Command(OFF, env), Io(), d)
            place.wait(GUEST, d)
        except IsolatError:
            with contextlib.suppress(IsolatError):
                place.signal(GUEST, signal.SIGKILL, Deadline(KILL_S))
            return False
        return True

    def inside(self, frame: Frame, place: Place) -> Place:
        return place.inside(GUEST, _facts(place.facts))

    def copier(self, frame: Frame, place: Place, agent: str) -> files.Copier:
        return files.Copier(self.inside(frame, place), f"/{disk.AGENT}")

    def screenshot(self, frame: Frame, place: Place, fd: int, d: Deadline) -> None:
        with machine.monitor(place, d) as qmp:
            dialogue.screendump(qmp, fd, d)


def _facts(outer: Facts) -> Facts:
    """Of the inside nobody looked at more than that it is a machine's: nothing is put into it."""
    return replace(outer, kernel="guest", cgroups=CgroupFacts(CgroupMode.NONE), tools=(), features=(), root=False)


def _refuse(job: Job) -> None:
    """What no capability has a word for."""
    if not job.command:
        raise Unsupported(
            "nothing can be put into a whole PC yet",
            hint="for a layer inside a kernel of its own: --layer microvm/container",
        )
    if job.spec.kernel:
        raise Unsupported("a whole PC boots the kernel that is on its disk", hint="--kernel is for the layer microvm")
    for name, value, least in (
        ("memory", job.spec.memory_bytes, MEMORY_MIN_BYTES),
        ("disk", job.spec.disk_bytes, DISK_MIN_BYTES),
    ):
        if value < least:
            raise Unsupported(
                f"a whole PC does not boot with a {name} of {value >> 20} MiB",
                hint=f"give it --{name} {least >> 20}m or more, or use another layer",
            )

    machines.check_disk(job)


def _pc(job: Job, kit: MachineKit) -> pc.Pc:
    if not kit.pc:
        raise Unsupported("this QEMU makes no whole PCs (q35 with virtio devices)", hint="use QEMU 7.2 or later")
    return pc.Pc(
        binary=kit.pc,
        accel=kit.accel,
        cpu=argv.KVM_CPU if kit.accel == "kvm" else argv.TCG_CPU,
        memory_mib=job.spec.memory_bytes >> 20,
        cpus=machines.cpus(job),
        sandbox=kit.sandbox,
    )


def _disk(job: Job) -> Descriptor:
    image = common.image_of(job, "vm")
    at, size = f"{job.dir}/disk.img", job.spec.disk_bytes
    return Descriptor("disk", Source.BOOTABLE, at, size, writable=True, image=image.digest, tree=image.mount)


def _names(host: str) -> tuple[Step, ...]:
    """Its host name in its files; the kernel's own is set by ``resume``."""
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{host}\n"
    return (PutFile("/etc/hostname", f"{host}\n"), PutFile("/etc/hosts", hosts))
