"""Plans: equal whenever they are made, and without any effect."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conformance.subject import Subject
from tests.support import traces
from tests.support.roots import REPOSITORY, Root, plain_environment

pytestmark = pytest.mark.root

# Plans twice in a process of its own, in which every effect on the machine ends it.
_CHILD = """
import json, os, sys
from pathlib import Path
from isolat.deadline import Deadline
from isolat.engine.creation import Request, describe, plan_stack
from isolat.engine.paths import StateRoot, native_dir
from isolat.layers import registry
from isolat.layers.base import ImageRef, MachineKit
from isolat.linux.facts import record_facts
from isolat.places.wired import WiredPlace
from isolat.spec.parse import parse

service = json.loads(sys.argv[1])
def no_link(_): raise AssertionError("the plan asked its place")
place = WiredPlace(no_link, record_facts())
stack = registry.resolve(tuple(service["runtime"].split("/")))
probes = {layer.name: layer.probe(place, Deadline(20)) for layer in stack}
image = ImageRef("0" * 64, "/nonexistent/mount")
kit = MachineKit(
    qemu="/usr/bin/qemu-system-x86_64", qemu_version="7.2.22", qemu_identity="a", sandbox=True, accel="tcg",
    accel_reason="", tsc_khz=2000000, release="6.1.0-1", kernel="/guest/vmlinux", initramfs="/guest/initramfs",
    tools="/nonexistent/tools", guest_key="k", jail="/nonexistent/jail",
    pc="/usr/bin/qemu-system-x86_64",
)
request = Request("0123456789abcdef", "NAME", parse(service), service, image, 7, "/nonexistent/upper", machine=kit)
forbidden = (
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.fork", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "socket.connect", "socket.bind",
)
def watch(event, args):
    if event in forbidden or (event == "open" and isinstance(args[2], int) and args[2] & 3):
        os.write(2, f"the plan has an effect: {event} {args}".encode())
        os._exit(99)
def plan():
    root, probe = StateRoot(Path("/nonexistent")), lambda layer, *_: probes[layer.name]
    return plan_stack(request, stack, place, root, native_dir(), probe, Deadline(20))
sys.addaudithook(watch)
first, second = plan(), plan()
print(json.dumps(first == second))
print(describe(first)[1])
"""


def test_two_plans_are_equal_and_touch_nothing(subject: Subject) -> None:
    service = subject.spec("true")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(service)],
        env=plain_environment(), capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verdict, _, text = done.stdout.partition("\n")
    assert verdict == "true"
    assert [f"layer {layer.name}" for layer in subject.layers] == [
        line for line in text.splitlines() if line.startswith("layer ")
    ]


def test_asking_for_the_plan_makes_no_environment(root: Root, subject: Subject) -> None:
    told = root.ask("plan", {"spec": subject.spec("true")})
    assert [frame["layer"] for frame in told["plan"]] == [layer.name for layer in subject.layers]
    assert told["plan"][-1]["main"] == ["true"]
    assert traces.none_of_environments(root.path, 0) == []


def test_what_is_carried_out_is_what_was_planned(root: Root, subject: Subject) -> None:
    planned = root.ask("plan", {"spec": subject.spec("sleep", "600")})["plan"]
    id = root.run_detached(subject.spec("sleep", "600"))
    done = root.ask("inspect", {"env": id})["frames"]
    assert [[step["step"] for step in frame["steps"]] for frame in done] == [
        [step["step"] for step in frame["steps"]] for frame in planned
    ]
