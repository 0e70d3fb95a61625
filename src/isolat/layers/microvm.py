"""The microVM: a kernel of its own, which knows that it is a guest and uses the host's drivers through virtio.

QEMU is the only program between the guest and the host: without privileges, in namespaces of its own, with a uid
that nobody else has, behind QEMU's own system call filter. It gets everything as open descriptors and finds no path.

Where it can, a machine is a clone of a template (docs/layers/microvm.md): it maps the template's sealed memory
privately and continues where that was saved, with fresh randomness, clock and names before anything of anybody runs.
Inside, the agent carries out the same steps that a keeper carries out outside: the image's EROFS file is the first
disk, the writable part an ext4 of the asked size on the second, an overlay of both the application's root.

Options, under ``x-microvm``:

- ``template``: false boots a machine that shares no memory with any other (default true)
- ``volumes``: live shares the volumes while it runs, and boots it for itself, too (default copied)
- ``park_s``: after how many seconds without a word an idle machine is stopped until something is asked (0: never)
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from isolat.deadline import Deadline
from isolat.errors import (
    CommandNotFound,
    DeadlineExceeded,
    InternalError,
    NotExecutable,
    NotFound,
    StartFailed,
    Unsupported,
)
from isolat.guest import blank
from isolat.guest.kernel import KERNEL_ARGUMENTS
from isolat.layers import common, copies, files, hosting, live, machines, templates, volumes
from isolat.layers.base import (
    ANSWER_S,
    GUEST,
    Boundary,
    Capabilities,
    Copied,
    Copy,
    Descriptor,
    Frame,
    ImageRef,
    Job,
    Layer,
    MachineKit,
    Plan,
    Probe,
    Source,
    TemplatePlan,
    Wanted,
    ask_to_end,
)
from isolat.places.base import CgroupFacts, CgroupMode, Command, Exit, Facts, Identity, Io, Needs, Place, Proc, Starting
from isolat.places.rooted import RootedPlace
from isolat.places.steps import (
    MS_BIND,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    Cgroup,
    MakeDir,
    Mount,
    PutFile,
    Step,
)
from isolat.qemu import argv, dialogue, machine, sharing
from isolat.spec.model import DEFAULT_PIDS
from isolat.trace import mark

INSIDE = "/run/isolat"
ROOT = f"{INSIDE}/rootfs"
IMAGE, DISK, TOOLS = f"{INSIDE}/image", f"{INSIDE}/disk", f"{INSIDE}/tools"
NAMES = f"{INSIDE}/names"
VOLUMES = f"{DISK}/volumes"
GROUP = "/sys/fs/cgroup/isolat-application"
INNER_GROUP = "/sys/fs/cgroup/isolat"  # of all that a layer inside makes
OPTIONS = frozenset({"template", "park_s", "volumes"})
MEMORY_MIN_BYTES = 96 << 20
PARK_S = 10.0
_KILL_S = 5.0
_FLUSH_S = 5.0  # what an application's machine has to write to its disk when that was killed
_HAND_OVER_S, _HAND_OVER_ANSWER_S = 600.0, 10.0  # where it has volumes to hand over, who stops it has more patience
EXERCISES = 3
_EXT4 = "noinit_itable,no_prefetch_block_bitmaps"  # a thread for either would end in every clone
_SYSTEM = MS_NOSUID | MS_NOEXEC | MS_NODEV
DISKS = {"vda": ("image", True), "vdb": ("disk", False)}  # device: what is held for it, read-only
_ENTROPY_DEVICES = {name: f"/dev/{name}" for name, _ in argv.DISKS}


class MicrovmLayer(Layer):
    name: ClassVar[str] = "microvm"
    capabilities: ClassVar[Capabilities] = Capabilities(
        boundary=Boundary.KERNEL,
        enter=True,
        limits=frozenset({"memory", "cpus", "pids", "disk"}),
        networks=frozenset({"none"}),
        volumes=True,
        volumes_live=False,
        tmpfs=True,
        read_only=True,
        users=True,
        hostname=True,
        own_uids=True,
        machine=True,
        snapshot=True,
        hosts=True,
        copies=True,
        apart=True,
    )

    def probe(self, place: Place, d: Deadline) -> Probe:
        found = machines.probe(place)
        return replace(found, warnings=sharing.warnings()) if found.ready else found

    def plan(self, job: Job, probe: Probe) -> Plan:
        common.check(job, self.name, self.capabilities)
        volumes.check(job)
        options = _options(job)
        kit = machines.kit_of(job, self.name)
        asked = _machine(job, kit)
        templated = _templated(options, kit)
        shares = live.wanted(job.spec)
        if shares:
            live.check(job, kit)
        mounts = live.steps(job) if shares else ()
        guest = _guest(job, kit, replace(asked, incoming=templated, share=not templated), _park_s(options))
        outer = not job.command
        template = _template(job, kit, asked, guest) if templated else None
        return Plan(
            steps=(*machines.outside(job, _overhead_bytes(job, asked, templated)), *mounts),
            beside=live.beside(job, kit) if shares else (),
            guest=guest,
            main=None if outer else _main(job),
            needs=Needs(job.spec.memory_bytes, job.spec.cpus, job.spec.disk_bytes, machines.digests(job)),
            descriptors=_descriptors(job, kit, template),
            inside=_stacked_steps(job, templated) if outer else _inside(job, templated),
            template=template,
            options=(
                ("cloned", templated),
                ("host", common.hostname(job)),
                ("mac", mac(job.id)),
                ("outer", outer),
                ("release", kit.release),
                ("cpus", asked.cpus),
                *volumes.options(job),
                *copies.options(asked, kit.qemu_identity, possible=templated and not outer),
            ),
        )

    def start(self, frame: Frame, place: Place, io: Io, d: Deadline) -> Proc | None:
        disks = dict(DISKS)
        if frame.option("outer"):
            disks["vdc"] = ("tools", True)
        if frame.option("volumes"):
            disks[volumes.DEVICE] = (volumes.HELD, False)
        live.serve(frame, place, d)
        _begin(frame, place, disks, d)
        live.let_go(frame, place, d)
        return self._settle_in(frame, place, _changed(frame, disks), frame.inside, io, d)

    def _settle_in(
        self, frame: Frame, place: Place, changed: tuple[str, ...], steps: tuple[Step, ...], io: Io, d: Deadline
    ) -> Proc | None:
        """Make the machine this environment's own, then start the application."""
        inside = place.inside(GUEST, place.facts)
        inside.resume(_identity(frame, changed), d)
        mark("machine-resumed")
        inside.carry_out(steps, d)
        mark("machine-prepared")
        if frame.main is None:
            return None
        return place.spawn(frame.main_key, frame.main, replace(io, main=True), d)

    # in advance

    def warm_key(self, job: Job) -> str:
        """Everything that can't be changed any more in a machine that was made in advance, the image among it."""
        options = _options(job)
        if job.machine is None or job.image is None or not job.command or not _templated(options, job.machine):
            return ""
        spec = job.spec
        template = argv.template_key(_machine(job, job.machine), job.machine.guest_key, job.machine.qemu_identity)
        limits = (spec.disk_bytes, spec.cpus, spec.cpu_shares, spec.memory_swap_bytes, spec.pids_limit)
        root = (job.image.digest, spec.read_only, spec.tmpfs)
        return "/".join(str(part) for part in (template, *limits, *root, _park_s(options)))

    def warm_job(self, job: Job) -> Job:
        """The application is the image's own `true`: it lets the loader and the library be read and translated."""
        spec = replace(job.spec, hostname="", user="", volumes=(), working_dir="", tty=False)
        return replace(job, spec=spec, command=("true",), env=())

    def warm_up(self, frame: Frame, place: Place, d: Deadline) -> None:
        """Nothing of anybody runs here but what the image brings, and only machines of this image come from it."""
        _begin(frame, place, DISKS, d)
        inside = place.inside(GUEST, place.facts)
        for n in range(EXERCISES):
            inside.resume(_identity(frame, () if n else _changed(frame, DISKS)), d)
            inside.carry_out(() if n else frame.inside, d)
            _exercise(inside, frame, n, d)
        with machine.monitor(place, d) as qmp:
            dialogue.stop(qmp, d)

    def take(self, frame: Frame, warm: Frame, place: Place, io: Io, d: Deadline) -> Proc | None:
        changed = (volumes.DEVICE,) if frame.option("volumes") else ()
        with machine.monitor(place, d) as qmp:
            for device in changed:
                machine.swap(place, qmp, device, volumes.HELD, read_only=False, d=d)
            dialogue.cont(qmp, d)
        mark("machine-runs")
        done = set(warm.inside)
        steps = tuple(step for step in frame.inside if step not in done)
        return self._settle_in(frame, place, changed, steps, io, d)

    # copies

    def check_snapshot(self, frame: Frame) -> None:
        copies.check(frame)

    def going_on(self, copied: Frame, now: Frame) -> Frame:
        return copies.going_on(copied, now)

    def snapshot(self, frame: Frame, place: Place, to: Copy, d: Deadline) -> Copied:
        return copies.take(place, to, d)

    def go_on(self, frame: Frame, place: Place, d: Deadline) -> None:
        copies.go_on(place, d)

    def begin(self, frame: Frame, place: Place, d: Deadline) -> Starting:
        return copies.begin(frame, place, d)

    def restore(self, frame: Frame, place: Place, starting: Starting, copy: Copy, io: Io, d: Deadline) -> Proc | None:
        fixed = _overlay(True) in frame.inside
        names = tuple(_below_root(step) for step in frame.inside if _is_name(step) and not fixed)
        hosts, identity = "" if fixed else f"{ROOT}/etc/hosts", _identity(frame, ())
        return copies.restore(frame, place, starting, DISKS, copy, identity, names, hosts, io, d)

    # others inside

    def check_hosting(self, frame: Frame) -> None:
        hosting.check(frame)

    def image_inside(self, digest: str, own: str) -> str:
        return IMAGE if digest == own else hosting.image_at(digest, INSIDE)

    def bring_in(self, frame: Frame, place: Place, wanted: Wanted, in_use: Collection[str], d: Deadline) -> str:
        return hosting.bring_in(frame, place, wanted, in_use, TOOLS, INSIDE, d)

    def leave_bare(self, frame: Frame, place: Place, d: Deadline) -> None:
        hosting.leave_bare(frame, place, TOOLS, INSIDE, d)

    # its files

    def copier(self, frame: Frame, place: Place, agent: str) -> files.Copier:
        return files.Copier(place.inside(GUEST, place.facts), files.AGENT_INSIDE, ("--root", ROOT))

    def root(self, frame: Frame, *, write: bool) -> files.Root:
        return files.Overlay(ROOT, IMAGE, f"{DISK}/u", IMAGE).again(write=write)

    def writable(self, frame: Frame, facts: Facts) -> files.Writable:
        own = (*files.NAMES, "etc/machine-id")
        return files.Writable(f"{DISK}/u", IMAGE, own=own, freezer=f"{GROUP}/cgroup.freeze")

    # the end

    def stop(self, frame: Frame, place: Place, grace_s: float, d: Deadline) -> Exit:
        """As for every layer; a machine that does not even take the signal is killed.

        One that has something to do after its application's end gets the time for that: only the application is killed
        first. It writes to its disk what is in memory, or hands over its volumes.
        """
        left_s = d.left_s(_HAND_OVER_S) or 0.0
        sooner = d.sooner(max(0.0, left_s - _KILL_S))
        with contextlib.suppress(DeadlineExceeded):
            if frame.main is None or not frame.main.after:
                return super().stop(frame, place, grace_s, sooner)
            patience = (_HAND_OVER_ANSWER_S, _HAND_OVER_S) if frame.option("carried") else (ANSWER_S, _FLUSH_S)
            return _stop_application(frame, place, grace_s, *patience, sooner)
        place.signal(GUEST, signal.SIGKILL, d)
        return replace(place.wait(frame.main_key, d), forced=True)

    def inside(self, frame: Frame, place: Place) -> Place:
        """The application's root; for a layer inside, the machine itself."""
        inside = place.inside(GUEST, guest_facts(place.facts, frame))
        return inside if frame.main is None else RootedPlace(inside, ROOT, _join())


