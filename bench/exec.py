"""How long it takes to run one more program in a container that runs: `exec` of `true`.

In turns: Isolat's Python client in this process, its command line, `crun exec` in an equal container, `docker exec`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from bench import bare, docker, lib, subject

from isolat import Client, Environment

IDLE = ("sleep", "infinity")
WORDS = ("true",)
CLIENT_MS = 15.0
SDK, CLI, CRUN, DOCKER = "isolat (Python)", "isolat exec", "crun exec", "docker exec"


@contextlib.contextmanager
def idle(image: str) -> Iterator[Environment]:
    """A container that waits, removed afterwards."""
    env = Client(subject.root()).run(image, IDLE, detach=True)
    try:
        yield env
    finally:
        env.rm(force=True)


def in_process(env: Environment) -> float:
    start = time.perf_counter_ns()
    env.exec(WORDS).check()
    return (time.perf_counter_ns() - start) / 1e6


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("exec", versions=subject.versions(), base=CRUN)
    with contextlib.ExitStack() as stack:
        env = stack.enter_context(idle(options.image))
        argv = subject.argv("exec", env.id, *WORDS)
        samples: dict[str, lib.Sample] = {SDK: lambda: in_process(env), CLI: lambda: lib.spend(argv)}
        _add_crun(stack, report, samples, options.image)
        _add_docker(stack, report, samples, options.image)
        report.series = lib.interleave(samples, options.runs)
    report.promises.append(lib.Promise(f"{SDK}, median", report.of(SDK).median, CLIENT_MS, unit=" ms"))
    return report


def _add_crun(stack: contextlib.ExitStack, report: lib.Report, samples: dict[str, lib.Sample], image: str) -> None:
    if why := bare.missing():
        report.missing[CRUN] = why
        return
    config = bare.config_of(subject.plan(image, IDLE))
    peer = stack.enter_context(bare.ready(subject.image_file(image), config, IDLE))
    stack.enter_context(peer.container("idle"))
    argv = peer.runtime("exec", "idle", *WORDS)
    samples[CRUN] = lambda: peer.spend(argv)


def _add_docker(stack: contextlib.ExitStack, report: lib.Report, samples: dict[str, lib.Sample], image: str) -> None:
    if why := docker.missing():
        report.missing[DOCKER] = why
        return
    peer = stack.enter_context(docker.running(subject.image_file(image)))
    report.versions["docker"] = docker.version(peer)
    id = peer.call(*peer.run(IDLE, "--detach")[3:])
    stack.callback(peer.call, "kill", id)
    argv = peer.argv("exec", id, *WORDS)
    samples[DOCKER] = lambda: lib.spend(argv)


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__)
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    options = parser.parse_args(argv)
    return lib.finish(measure(options), as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
