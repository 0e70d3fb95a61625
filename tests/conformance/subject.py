"""What is tested: a layer or a stack, with what an application in it can expect by its declared capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from isolat.images.bootstrap import SYSTEMD
from isolat.layers import registry
from isolat.layers.base import Boundary, Capabilities, Layer
from tests.support.images import IMAGE
from tests.support.roots import Root
from tests.support.wires import Stream

STACKS = ("fake", "host", "container", "fake/fake", "container/fake", "microvm", "microvm/container")
SLOW = ("vm",)  # a boot for each test: run by `make soak`
QUICK = ("fake", "host", "container", "container/fake", "microvm", "microvm/container")  # the others: `make soak`
FEW = {  # of these tests there are many, or they are long
    "test_crash": ("fake", "container"),
    "test_exec": ("fake", "host", "container", "container/fake", "microvm"),
    "test_declared": ("fake", "host", "container", "container/fake", "microvm"),
}
_STRENGTH = (Boundary.NONE, Boundary.NAMESPACES, Boundary.KERNEL)


def together(layers: Sequence[Layer]) -> Capabilities:
    """What a stack can do: what comes from outside is the outermost layer's, what is done inside needs all of them."""
    first, *others = (layer.capabilities for layer in layers)
    networks = first.networks
    for other in others:
        networks &= other.networks
    everything = [first, *others]
    return replace(
        first,
        boundary=max((can.boundary for can in everything), key=_STRENGTH.index),
        enter=all(can.enter for can in everything),
        networks=networks,
        read_only=all(can.read_only for can in everything),
        users=all(can.users for can in everything),
        hostname=all(can.hostname for can in everything),
        own_uids=any(can.own_uids for can in everything),
    )


VARIANTS: dict[str, dict[str, Any]] = {"booted": {"x-microvm": {"template": False}}}


class Subject:
    """One layer or stack under test; ``microvm@booted`` is the layer with the options of a variant."""

    def __init__(self, name: str) -> None:
        self.name, _, variant = name.partition("@")
        self.options = VARIANTS[variant] if variant else {}
        self.layers = registry.resolve(tuple(self.name.split("/")))
        self.can = together(self.layers)

    @property
    def outer(self) -> Layer:
        return self.layers[0]

    @property
    def image(self) -> str:
        return SYSTEMD if self.can.boots else IMAGE

    def spec(self, *command: str, **keys: Any) -> dict[str, Any]:
        """A service for this stack; ``x_timeout`` stands for ``x-timeout``."""
        more = {name.replace("x_", "x-", 1) if name.startswith("x_") else name: v for name, v in keys.items()}
        return {"image": self.image, "runtime": self.name, "command": list(command), **self.options, **more}

    def shell(self, script: str, **keys: Any) -> dict[str, Any]:
        return self.spec("sh", "-c", script, **keys)


class Launcher:
    """Starts a command as an environment's application, or by exec in one that runs already."""

    def __init__(self, root: Root, subject: Subject, how: str) -> None:
        self.root = root
        self.subject = subject
        self.how = how
        self.id = ""

    def __call__(
        self,
        *command: str,
        tty: bool = False,
        stdin: bool = False,
        rows: int = 0,
        cols: int = 0,
        user: str = "",
        working_dir: str = "",
        environment: Sequence[str] = (),
    ) -> Stream:
        """The streams of the command. Raises the error of the tree when it did not start."""
        told: dict[str, Any] = {"tty": tty, "environment": list(environment)}
        told |= {"user": user} if user else {}
        told |= {"working_dir": working_dir} if working_dir else {}
        if self.how == "run":
            spec = self.subject.spec(*command, stdin_open=stdin, **told)
            conversation, stream, self.id = self.root.run(spec, rows=rows, cols=cols)
            conversation.close()
            return stream
        if not self.id:
            self.id = self.root.run_detached(self.subject.spec("sleep", "600"))
        return self.root.exec(self.id, command, stdin=stdin, rows=rows, cols=cols, **told)

    def output(self, *command: str, **more: Any) -> str:
        """What a command that must succeed writes to its standard output."""
        stream = self(*command, **more)
        code = stream.ended()
        assert code == 0, f"{command}: {code}: {bytes(stream.err)!r}"
        stream.close()
        return stream.out.decode()
