"""A microVM under test, seen from the host: its QEMU, what that has of its own, whether it is parked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.images import IMAGE
from tests.support.roots import Root
from tests.support.traces import processes

MIB = 1 << 20
MEMORY = "128m"


def spec(*command: str, **keys: Any) -> dict[str, Any]:
    """A service in a small microVM; ``x_microvm`` stands for ``x-microvm``."""
    more = {name.replace("x_", "x-", 1) if name.startswith("x_") else name: v for name, v in keys.items()}
    return {"image": IMAGE, "runtime": "microvm", "mem_limit": MEMORY, "command": list(command), **more}


def children(pid: int) -> list[int]:
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def qemu(root: Root, id: str) -> int:
    """The pid of its QEMU, the only child of its keeper."""
    (pid,) = children(int(root.ask("inspect", {"env": id})["keeper_pid"]))
    return pid


def link(pid: int | str, name: str) -> str:
    """A link of /proc: a namespace, the root."""
    return str(Path(f"/proc/{pid}/{name}").readlink())


def status(pid: int) -> dict[str, str]:
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.strip() for name, value in lines}


def anonymous_mib(pid: int) -> float:
    """What a process has of its own: pages of the template that it only reads are not in it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def cpu_s(pid: int) -> float:
    """What all its threads have used, from schedstat, in which nothing is rounded to ticks."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def is_parked(pid: int) -> bool:
    """Every thread is stopped."""
    states = [(task / "stat").read_text().rsplit(") ", 1)[1][0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}


def until_parked(pid: int, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_parked(pid):
        assert time.monotonic() < end, f"QEMU {pid} still runs after {seconds} s"
        time.sleep(0.02)


def machines(root: Root) -> list[int]:
    """The QEMUs of a root: they run in its jail. Without one of which a template is just made."""
    found = [pid for pid, words in processes(f"{root.path}/mounts/jail").items() if "qemu" in words]
    makers = [pid for pid, words in processes(f"{root.path}/templates/").items() if "keeper" in words]
    return [pid for pid in found if pid not in {child for maker in makers for child in children(maker)}]


def template_memory(root: Root, key: str) -> Path:
    """The memory of a template as a file: a descriptor of the keeper that holds it."""
    (keeper,) = (pid for pid, words in processes(f"{root.path}/templates/{key[:32]}").items() if "keeper" in words)
    return next(fd for fd in _memories(keeper))


def _memories(pid: int) -> Iterator[Path]:
    """Memory files of a process that are as large as a machine's memory."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if str(fd.readlink()).startswith("/memfd:") and fd.stat().st_size >= 96 * MIB:
            yield fd


def memory_of(pid: int) -> Path:
    """The template's memory as a clone's QEMU has it open."""
    return next(_memories(pid))


def warm(root: Root) -> int:
    return int(root.ask("templates")["warm"])


def until_warm(root: Root, count: int, seconds: float = 40) -> None:
    """Wait until so many machines are ready in the pool."""
    end = time.monotonic() + seconds
    while warm(root) < count:
        assert time.monotonic() < end, f"{warm(root)} machines are ready after {seconds} s, not {count}"
        time.sleep(0.05)
