"""The script that a command starts as ``python -I -S daemonize.py --root …``: it forks, so that the daemon is nobody's
child, finds this package again (``-I`` forgets where it is) and becomes the daemon."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    if os.fork():
        os._exit(0)
    os.chdir("/")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from isolat.daemon.main import main as serve

    return serve(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
