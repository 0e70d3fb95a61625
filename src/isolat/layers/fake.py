"""The fake layer: no virtualization, but every way in which a layer can behave, on demand.

What holds for all layers (crash safety, deadlines, undoing what is half made, stacking) is proved on this one, in
milliseconds. Its guest is the init as an ordinary process. Options, under ``x-fake``:

- ``steps``: how many directories and files it makes, alternately (default 3)
- ``fail_step``: the index at which a step fails instead
- ``slow_start_s``: how long its guest takes before it speaks
- ``no_guest``: the application runs in the place itself
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from isolat.deadline import Deadline
from isolat.errors import Unsupported
from isolat.layers import common
from isolat.layers.base import Boundary, Capabilities, Frame, Job, Layer, Plan, Probe
from isolat.places.base import Command, Place
from isolat.places.steps import MakeDir, PutFile, Run, Step

OPTIONS = frozenset({"steps", "fail_step", "slow_start_s", "no_guest"})
DEFAULT_STEPS = 3
MOST = 100_000
MOST_STEPS = 1000


class FakeLayer(Layer):
    name: ClassVar[str] = "fake"
    capabilities: ClassVar[Capabilities] = Capabilities(
        boundary=Boundary.NONE,
        enter=True,
        networks=frozenset({"host", "none"}),
        users=True,
        images=False,
    )

    def probe(self, place: Place, d: Deadline) -> Probe:
        return Probe(True)

    def plan(self, job: Job, probe: Probe) -> Plan:
        common.check(job, self.name, self.capabilities)
        options = job.spec.option(self.name)
        common.check_options(self.name, options, OPTIONS)
        guest = None if options.get("no_guest") else _guest(job, options)
        return Plan(
            steps=_steps(job, options),
            guest=guest,
            main=common.main(job, "") if job.command else None,
            main_in_guest=guest is not None,
        )

    def inside(self, frame: Frame, place: Place) -> Place:
        return place.inside(frame.guest_key, place.facts) if frame.has_guest else place


def _number(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= MOST:
        hint = f"for example {name}: 1"
        raise Unsupported(f"x-fake: {name} is {value!r:.80}, which is not a number up to {MOST}", hint=hint)
    return float(value)


def _steps(job: Job, options: Mapping[str, Any]) -> tuple[Step, ...]:
    """Directories and files in turn, all below one directory of this layer's own."""
    count, failing = int(_number(options, "steps", DEFAULT_STEPS)), int(_number(options, "fail_step", -1))
    if max(count, failing) > MOST_STEPS:
        raise Unsupported(f"x-fake: at most {MOST_STEPS} steps", hint="steps: 3")
    base = f"{job.dir}/fake"
    steps: list[Step] = []
    for n in range(max(count, failing + 1)):
        if n == failing:
            steps.append(Run(("/bin/false",)))
        elif n % 2 == 0:
            steps.append(MakeDir(base if n == 0 else f"{base}/{n}"))
        else:
            steps.append(PutFile(f"{base}/{n}.txt", f"step {n} of {job.id}\n"))
    return tuple(steps)


def _guest(job: Job, options: Mapping[str, Any]) -> Command:
    """The init; a slow one is a shell that sleeps before it becomes the init, so that its first word comes late."""
    init = f"{job.libexec}/isolat-init"
    slow_s = _number(options, "slow_start_s", 0)
    if slow_s <= 0:
        return Command((init,), control=True)
    return Command(("/bin/sh", "-c", 'sleep "$1"; exec "$0"', init, f"{slow_s:g}"), control=True)
