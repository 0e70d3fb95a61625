"""How long a microVM takes beside Docker's containers: from the pool, from a template, exec, and a container inside.

In turns, in one run, with pauses in which the pool of machines made in advance is refilled:

- `isolat run --rm --layer microvm IMAGE true` of a root with such a pool, and of two without, where each run clones
  a template anew: of one that has templates of images, and of one whose templates know no image (as with the first run
  of an image); `docker run --rm` with and without a network; in each series the same tree;
- `exec` of `true` in a microVM that runs, `crun exec`, `docker exec`;
- `microvm/container`, beside `microvm` (from a template, too) and `container`.

The report says whether the machines were emulated or ran under KVM: the figures of both have nothing to do with each
other, the limits are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench import bare, docker, lib, roots, subject
from bench import exec as bench_exec

from isolat import Client, Environment

WORDS = ("true",)
LAYER = ("--layer", "microvm")
POOL_RATIO = 0.25
TEMPLATE_RATIO = 1.0
EXEC_MS = 15.0
STACK_MS = 1500.0
PAUSE_S = 0.5
POOL, TEMPLATE, FIRST = "microvm, pool", "microvm, template", "microvm, first"
MADE_S = 60.0
NONE, BRIDGE = "docker run, none", "docker run, bridge"
SDK, CLI, CRUN, DOCKER = "exec (Python)", "isolat exec", "crun exec", "docker exec"
STACK, CONTAINER = "microvm/container", "container"


@dataclass
class Roots:
    """One whose daemon makes machines in advance, one whose makes templates of images, one whose makes neither."""

    pool: roots.Own
    plain: roots.Own
    bare: roots.Own
    hits: list[bool] = field(default_factory=list)

    def from_pool(self, image: str) -> float:
        """One run; whether a machine was ready for it is noted."""
        self.hits.append(int(self.pool.ask("templates")["warm"]) > 0)
        return lib.spend(self.pool.argv("run", "--rm", *LAYER, image, *WORDS))

    def from_template(self, image: str, *layer: str) -> float:
        return lib.spend(self.plain.argv("run", "--rm", *(layer or LAYER), image, *WORDS))

    def as_first(self, image: str) -> float:
        return lib.spend(self.bare.argv("run", "--rm", *LAYER, image, *WORDS))

    def ready(self, image: str) -> None:
        """The templates are made, the image's behind a run."""
        self.as_first(image)
        self.from_pool(image)
        end = time.monotonic() + MADE_S
        self.from_template(image)
        while not any(row["image"] for row in self.plain.ask("templates")["templates"]):
            if time.monotonic() > end:
                raise lib.BenchError(f"there is no template of the image {image} after {MADE_S:g} s")
            time.sleep(PAUSE_S)


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("microvm", versions=subject.versions(), base=NONE)
    with contextlib.ExitStack() as stack:
        both = Roots(
            stack.enter_context(roots.own(options.image, ISOLAT_WARM="2")),
            stack.enter_context(roots.own(options.image, ISOLAT_WARM="0")),
            stack.enter_context(roots.own(options.image, ISOLAT_WARM="0", ISOLAT_IMAGE_TEMPLATES="0")),
        )
        both.ready(options.image)
        report.versions |= accelerator(both.plain)
        peer = _docker(stack, report, options)
        starts(report, both, peer, options)
        execs(report, both.pool, peer, options)
        stacked(report, both, options)
    return report


def accelerator(root: roots.Own) -> dict[str, str]:
    """KVM or emulation, as the template that was used says, and why, as `doctor` says."""
    kinds = {str(row["accel"]) for row in root.ask("templates")["templates"]}
    found = json.loads(subject.call("--root", str(root.path), "doctor", "--json"))
    reasons = [str(part["reason"]) for part in found["parts"] if part["name"] == "machines"]
    return {"accelerator": f"{', '.join(sorted(kinds))} ({'; '.join(reasons)[:120]})"}


def _docker(stack: contextlib.ExitStack, report: lib.Report, options: argparse.Namespace) -> docker.Docker | None:
    why = "left out by --no-docker" if options.no_docker else docker.missing()
    if why:
        report.missing["docker"] = why
        return None
    peer = stack.enter_context(docker.running(subject.image_file(options.image), bridge=True))
    report.versions["docker"] = docker.version(peer)
    return peer


