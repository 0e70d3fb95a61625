"""From a spec to a handle: names resolved, every layer of the stack planned, nothing touched yet."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.admission import uid_base
from isolat.engine.handle import Around, Handle
from isolat.engine.paths import StateRoot
from isolat.errors import InternalError, Unsupported, UsageError
from isolat.layers import microvm, volumes
from isolat.layers.base import (
    GUEST,
    MAIN,
    Boundary,
    CanEnter,
    Frame,
    ImageRef,
    Job,
    Layer,
    MachineKit,
    Plan,
    Probe,
    State,
)
from isolat.places.base import Place
from isolat.places.steps import Leftover
from isolat.spec.model import DEFAULT_CPUS, DEFAULT_DISK_BYTES, DEFAULT_MEMORY_BYTES, DEFAULT_PIDS, Spec
from isolat.spec.values import signal_number

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSIDE_LIBEXEC = "/dev/.isolat"
INSIDE_DIRECTORY = "/tmp/.isolat"
Prober = Callable[[Layer, Place, Deadline], Probe]


@dataclass(frozen=True)
class Request:
    """A spec with what the engine has resolved for it."""

    id: str
    name: str
    spec: Spec
    service: Mapping[str, object]
    image: ImageRef | None
    uid_index: int
    upper: str
    caller_uid: int = 0
    caller_gid: int = 0
    machine: MachineKit | None = None
    around: Around | None = None


@dataclass(frozen=True)
class Planned:
    """A layer of the stack with its plan."""

    layer: Layer
    plan: Plan
    frame: Frame


def plan_stack(
    request: Request,
    stack: tuple[Layer, ...],
    place: Place,
    paths: StateRoot,
    libexec: Path,
    probe: Prober,
    d: Deadline,
) -> list[Planned]:
    """Plan every layer, from the hardware up. Raises Unsupported where a layer is not ready or cannot do it."""
    job = outer_job(request, place, paths, _command(request), str(libexec))
    return _plan_layers(request, job, stack, place, GUEST, probe, d)


def plan_inside(
    request: Request,
    stack: tuple[Layer, ...],
    around: Sequence[tuple[Layer, Place]],
    paths: StateRoot,
    libexec: Path,
    probe: Prober,
    d: Deadline,
) -> list[Planned]:
    """The same for an environment that is put into another one: its own limits hold there.

    ``around``: every layer around it, from the hardware up, each with its inside.
    """
    place = around[-1][1]
    job = outer_job(request, place, paths, _command(request), str(libexec))
    for layer, inside in around:
        job = _within(job, layer, inside)
    first, *others = _plan_layers(request, job, stack, place, request.id, probe, d)
    steps = (Leftover(job.dir, keep=True), *first.plan.steps)  # all its files in that place are below this directory
    plan, frame = replace(first.plan, steps=steps), replace(first.frame, steps=steps)
    return [Planned(first.layer, plan, frame), *others]


def _plan_layers(
    request: Request, job: Job, stack: tuple[Layer, ...], place: Place, guest_key: str, probe: Prober, d: Deadline
) -> list[Planned]:
    """``guest_key``: of the outermost; those inside are alone in theirs."""
    planned: list[Planned] = []
    for depth, layer in enumerate(stack):
        last = depth == len(stack) - 1
        found = probe(layer, place, d)
        if not found.ready:
            raise Unsupported(f"the layer {layer.name} is not ready here: {found.reason}", hint=found.remedy)
        this = job if last else replace(job, command=())
        plan = layer.plan(this, found)
        frame = frame_of(layer, plan, last=last, guest_key=GUEST if depth else guest_key)
        frame = replace(frame, stop_signal=_stop_signal(request))
        planned.append(Planned(layer, plan, frame))
        if not last:
            if not isinstance(layer, CanEnter):
                raise Unsupported(f"nothing can be put into the layer {layer.name}")
            place = layer.inside(frame, place)
            job = _inner_job(job, layer, place)
    return planned


def handle_of(request: Request, planned: list[Planned], boot_id: str) -> Handle:
    return Handle(
        id=request.id,
        name=request.name,
        image=request.spec.image,
        digest=request.image.digest if request.image else "",
        spec=dict(request.service),
        frames=tuple(item.frame for item in planned),
        state=State.CREATING,
        created_ns=time.time_ns(),
        boot_id=boot_id,
        uid_index=request.uid_index,
        upper=request.upper,
        remove=request.spec.remove,
        caller_uid=request.caller_uid,
        labels=request.spec.labels,
        around=request.around,
    )


def frame_of(layer: Layer, plan: Plan, *, last: bool, guest_key: str = GUEST) -> Frame:
    if last and plan.main is None:
        raise InternalError(f"the layer {layer.name} planned no application")
    inside = plan.guest is not None and plan.main_in_guest
    return Frame(
        layer=layer.name,
        steps=plan.steps,
        has_guest=plan.guest is not None,
        main_key=(f"{guest_key}/{MAIN}" if inside else MAIN) if last else "",
        main=plan.main if last else None,
        guest=plan.guest,
        options=plan.options,
        beside=plan.beside,
        inside=plan.inside,
        guest_key=guest_key,
    )


def _command(request: Request) -> tuple[str, ...]:
    spec, image = request.spec, request.image
    if spec.entrypoint is not None or image is None:
        command = (*(spec.entrypoint or ()), *spec.command)
    else:
        command = (*image.entrypoint, *(spec.command or image.command))
    if not command:
        raise UsageError(
            f"no command to run: neither given nor set in the image {spec.image}",
            hint=f"isolat run {spec.image} COMMAND",
        )
    return command


def _stop_signal(request: Request) -> int:
    """An image's word for it is not checked when it is made: one that is no signal counts as none."""
    image = request.image
    text = request.spec.stop_signal or (image.stop_signal if image else "")
    return signal_number(text) or int(signal.SIGTERM)


