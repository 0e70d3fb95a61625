"""The last word on how a RUN step is isolated: a script that changes what buildah asks its OCI runtime for.

``python -I -S runtime.py CONFIG OURS`` rewrites the bundle's ``config.json`` before crun reads it. buildah 1.28 has no
option for no_new_privs, for masked paths or for the score by which the kernel chooses whom to kill, and its own
profile of system calls is wider than ours. What is set here is what the container layer sets (oci/config.py).

It runs inside the sandbox, as its root: whoever took buildah over is not held by it, but by the sandbox.
"""

from __future__ import annotations

import json
import sys

OOM_SCORE = 500  # a step that takes too much memory is killed, not the builder that tells about it (proc(5))
TYPE_CHECKING = False  # typing itself would double this script's start
if TYPE_CHECKING:
    from typing import Any

    JSON = dict[str, Any]


def harden(config: JSON, ours: JSON) -> JSON:
    """The configuration with everything in ``ours``, whatever was there before."""
    process, linux = dict(config["process"]), dict(config["linux"])
    process["capabilities"] = ours["capabilities"]
    process["noNewPrivileges"] = True
    process["oomScoreAdj"] = OOM_SCORE
    for name in ("apparmorProfile", "selinuxLabel", "rlimits"):
        process.pop(name, None)
    linux["seccomp"] = ours["seccomp"]
    linux["maskedPaths"] = ours["masked"]
    linux["readonlyPaths"] = ours["read_only"]
    for name in ("resources", "cgroupsPath", "devices"):
        linux.pop(name, None)  # the whole sandbox has one control group, which nothing inside can write to
    return {**{name: value for name, value in config.items() if name != "hooks"}, "process": process, "linux": linux}


def main(path: str, ours: str) -> None:
    with open(path) as file:
        config = json.load(file)
    with open(ours) as file:
        config = harden(config, json.load(file))
    with open(path, "w") as file:
        json.dump(config, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
