"""Opening what a guest needs, and letting its keeper hold it: so that it is there for the next daemon too."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import InternalError, StoreError
from isolat.guest.blank import blank, copy_sparse
from isolat.layers.base import Descriptor, Shares, Source, TemplatePlan
from isolat.places.base import Place
from isolat.qemu import forks
from isolat.volumes import transfer

Lent = tuple[int, int, int]  # memory, state, disk
Lender = Callable[[TemplatePlan, Deadline], Lent]
Bases = Callable[[Descriptor, Deadline], Path]
_OF_TEMPLATE = frozenset({Source.TEMPLATE_MEMORY, Source.TEMPLATE_STATE, Source.TEMPLATE_COPY, Source.TEMPLATE_DISK})


class Holding:
    """``template`` lends a template's memory, state and disk, making it where there is none.

    The descriptors are duplicates, and ours: whoever removes the template meanwhile closes only its own.

    ``bases`` gives the bootable disk that this one shall be a copy of.
    """

    def __init__(self, blanks: Path, template: Lender, bases: Bases) -> None:
        self._blanks = blanks
        self._template = template
        self._bases = bases

    def provide(
        self,
        descriptors: Sequence[Descriptor],
        template: TemplatePlan | None,
        place: Place,
        d: Deadline,
        but: Collection[str] = (),
        given: Sequence[int] = (),
    ) -> list[str]:
        """Open these and let the place hold them, without those whose names are in ``but``.

        ``given``: the sources of the volumes, which the caller has opened. What of them was left out, in words.
        Raises StoreError when a file can't be opened or made.
        """
        wanted = [descriptor for descriptor in descriptors if descriptor.name not in but]
        with ExitStack() as ours:
            lent = self._lent(wanted, template, ours, d)
            found: dict[str, int] = {}
            left: list[str] = []
            for descriptor in wanted:
                if descriptor.shares is not None:
                    left += _archive(descriptor, descriptor.shares, given, d)
                found.update(self._open(descriptor, lent, given, ours, d))
            if found:
                place.hold(found, d)
        return left

    def _lent(
        self, wanted: Sequence[Descriptor], template: TemplatePlan | None, ours: ExitStack, d: Deadline
    ) -> Lent | None:
        """What a template lends, where one of these comes from it."""
        if not any(descriptor.source in _OF_TEMPLATE for descriptor in wanted):
            return None
        if template is None:
            raise InternalError("a plan wants something of a template that it does not name")
        lent = self._template(template, d)
        for fd in lent:
            ours.callback(os.close, fd)
        return lent

    def _open(
        self,
        descriptor: Descriptor,
        lent: Lent | None,
        given: Sequence[int],
        ours: ExitStack,
        d: Deadline,
    ) -> dict[str, int]:
        name = descriptor.name
        if descriptor.source is Source.GIVEN:
            return {name: given[descriptor.given]}
        if descriptor.source is Source.PAIR:
            one, other = socket.socketpair()
            ours.enter_context(one)
            ours.enter_context(other)
            return {name: one.fileno(), f"{name}-peer": other.fileno()}
        if descriptor.source is Source.LISTENING:
            listening, connected = _listening(Path(descriptor.path))
            ours.enter_context(listening)
            ours.enter_context(connected)
            return {name: listening.fileno(), f"{name}-peer": connected.fileno()}
        if lent is not None and descriptor.source in _OF_TEMPLATE:
            if descriptor.source is Source.TEMPLATE_MEMORY:
                return {name: lent[0]}
            fd = _of_template(descriptor, lent, d)
        else:
            fd = self._file(descriptor, d)
        ours.callback(os.close, fd)
        return {name: fd}

    def _file(self, descriptor: Descriptor, d: Deadline) -> int:
        try:
            if descriptor.source is Source.MEMORY:
                return _memory(descriptor.name, descriptor.size_bytes)
            if descriptor.source is Source.DISK:
                _make_disk(blank(self._blanks, descriptor.size_bytes), Path(descriptor.path))
            if descriptor.source is Source.BOOTABLE:
                _make_disk(self._bases(descriptor, d), Path(descriptor.path))
                os.chmod(descriptor.path, 0o600)
            mode = os.O_RDWR if descriptor.writable else os.O_RDONLY
            return os.open(descriptor.path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreError(f"{descriptor.path or descriptor.name} can't be opened: {error.strerror}") from error


def _listening(path: Path) -> tuple[socket.socket, socket.socket]:
    """For a server that can only accept: its socket, and a connection that waits there. Nobody can make another one,
    for the name is gone. By a descriptor, because a socket's path has at most 107 bytes (unix(7)).
    """
    listening, connected = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    at = f"/proc/self/fd/{directory}/{path.name}"
    try:
        path.unlink(missing_ok=True)
        listening.bind(at)
        listening.listen(1)
        connected.connect(at)
        path.unlink()
        return listening, connected
    except OSError as error:
        listening.close()
        connected.close()
        raise StoreError(f"{path} can't be made a socket: {error.strerror}") from error
    finally:
        os.close(directory)


def _of_template(descriptor: Descriptor, lent: Lent, d: Deadline) -> int:
    memory, state, disk = lent
    if descriptor.source is Source.TEMPLATE_DISK:
        return _copied(Path(f"/proc/self/fd/{disk}"), descriptor)
    if descriptor.source is Source.TEMPLATE_COPY:
        return _memory_like(memory, descriptor, d)
    # A description of its own: every clone reads it from the beginning.
    return os.open(f"/proc/self/fd/{state}", os.O_RDONLY | os.O_CLOEXEC)


def _memory_like(memory: int, descriptor: Descriptor, d: Deadline) -> int:
    source, target = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC), -1
    try:
        target = _memory(descriptor.name, descriptor.size_bytes)
        forks.copy_disk(source, target, d)
        return target
    except BaseException:
        if target >= 0:
            os.close(target)
        raise
    finally:
        os.close(source)


def _copied(disk: Path, descriptor: Descriptor) -> int:
    try:
        _make_disk(disk, Path(descriptor.path))
        return os.open(descriptor.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StoreError(f"{descriptor.path} can't be opened: {error.strerror}") from error


def _archive(descriptor: Descriptor, shares: Shares, given: Sequence[int], d: Deadline) -> list[str]:
    found = enumerate(zip(given, shares.read_only, shares.named, strict=True))
    volumes = [transfer.Volume(str(n), fd, read_only, named=named) for n, (fd, read_only, named) in found]
    owner = transfer.Owner(shares.uid, shares.gid)
    return transfer.bring_in(Path(descriptor.path), volumes, owner, descriptor.size_bytes, d)


def _memory(name: str, size_bytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd


def _make_disk(base: Path, at: Path) -> None:
    """A copy of this disk; the one that is there stays."""
    if not at.exists():
        copy_sparse(base, at)