def outer_job(request: Request, place: Place, paths: StateRoot, command: tuple[str, ...], libexec: str = "") -> Job:
    """The job of a stack's outermost layer."""
    spec, image = request.spec, request.image
    if spec.cpus == DEFAULT_CPUS:
        spec = replace(spec, cpus=min(spec.cpus, float(place.facts.cpus)))
    return Job(
        id=request.id,
        spec=spec,
        dir=str(paths.env(request.id)),
        facts=place.facts,
        image=image,
        machine=request.machine,
        uid_base=uid_base(request.uid_index),
        upper=request.upper,
        volumes=str(paths.pool_volumes),
        cgroup=f"{paths.cgroup}/{request.id}",
        libexec=libexec,
        runtime_root=str(paths.runtime),
        caller_uid=request.caller_uid,
        caller_gid=request.caller_gid,
        command=command,
        env=_environment(spec, image),
    )


def _inner_job(job: Job, layer: Layer, inside: Place) -> Job:
    """The job of the next layer, as seen from inside this one: volumes, limits and image stay with the outermost."""
    if layer.capabilities.machine:
        return _within(_left_by_machine(job), layer, inside)
    spec = replace(
        job.spec,
        volumes=(),
        tmpfs=(),
        memory_bytes=DEFAULT_MEMORY_BYTES,
        memory_swap_bytes=None,
        cpus=DEFAULT_CPUS,
        pids_limit=DEFAULT_PIDS,
        disk_bytes=DEFAULT_DISK_BYTES,
    )
    return _within(replace(job, spec=spec), layer, inside)


def _within(job: Job, layer: Layer, inside: Place) -> Job:
    """The same job, with the directories and whatever else the inside of this layer has for it."""
    if layer.capabilities.machine:
        return replace(
            job,
            facts=inside.facts,
            dir=f"{microvm.INSIDE}/environments/{job.id}",
            libexec=f"{microvm.TOOLS}/bin",
            runtime_root=f"{microvm.INSIDE}/runtime",
            upper=f"{microvm.DISK}/{job.id}",
            upper_bounded=True,
            cgroup=f"/isolat/{job.id}",
            opened=False,
            caller_uid=0,  # whose volumes they are is root inside
            caller_gid=0,
        )
    shared = layer.capabilities.boundary == Boundary.NONE
    return replace(
        job,
        facts=inside.facts,
        upper="",
        cgroup="",
        dir=f"{job.dir}/inner" if shared else f"{INSIDE_DIRECTORY}/{job.id}",
        libexec=job.libexec if shared else INSIDE_LIBEXEC,
    )


def _left_by_machine(job: Job) -> Job:
    """The machine's own memory and disk are the limits; the image is mounted, the tools are there (layers/microvm)."""
    return replace(
        job,
        image=microvm.inner_image(job.image) if job.image else None,
        spec=replace(
            job.spec,
            volumes=volumes.inner(job, microvm.VOLUMES),
            memory_bytes=0,
            memory_swap_bytes=None,
            cpus=DEFAULT_CPUS,
            disk_bytes=DEFAULT_DISK_BYTES,
        ),
        after=volumes.after(job, microvm.VOLUMES, microvm.INNER_GROUP, microvm.DISK),
    )


def _environment(spec: Spec, image: ImageRef | None) -> tuple[tuple[str, str], ...]:
    merged = {"PATH": DEFAULT_PATH}
    if image is not None:
        merged.update(image.env)
    if spec.tty:
        merged["TERM"] = "xterm"
    merged.update(spec.environment)
    return tuple(merged.items())


def describe(planned: list[Planned]) -> tuple[list[dict[str, object]], str]:
    """A plan as data and as text for people."""
    data: list[dict[str, object]] = []
    lines: list[str] = []
    for item in planned:
        plan = item.plan
        data.append(
            {
                "layer": item.layer.name,
                "steps": [step.to_json() for step in plan.steps],
                "descriptors": [asdict(descriptor) for descriptor in plan.descriptors],
                "inside": [step.to_json() for step in plan.inside],
                "beside": {key: list(command.argv) for key, command in plan.beside},
                "guest": list(plan.guest.argv) if plan.guest else None,
                "main": list(plan.main.argv) if plan.main else None,
            }
        )
        lines.append(f"layer {item.layer.name}")
        lines += [f"  {n}. {step.describe()}" for n, step in enumerate(plan.steps, 1)]
        lines += [f"  {descriptor.describe()}" for descriptor in plan.descriptors]
        lines += [f"  beside the guest: {' '.join(command.argv)}" for _, command in plan.beside]
        if plan.guest:
            lines.append(f"  guest: {' '.join(plan.guest.argv)}")
        lines += [f"  inside: {step.describe()}" for step in plan.inside]
        if plan.main:
            where = " (inside the guest)" if plan.guest and plan.main_in_guest else ""
            lines.append(f"  main{where}: {' '.join(plan.main.argv)}")
    return data, "\n".join(lines)


def boot_id() -> str:
    """This boot of the host (random(4)): what ran under another one is lost."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
