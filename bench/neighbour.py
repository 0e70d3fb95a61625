"""What a CPU-bound neighbour with equal shares costs: the median of 200 requests to a container, with and without it.

    .venv/bin/python -m bench.neighbour [--runs 200] [--rounds 5] [--json]

The server is a loop in a container that answers each line with a line; the client writes to it through ``isolat run
-i``. The rounds with and without the neighbour take turns, because the speed of a machine changes from minute to
minute. Promised: at most twice the median. Exit code 1 where that is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROMISED = 2.0
SERVER = 'while read -r line; do echo "$line"; done'
SPINNER = "while :; do :; done"


class Machine:
    """The command line, with its root and image."""

    def __init__(self, root: str, image: str) -> None:
        self._argv = [os.environ.get("ISOLAT_BIN", str(REPOSITORY / ".venv" / "bin" / "isolat"))]
        self._argv += ["--root", root] if root else []
        self.image = image

    def argv(self, *words: str) -> list[str]:
        return [*self._argv, *words]

    @contextlib.contextmanager
    def spinning(self) -> Iterator[None]:
        """A neighbour that would use every CPU there is."""
        spin = " & ".join([SPINNER] * (os.cpu_count() or 1))
        command = self.argv("run", "-d", self.image, "sh", "-c", spin)
        id = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        time.sleep(0.5)
        try:
            yield
        finally:
            subprocess.run(self.argv("rm", "-f", id), check=True, capture_output=True)


def round_trips_ms(server: subprocess.Popen[bytes], count: int) -> list[float]:
    assert server.stdin is not None
    assert server.stdout is not None
    found = []
    for n in range(count):
        line = f"request {n}\n".encode()
        began = time.perf_counter()
        server.stdin.write(line)
        server.stdin.flush()
        answer = server.stdout.readline()
        found.append((time.perf_counter() - began) * 1000)
        if answer != line:
            raise RuntimeError(f"{line!r} was answered with {answer!r}")
        time.sleep(0.002)
    return found


def measure(machine: Machine, runs: int, rounds: int) -> dict[str, list[float]]:
    """Samples in ms, alone and beside the neighbour, in turns."""
    samples: dict[str, list[float]] = {"alone": [], "beside": []}
    command = machine.argv("run", "-i", "--rm", machine.image, "sh", "-c", SERVER)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        round_trips_ms(server, 20)
        for _ in range(rounds):
            samples["alone"] += round_trips_ms(server, runs // rounds)
            with machine.spinning():
                samples["beside"] += round_trips_ms(server, runs // rounds)
        assert server.stdin is not None
        server.stdin.close()
        server.wait(30)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description="The price of a CPU-bound neighbour.")
    parser.add_argument("--root", default="")
    parser.add_argument("--image", default="debian")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    samples = measure(Machine(options.root, options.image), options.runs, options.rounds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratio = medians["beside"] / medians["alone"]
    result = {"median_ms": medians, "ratio": ratio, "promised": PROMISED, "samples_ms": samples}
    results = REPOSITORY / "bench" / "results"
    results.mkdir(exist_ok=True)
    (results / "neighbour.json").write_text(json.dumps(result) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        print(f"alone    {medians['alone']:8.2f} ms\nbeside   {medians['beside']:8.2f} ms\nratio    {ratio:8.2f}")
    if ratio > PROMISED:
        print(f"missed: at most {PROMISED:g} times was promised", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
