"""Put the newest results of benches into docs/promises.md: `python -m bench.publish microvm pull`.

A result is what a bench kept in bench/results, so the figures in the docs are those that a script printed and nobody's
copy of them. A bench without a block in the docs gets one at the end. Notes between the lines of a block are written
over: it is the script's alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import lib

PROMISES = Path(__file__).resolve().parent.parent / "docs" / "promises.md"
END = "<!-- end of figures -->"


def newest(bench: str) -> dict[str, Any]:
    """The last result that was kept of a bench.

    Raises:
        BenchError: there is none; run the bench first.
    """
    kept = sorted(lib.RESULTS.glob(f"{bench}-*T*Z.json"))
    if not kept:
        raise lib.BenchError(f"bench/results has no result of {bench}: run python -m bench.{bench} first")
    found: dict[str, Any] = json.loads(kept[-1].read_text())
    return found


def block(found: dict[str, Any]) -> str:
    """What stands between the two comments, and these."""
    lines = [
        begin(found["bench"]),
        f"{found['bench']} on {lib.machine_words(found['machine'])}; {_versions(found)}",
        "",
    ]
    if series := [lib.Series(name, tuple(of["samples"]), of["unit"]) for name, of in found["series"].items()]:
        lines += [lib.table(series, found["base"]), ""]
    lines += [f"- {name}: {value:.4g}" for name, value in found["figures"].items()]
    lines += [f"- {promise_of(one).line()}" for one in found["promises"]]
    return "\n".join((*lines, END))


def begin(bench: str) -> str:
    return f"<!-- figures: bench/{bench}.py -->"


def promise_of(one: dict[str, Any]) -> lib.Promise:
    return lib.Promise(one["text"], one["value"], one["limit"], one["at_least"], one["unit"])


def _versions(found: dict[str, Any]) -> str:
    """Of what was compared; why the machines are emulated, where they are, is `isolat doctor`'s to tell."""
    return ", ".join(
        f"{name} {version.split(' (')[0]}" for name, version in found["versions"].items() if name != "isolat"
    )


def placed(text: str, found: dict[str, Any]) -> str:
    """The docs with this result in its place."""
    opening = begin(found["bench"])
    if opening not in text:
        return f"{text.rstrip()}\n\n{block(found)}\n"
    before, _, rest = text.partition(opening)
    return before + block(found) + rest.partition(END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bench", nargs="+", help="names of benches, as in python -m bench.NAME")
    text = PROMISES.read_text()
    for bench in parser.parse_args().bench:
        found = newest(bench)
        if found["missing"]:
            raise lib.BenchError(f"the last run of {bench} measured not everything: {found['missing']}")
        text = placed(text, found)
    PROMISES.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(lib.guarded(main))
