"""What a guest needs is opened, held, and not kept open by us."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from isolat.deadline import Deadline
from isolat.engine.holding import Holding, Lent
from isolat.errors import InternalError
from isolat.layers.base import Descriptor, Source, TemplatePlan
from isolat.places.base import Command, Place

PLAN = TemplatePlan("key", Command(("true",)), (), 1 << 20, 1, "tcg", "6.1")
OF_TEMPLATE = (Descriptor("ram", Source.TEMPLATE_MEMORY), Descriptor("state", Source.TEMPLATE_STATE))


class Keeper:
    """A place that holds duplicates, as a keeper does."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def hold(self, descriptors: Mapping[str, int], d: Deadline) -> None:
        self.held |= {name: os.dup(fd) for name, fd in descriptors.items()}


class Lender:
    def __init__(self, disk: Path) -> None:
        self.lent: list[Lent] = []
        self.disk = disk

    def __call__(self, plan: TemplatePlan, d: Deadline) -> Lent:
        memory, state = os.memfd_create("memory"), os.memfd_create("state")
        os.write(memory, b"memory")
        os.write(state, b"state")
        self.lent.append((memory, state, os.open(self.disk, os.O_RDONLY)))
        return self.lent[-1]


def provide(lender: Any, keeper: Keeper, descriptors: tuple[Descriptor, ...], plan: TemplatePlan | None) -> None:
    holding = Holding(Path("/nonexistent"), lender, lambda *_: Path("/nonexistent"))
    holding.provide(descriptors, plan, cast(Place, keeper), Deadline(5))


def test_a_server_that_can_only_accept_finds_a_connection_that_nobody_else_can_make(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)  # a socket's own path has at most 107 bytes
    deep.mkdir()
    keeper = Keeper()
    for _ in range(2):
        provide(None, keeper, (Descriptor("live-0", Source.LISTENING, str(deep / "live-0")),), None)
    assert list(deep.iterdir()) == []
    with socket.socket(fileno=keeper.held["live-0"]) as listening:
        listening.settimeout(5)
        with listening.accept()[0] as server, socket.socket(fileno=keeper.held["live-0-peer"]) as client:
            client.sendall(b"told")
            assert server.recv(9) == b"told"


def test_a_template_is_asked_once_and_what_it_lends_is_closed(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    lender, keeper = Lender(tmp_path / "disk"), Keeper()
    disk = Descriptor("disk", Source.TEMPLATE_DISK, str(tmp_path / "own"), writable=True)
    provide(lender, keeper, (*OF_TEMPLATE, disk), PLAN)
    assert len(lender.lent) == 1
    assert {name: os.pread(fd, 9, 0) for name, fd in keeper.held.items()} == {
        "ram": b"memory", "state": b"state", "disk": b"disk",
    }  # fmt: skip
    assert os.lseek(keeper.held["state"], 0, os.SEEK_CUR) == 0
    for fd in keeper.held.values():
        os.close(fd)
    for fd in lender.lent[0]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_who_needs_nothing_of_a_template_asks_for_none(tmp_path: Path) -> None:
    lender, keeper = Lender(tmp_path), Keeper()
    provide(lender, keeper, (Descriptor("qmp", Source.PAIR),), PLAN)
    assert lender.lent == []
    assert sorted(keeper.held) == ["qmp", "qmp-peer"]
    for fd in keeper.held.values():
        os.close(fd)


def test_a_template_that_is_not_named_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(InternalError):
        provide(Lender(tmp_path), Keeper(), OF_TEMPLATE, None)
