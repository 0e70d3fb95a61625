"""How fast bytes pass through a foreground run: 1 GiB into `run -i IMAGE cat` and out again.

In turns: Isolat's containers and microVMs, Docker, and a plain `cat` between two pipes, which is what the kernel can do
at all. Starting is included: it is what a user waits for. The bytes that come out are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence

from bench import docker, lib, subject

ISOLAT, MICROVM, DOCKER, PLAIN = "isolat run -i", "microvm", "docker run -i", "cat"
MB = 1_000_000


def through(argv: Sequence[str], size_bytes: int) -> float:
    """MB/s of so many zeros through a command."""
    start = time.perf_counter()
    with (
        subprocess.Popen(["head", "-c", str(size_bytes), "/dev/zero"], stdout=subprocess.PIPE) as source,
        subprocess.Popen(argv, stdin=source.stdout, stdout=subprocess.PIPE) as middle,
        subprocess.Popen(["wc", "-c"], stdin=middle.stdout, stdout=subprocess.PIPE, text=True) as sink,
    ):
        for process in (source, middle):
            assert process.stdout is not None
            process.stdout.close()
        said, _ = sink.communicate()
    taken = time.perf_counter() - start
    if middle.returncode or int(said) != size_bytes:
        raise lib.BenchError(f"{' '.join(argv)}: code {middle.returncode}, {said.strip()} of {size_bytes} bytes")
    return size_bytes / MB / taken


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("throughput", versions=subject.versions(), base=PLAIN)
    size = options.mib << 20
    argv = subject.argv("run", "--rm", "-i", options.image, "cat")
    machine = subject.argv("run", "--rm", "-i", "--layer", "microvm", options.image, "cat")
    samples: dict[str, lib.Sample] = {
        ISOLAT: lambda: through(argv, size),
        MICROVM: lambda: through(machine, size),
        PLAIN: lambda: through(["cat"], size),
    }
    with contextlib.ExitStack() as stack:
        if why := docker.missing():
            report.missing[DOCKER] = why
        else:
            peer = stack.enter_context(docker.running(subject.image_file(options.image)))
            report.versions["docker"] = docker.version(peer)
            samples[DOCKER] = lambda: through(peer.run(["cat"], "-i"), size)
        found = lib.interleave(samples, options.runs, warm_ups=1)
    report.series = [lib.Series(one.name, one.samples, "MB/s") for one in found]
    if report.has(ISOLAT, DOCKER):
        report.figures[f"{ISOLAT} / {DOCKER}"] = lib.ratio(report, ISOLAT, DOCKER)
        report.figures[f"{MICROVM} / {DOCKER}"] = lib.ratio(report, MICROVM, DOCKER)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__, runs=5)
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="how much (default %(default)s MiB)")
    options = parser.parse_args(argv)
    return lib.finish(measure(options), as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
