"""The last word on how a RUN step is isolated: a script that changes what buildah asks its OCI runtime for.

``python -I -S runtime.py create OURS RECORD`` rewrites the bundle's ``config.json`` before crun reads it. buildah 1.28
has no option for no_new_privs, for masked paths or for the score by which the kernel chooses whom to kill, and its own
profile of system calls is wider than ours. What is set here is what the container layer sets (oci/config.py).
``delete RECORD`` removes from the image what only was there to mount something on.

It runs inside the sandbox, as its root: whoever took buildah over is not held by it, but by the sandbox.
"""

# pathlib would double this script's start
# ruff: noqa: PTH108

from __future__ import annotations

import json
import os
import stat
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


# Mount points


def make_stubs(root: str, destinations: list[str]) -> list[str]:
    """Make the files that something of /etc is mounted on, where the image has none. Answers which were made.

    A runtime would make them, too; as the image's for ever, and with rights of its own choice.
    """
    made = []
    for path in destinations:
        directory, _, name = path.rpartition("/")
        at = _open_below(root, directory)
        if at >= 0:
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=at))
                made.append(path)
            except OSError:
                pass  # the image has it
            os.close(at)
    return made


def remove_stubs(root: str, made: list[str]) -> None:
    """Take them away, where the step has not made more of them."""
    for path in made:
        directory, _, name = path.rpartition("/")
        at = _open_below(root, directory)
        if at < 0:
            continue
        try:
            found = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and not found.st_size:
                os.unlink(name, dir_fd=at)
        except OSError:
            pass
        os.close(at)


def _open_below(root: str, directory: str) -> int:
    """The directory, or -1 where a link or nothing is on the way to it: the image is a stranger's."""
    at = -1
    try:
        at = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in directory.strip("/").split("/"):
            inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
    except OSError:
        if at >= 0:
            os.close(at)
        return -1
    return at


def create(ours: str, record: str) -> None:
    """Before the container: rewrite ``config.json`` of the bundle that this is started in, make the stubs."""
    with open("config.json") as file:
        config = json.load(file)
    with open(ours) as file:
        config = harden(config, json.load(file))
    with open("config.json", "w") as file:
        json.dump(config, file)
    wanted = [mount["destination"] for mount in config["mounts"] if mount["destination"].startswith("/etc/")]
    made = make_stubs(config["root"]["path"], wanted)
    if made:
        with open(record, "w") as file:
            json.dump({"root": config["root"]["path"], "made": made}, file)


def delete(record: str) -> None:
    """After the container."""
    with open(record) as file:
        found = json.load(file)
    os.unlink(record)
    remove_stubs(found["root"], found["made"])


if __name__ == "__main__":
    if sys.argv[1] == "create":
        create(sys.argv[2], sys.argv[3])
    else:
        delete(sys.argv[2])