def _stop_application(frame: Frame, place: Place, grace_s: float, answer_s: float, after_s: float, d: Deadline) -> Exit:
    """Raises DeadlineExceeded where the machine does not take the signal within ``answer_s``, or what follows on the
    application's end takes longer than ``after_s``."""
    try:
        ended = ask_to_end(frame, place, d.sooner(grace_s))
    except DeadlineExceeded:
        with contextlib.suppress(NotFound, StartFailed):  # it has ended meanwhile
            place.signal(frame.main_key, signal.SIGKILL, d.sooner(answer_s))
        ended = place.wait(frame.main_key, d.sooner(after_s))
    return replace(ended, forced=ended.signal == signal.SIGKILL)


def guest_facts(outer: Facts, frame: Frame) -> Facts:
    """What the inside of every machine of ours is: made by us, so known without looking."""
    return Facts(
        kernel=str(frame.option("release") or "guest"),
        machine=outer.machine,
        cgroups=CgroupFacts(CgroupMode.V2, (("unified", "/sys/fs/cgroup"),)),
        tools=(("crun", "/bin/crun"),),
        features=("userns", "overlay", "erofs", "idmap"),
        cpus=int(frame.option("cpus") or 1),
        memory_bytes=outer.memory_bytes,
        root=True,
    )


