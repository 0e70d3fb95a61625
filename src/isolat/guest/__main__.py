"""``python -m isolat.guest DIRECTORY``: make what machines boot from, and say what it is. For set-ups."""

from __future__ import annotations

import sys
from pathlib import Path

from isolat.engine.paths import native_dir
from isolat.errors import IsolatError
from isolat.guest.files import ensure


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        sys.stderr.write("usage: python -m isolat.guest DIRECTORY\n")
        return 125
    try:
        files = ensure(Path(argv[0]), native_dir(), _tell)
    except IsolatError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return error.exit_code
    sys.stdout.write(f"Linux {files.release}\n")
    return 0


def _tell(text: str, done: int, total: int) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
