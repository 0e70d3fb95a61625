"""What an ``Environment`` of the SDK can do with its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from isolat.client import archives, copying
from isolat.client.copying import Copied, Options, Progress

if TYPE_CHECKING:
    from isolat.client.sdk import Client

Path = str | os.PathLike[str]


def _nothing(_: int) -> None:
    pass


class HasFiles:
    """Copies run until they are through; ``on_progress`` hears how many bytes have gone."""

    client: Client
    id: str

    def copy_in(
        self, source: Path, path: str, *, owners: bool = False, follow: bool = False, on_progress: Progress = _nothing
    ) -> Copied:
        """Put a file or directory of this machine to ``path`` inside, where `docker cp` would put it.

        It belongs to root there, or with ``owners`` to the numbers that it belongs to here. ``follow``: what a link
        leads to, instead of the link. Raises NotFound, UsageError, CopyFailed, Lost.
        """
        return copying.copy_in(self.client.root, self.id, os.fspath(source), path, Options(owners, follow), on_progress)

    def copy_out(
        self, path: str, target: Path, *, owners: bool = False, follow: bool = False, on_progress: Progress = _nothing
    ) -> Copied:
        """Put what is at ``path`` inside to ``target`` here. It is yours, or with ``owners`` (root's only) theirs.

        Links come as they are; nothing that was not in what was copied is reached through one.
        """
        options = Options(owners, follow)
        return copying.copy_out(self.client.root, self.id, path, os.fspath(target), options, on_progress)

    def copy_in_archive(self, archive: BinaryIO, path: str, *, on_progress: Progress = _nothing) -> Copied:
        """Put what a tar archive holds, with its owners, below the directory ``path`` inside."""
        return copying.put_archive(self.client.root, self.id, archive.fileno(), path, on_progress)

    def copy_out_archive(
        self, path: str, archive: BinaryIO, *, follow: bool = False, on_progress: Progress = _nothing
    ) -> Copied:
        """Write what is at ``path`` inside as a tar archive."""
        archive.flush()
        options = Options(follow=follow)
        return copying.get_archive(self.client.root, self.id, path, archive.fileno(), options, on_progress)

    def export(self, file: Path, *, on_progress: Progress = _nothing) -> Copied:
        """Write its whole root file system, without what is mounted in it, to a tar archive."""
        with archives.target(os.fspath(file)) as descriptor:
            return copying.export(self.client.root, self.id, descriptor, on_progress)

    def diff(self) -> list[dict[str, str]]:
        """What it has changed of its image: ``kind`` (A, C or D) and ``path``."""
        found: list[dict[str, str]] = self.client._ask("diff", {"env": self.id})["changes"]
        return found

    def commit(
        self,
        *names: str,
        message: str = "",
        author: str = "",
        change: Sequence[str] = (),
        pause: bool = True,
    ) -> dict[str, Any]:
        """Keep it as a new image, and answer that. ``pause``: everything inside stands still meanwhile."""
        args = {
            "env": self.id,
            "names": list(names),
            "message": message,
            "author": author,
            "change": list(change),
            "pause": pause,
        }
        found: dict[str, Any] = self.client._ask("commit", args)
        return found