def mac(id: str) -> str:
    """A locally administered address (52:54:00 is QEMU's) that follows from the id."""
    digest = hashlib.sha256(f"mac {id}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def machine_id(id: str) -> str:
    """machine-id(5): 32 hexadecimal digits that nobody outside learns the environment's id from."""
    return hashlib.sha256(f"machine-id {id}".encode()).hexdigest()[:32]


def _options(job: Job) -> Mapping[str, Any]:
    options = job.spec.option("microvm")
    common.check_options("microvm", options, OPTIONS)
    if not isinstance(options.get("template", True), bool):
        raise Unsupported(f"x-microvm: template is {options['template']!r}", hint="it may be true or false")
    live.check_options(options)
    park_s = options.get("park_s", PARK_S)
    if isinstance(park_s, bool) or not isinstance(park_s, (int, float)) or not 0 <= park_s <= 86400:
        raise Unsupported(f"x-microvm: park_s is {park_s!r}", hint="it is a number of seconds; 0: never")
    return options


def _park_s(options: Mapping[str, Any]) -> float:
    return float(options.get("park_s", PARK_S))


def _templated(options: Mapping[str, Any], kit: MachineKit) -> bool:
    return kit.templates and bool(options.get("template", True)) and not live.asked(options)


def _machine(job: Job, kit: MachineKit) -> argv.Machine:
    if job.spec.memory_bytes < MEMORY_MIN_BYTES:
        raise Unsupported(
            f"a machine with {job.spec.memory_bytes >> 20} MiB of memory does not boot",
            hint=f"give it at least {MEMORY_MIN_BYTES >> 20} MiB, or use the container layer",
        )
    if job.spec.disk_bytes < blank.MIN_BYTES:
        raise Unsupported(
            f"a disk of {job.spec.disk_bytes >> 20} MiB is too small for a file system",
            hint=f"give it at least {blank.MIN_BYTES >> 20} MiB",
        )
    machines.check_disk(job)
    return argv.Machine(
        binary=kit.qemu,
        accel=kit.accel,
        cpu=argv.KVM_CPU if kit.accel == "kvm" else argv.TCG_CPU,
        memory_mib=job.spec.memory_bytes >> 20,
        cpus=machines.cpus(job),
        tsc_khz=kit.tsc_khz if kit.accel == "tcg" else 0,
        vmlinux=kit.kernel,
        initramfs=kit.initramfs,
        live=len(job.spec.volumes) if live.wanted(job.spec) else 0,
        sandbox=kit.sandbox,
        kernel_arguments=KERNEL_ARGUMENTS,
    )


def _guest(job: Job, kit: MachineKit, asked: argv.Machine, park_s: float) -> Command:
    further = ("state",) if asked.incoming else live.peers(job) if asked.live else ()
    held = ("ram", "qmp-peer", *further)
    return replace(machines.guest(job, kit, argv.microvm_argv(asked), held), park_s=park_s)


def _overhead_bytes(job: Job, asked: argv.Machine, templated: bool) -> int:
    shares = live.memory_bytes(job) if asked.live else 0
    return argv.memory_overhead_bytes(asked) + _template_bytes(job, templated) + shares


def _template_bytes(job: Job, templated: bool) -> int:
    """What a clone may be charged for its template's memory.

    A page that the template never wrote is made in the template's own file when the first clone looks at it, and is
    copied when that clone writes: it is then charged for both (Documentation/admin-guide/cgroup-v1/memory.rst, "Shared
    Page Accounting"). Without room for that a machine that reads a large file is killed.
    """
    return job.spec.memory_bytes if templated else 0


def _template(job: Job, kit: MachineKit, asked: argv.Machine, guest: Command) -> TemplatePlan:
    first = templates.first(job, kit, asked, guest, _prepared())
    if job.image is None or not job.command:
        return first
    disks = tuple((device, *held) for device, held in DISKS.items())
    reader = replace(templates.reader(job.image), root=ROOT, cgroup_files=_join())
    return templates.of_image(job.image, first, asked, guest, _with_image(job), disks, reader)


def _descriptors(job: Job, kit: MachineKit, template: TemplatePlan | None) -> tuple[Descriptor, ...]:
    size = (job.spec.memory_bytes >> 20) << 20
    memory = (
        (Descriptor("ram", Source.TEMPLATE_MEMORY, template.key), Descriptor("state", Source.TEMPLATE_STATE))
        if template
        else (Descriptor("ram", Source.MEMORY, size_bytes=size),)
    )
    disk = Source.TEMPLATE_DISK if template else Source.DISK
    image = (Descriptor("image", Source.FILE, job.image.file),) if job.image else ()
    return (
        *memory,
        Descriptor(machine.MONITOR, Source.PAIR),
        *image,
        Descriptor("disk", disk, f"{job.dir}/disk.img", job.spec.disk_bytes, writable=True),
        *(() if job.command else (Descriptor("tools", Source.FILE, kit.tools),)),
        *volumes.descriptors(job),
    )


# in the guest


def _main(job: Job) -> Command:
    after = volumes.after(job, VOLUMES, GROUP, DISK)
    return replace(common.main(job, common.hostname(job)), root=ROOT, cgroup_files=_join(), after=after)


def _join() -> tuple[str, ...]:
    return (f"{GROUP}/cgroup.procs",)


def _prepared() -> tuple[Step, ...]:
    """What is the same in every machine, so done once in the template: the writable part, and where things will be."""
    return (
        MakeDir(DISK, 0o700),
        Mount("/dev/vdb", DISK, "ext4", _EXT4, MS_NOATIME | MS_NODEV),
        MakeDir(f"{DISK}/u", 0o755),
        MakeDir(f"{DISK}/w", 0o700),
        MakeDir(f"{NAMES}/etc", 0o755),
        *(PutFile(f"{NAMES}/etc/{name}", "") for name in ("hostname", "hosts", "resolv.conf", "machine-id")),
        MakeDir(IMAGE, 0o700),
        MakeDir(ROOT, 0o755),
        Cgroup((GROUP,), _pids(DEFAULT_PIDS)),
    )


def _with_image(job: Job) -> tuple[Step, ...]:
    """What is the same in every machine with this image. Done once more, nothing is done."""
    return (
        IMAGE_MOUNT,
        *(MakeDir(f"{DISK}/u{tmpfs.target}") for tmpfs in job.spec.tmpfs),
        _overlay(job.spec.read_only),
        Mount("proc", f"{ROOT}/proc", "proc", flags=_SYSTEM),
        Mount("sysfs", f"{ROOT}/sys", "sysfs", flags=_SYSTEM | MS_RDONLY),
        Mount("/dev", f"{ROOT}/dev", "", flags=MS_BIND | MS_REC),
    )


def _inside(job: Job, templated: bool) -> tuple[Step, ...]:
    return (
        *(() if templated else _prepared()),
        *_with_image(job),
        *_names(job, common.hostname(job)),
        *volumes.unpack_steps(job, VOLUMES),
        *_memories(job),
        *volumes.bind_steps(job, VOLUMES, ROOT),
        *((Cgroup((GROUP,), _pids(job.spec.pids_limit)),) if job.spec.pids_limit != DEFAULT_PIDS else ()),
    )


def _pids(limit: int) -> tuple[tuple[str, str], ...]:
    return ((f"{GROUP}/pids.max", str(limit)),)


IMAGE_MOUNT = Mount("/dev/vda", IMAGE, "erofs", "", MS_RDONLY | MS_NODEV)


def _names(job: Job, host: str) -> tuple[Step, ...]:
    """In memory, below what the application writes, so that they can be told to a machine whose root is mounted.

    Nobody has looked at them before. (On ext4 a first file is 3,700 blocks of code to be translated.)
    """
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{host}\n"
    texts = (
        ("hostname", f"{host}\n"),
        ("hosts", hosts),
        ("machine-id", f"{machine_id(job.id)}\n"),
    )
    return tuple(PutFile(f"{NAMES}/etc/{name}", text, in_place=True) for name, text in texts)


def _overlay(read_only: bool) -> Step:
    options = f"lowerdir={NAMES}:{IMAGE},upperdir={DISK}/u,workdir={DISK}/w,volatile"
    return Mount("overlay", ROOT, "overlay", options, MS_RDONLY if read_only else 0)


def _memories(job: Job) -> tuple[Step, ...]:
    return tuple(
        Mount("tmpfs", f"{ROOT}{tmpfs.target}", "tmpfs", f"size={tmpfs.size_bytes},mode=1777", MS_NOSUID | MS_NODEV)
        for tmpfs in job.spec.tmpfs
    )


def _stacked_steps(job: Job, templated: bool) -> tuple[Step, ...]:
    """What a layer inside finds: the image and the tools, mounted, and a place to write to."""
    return (
        *(() if templated else _prepared()),
        IMAGE_MOUNT,
        MakeDir(TOOLS, 0o755),
        Mount("/dev/vdc", TOOLS, "erofs", "", MS_RDONLY | MS_NODEV),
        *volumes.unpack_steps(job, VOLUMES),
    )


def inner_image(image: ImageRef) -> ImageRef:
    """An image as the inside of a machine sees it."""
    return replace(image, mount=IMAGE, file="", binds=())


# a machine's beginning


def _begin(frame: Frame, place: Place, disks: Mapping[str, tuple[str, bool]], d: Deadline) -> None:
    if frame.guest is None:
        raise InternalError("a machine has no command")
    start = machine.clone if frame.option("cloned") else machine.boot
    start(place, frame.guest, disks, d)


def _changed(frame: Frame, disks: Mapping[str, tuple[str, bool]]) -> tuple[str, ...]:
    """The disks of which the machine may remember others' contents. A clone remembers its own, or nothing (SETTLE)."""
    return () if frame.option("cloned") else tuple(disks)


def _identity(frame: Frame, changed: tuple[str, ...]) -> Identity:
    return machines.identity(frame, tuple(_ENTROPY_DEVICES[name] for name in changed))


def _below_root(step: Step) -> Step:
    """A name as the application sees it: it may have changed it."""
    if not isinstance(step, PutFile):
        return step
    return replace(step, path=step.path.replace(f"{NAMES}/", f"{ROOT}/", 1), in_place=False)


def _is_name(step: Step) -> bool:
    """What a copy must not share with the machine that it is a copy of. Left alone in a root that is only read."""
    return isinstance(step, PutFile) and step.path in (f"{NAMES}/etc/hostname", f"{NAMES}/etc/machine-id")


def _exercise(inside: Place, frame: Frame, n: int, d: Deadline) -> None:
    """Start the image's `true` the way an application is started. That an image has none is fine."""
    assert frame.main is not None
    for io in (Io(), Io(stdin=True)):
        key = f"exercise-{n}-{int(io.stdin)}"
        with contextlib.suppress(StartFailed, CommandNotFound, NotExecutable):
            inside.spawn(key, frame.main, io, d)
            if not io.stdin:
                inside.wait(key, d)
                continue
            inside.signal(key, signal.SIGTERM, d)
            inside.wait(key, d)
    for io in (Io(), Io(stdin=True)):
        inside.forget(f"exercise-{n}-{int(io.stdin)}", d)