def starts(report: lib.Report, both: Roots, peer: docker.Docker | None, options: argparse.Namespace) -> None:
    samples: dict[str, lib.Sample] = {
        POOL: lambda: both.from_pool(options.image),
        TEMPLATE: lambda: both.from_template(options.image),
        FIRST: lambda: both.as_first(options.image),
    }
    if peer is not None:
        samples |= {
            NONE: lambda: lib.spend(peer.run(WORDS)),
            BRIDGE: lambda: lib.spend(peer.run_bridged(WORDS)),
        }
    report.series += lib.interleave(samples, options.runs, pause_s=PAUSE_S)
    taken = both.hits[-options.runs :]
    report.figures["share of runs that found a machine ready"] = sum(taken) / len(taken)
    if peer is not None:
        report.promises += [
            lib.Promise(f"{POOL} / {NONE}", lib.ratio(report, POOL, NONE), POOL_RATIO),
            lib.Promise(f"{TEMPLATE} / {BRIDGE}", lib.ratio(report, TEMPLATE, BRIDGE), TEMPLATE_RATIO),
        ]


@contextlib.contextmanager
def idle(root: roots.Own, image: str) -> Iterator[Environment]:
    """A microVM that waits. It is not parked: it is asked all the time."""
    env = Client(str(root.path)).run(image, bench_exec.IDLE, detach=True, layer="microvm")
    try:
        yield env
    finally:
        env.rm(force=True)


def execs(report: lib.Report, root: roots.Own, peer: docker.Docker | None, options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        env = stack.enter_context(idle(root, options.image))
        argv = root.argv("exec", env.id, *WORDS)
        samples: dict[str, lib.Sample] = {SDK: lambda: bench_exec.in_process(env), CLI: lambda: lib.spend(argv)}
        _add_crun(stack, report, samples, options.image)
        if peer is not None:
            samples[DOCKER] = _docker_exec(stack, peer)
        report.series += lib.interleave(samples, options.runs)
    report.promises.append(lib.Promise(f"{SDK} in a microVM, median", report.of(SDK).median, EXEC_MS, unit=" ms"))


def _docker_exec(stack: contextlib.ExitStack, peer: docker.Docker) -> lib.Sample:
    id = peer.call(*peer.run(bench_exec.IDLE, "--detach")[3:])
    stack.callback(peer.call, "kill", id)
    argv = peer.argv("exec", id, *WORDS)
    return lambda: lib.spend(argv)


def _add_crun(stack: contextlib.ExitStack, report: lib.Report, samples: dict[str, lib.Sample], image: str) -> None:
    if why := bare.missing():
        report.missing[CRUN] = why
        return
    config = bare.config_of(subject.plan(image, bench_exec.IDLE))
    peer = stack.enter_context(bare.ready(subject.image_file(image), config, bench_exec.IDLE))
    stack.enter_context(peer.container("idle"))
    argv = peer.runtime("exec", "idle", *WORDS)
    samples[CRUN] = lambda: peer.spend(argv)


def stacked(report: lib.Report, both: Roots, options: argparse.Namespace) -> None:
    """A container in a machine; its parts are the machine alone (above, from a template) and the container alone."""
    samples: dict[str, lib.Sample] = {
        STACK: lambda: both.from_template(options.image, "--layer", STACK),
        CONTAINER: lambda: both.from_template(options.image, "--layer", CONTAINER),
    }
    try:
        report.series += lib.interleave(samples, max(3, options.runs // 3), warm_ups=1)
    except lib.BenchError as error:
        report.missing[STACK] = str(error)
        return
    report.figures["a container inside costs more than a microVM, ms"] = lib.difference(report, STACK, TEMPLATE)
    report.promises.append(lib.Promise(f"{STACK}, median", report.of(STACK).median, STACK_MS, unit=" ms"))


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__)
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    parser.add_argument("--no-docker", action="store_true", help="leave Docker out (its promises are then not checked)")
    options = parser.parse_args(argv)
    return lib.finish(measure(options), as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
