"""From nothing to the first run: `pull` of an image from a registry on this machine, then `run` of true in it.

In turns, in one run, each into a store that does not have the image: Isolat, Docker, Podman, as users have them. The
registry's files are in the page cache, so what is measured is fetching, checking, unpacking and starting. The image is
the tree of Isolat's ``debian`` and a second layer of this machine's own files, of 160 MB together.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import docker, lib, podman, registry, roots, subject

from isolat.images import authoring
from isolat.images.flatten import pack
from isolat.images.image import Image
from isolat.images.store import ImageStore

MOST_RATIO = 0.8
SIZE_BYTES = 160_000_000
RUNS = 7
ISOLAT, DOCKER, PODMAN = "isolat pull + run", "docker pull + run", "podman pull + run"
_NAME = "isolat-bench-pull"
_FILES = ("/usr/share", "/usr/lib")  # what the second layer is filled with


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("pull", versions=subject.versions(), base=ISOLAT)
    why = registry.missing()
    if why:
        report.missing["everything"] = why
        return report
    samples: dict[str, lib.Sample] = {}
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(registry.running())
        own = stack.enter_context(roots.own(options.image, ISOLAT_WARM="0"))
        image = _pushed(own, options.image, f"{address}/{_NAME}")
        report.figures |= image
        name = f"{address}/{_NAME}"
        samples[ISOLAT] = lambda: _timed(
            [own.argv("pull", "--quiet", name), own.argv("run", "--rm", name, "true")], [own.argv("rmi", name)]
        )
        _add_docker(stack, report, samples, name, options)
        _add_podman(stack, report, samples, name)
        report.series = lib.interleave(samples, options.runs, warm_ups=1)
    return report


def _pushed(own: roots.Own, base: str, name: str) -> dict[str, float]:
    """Make the image, push it, take it away again. What it is, for the report."""
    image = _made(own.path, base, name)
    lib.spend(own.argv("push", name))
    lib.spend(own.argv("rmi", name))
    store = ImageStore(own.path)
    return {"file system, MB": image.size_bytes / 1e6, "images left before": float(len(store.list()))}


def _made(root: Path, base: str, name: str) -> Image:
    store = ImageStore(root)
    found = store.resolve(base)
    with store.build() as build:
        tree = build.path / "more"
        _fill(tree, SIZE_BYTES - found.size_bytes)
        layer = authoring.make_layer(build, lambda out: pack.pack(tree, out))
        return authoring.derive(store, build, found, layer, authoring.Step("bench.pull"), [name])


def _fill(tree: Path, size: int) -> None:
    """Copy files of this machine until so many bytes are there, whatever is first in their order."""
    for file in _plain_files(_FILES):
        if size <= 0:
            return
        target = tree / file.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes()[:size]
        target.write_bytes(data)
        size -= len(data)


def _plain_files(directories: Sequence[str]) -> list[Path]:
    found = []
    for top in directories:
        for directory, _, names in os.walk(top):
            found += [path for name in names if (path := Path(directory, name)).is_file() and not path.is_symlink()]
    return sorted(found)


def _timed(what: Sequence[list[str]], undo: Sequence[list[str]]) -> float:
    taken = sum(lib.spend(argv) for argv in what)
    for argv in undo:
        lib.spend(argv)
    return taken


def _add_docker(
    stack: contextlib.ExitStack,
    report: lib.Report,
    samples: dict[str, lib.Sample],
    name: str,
    options: argparse.Namespace,
) -> None:
    why = "left out by --no-docker" if options.no_docker else docker.missing()
    if why:
        report.missing[DOCKER] = why
        return
    peer = stack.enter_context(docker.running(None))
    report.versions["docker"] = docker.version(peer)
    run = peer.argv("run", "--rm", "--network", "none", name, "true")
    samples[DOCKER] = lambda: _timed([peer.argv("pull", "--quiet", name), run], [peer.argv("rmi", "-f", name)])


def _add_podman(stack: contextlib.ExitStack, report: lib.Report, samples: dict[str, lib.Sample], name: str) -> None:
    why = podman.missing()
    if why:
        report.missing[PODMAN] = why
        return
    peer = stack.enter_context(podman.ready())
    report.versions["podman"] = podman.version(peer)
    pull = peer.argv("pull", "--quiet", "--tls-verify=false", name)
    samples[PODMAN] = lambda: _timed([pull, peer.run(name, "true")], [peer.argv("rmi", "-f", name)])


def judge(report: lib.Report) -> None:
    if report.has(ISOLAT, DOCKER, PODMAN):
        quicker = min((DOCKER, PODMAN), key=lambda name: report.of(name).median)
        ratio = lib.ratio(report, ISOLAT, quicker)
        report.promises.append(lib.Promise(f"{ISOLAT} / {quicker}, the quicker one", ratio, MOST_RATIO))


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__, RUNS)
    parser.add_argument("--image", default=subject.IMAGE, help="the image that it is made of (default %(default)s)")
    parser.add_argument("--no-docker", action="store_true", help="leave Docker out (the promise is then not checked)")
    options = parser.parse_args(argv)
    report = measure(options)
    judge(report)
    return lib.finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
