"""One layer's uncompressed bytes, as they arrive: taken in small exact pieces or passed on without a copy."""

from __future__ import annotations

from isolat.images.flatten.bad import Bad

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EMPTY = memoryview(b"")


class Source:
    """``more`` gives the next stretch, empty at the end; it is not called again after that."""

    __slots__ = ("_at", "_end", "_more", "_over", "_view")

    def __init__(self, more: Callable[[], memoryview]) -> None:
        self._more = more
        self._view = _EMPTY
        self._at = self._end = 0
        self._over = False

    def _fill(self) -> bool:
        if not self._over:
            self._view = self._more()
            self._at, self._end = 0, len(self._view)
            self._over = self._end == 0
        return not self._over

    def block(self, size: int) -> bytes:
        """Exactly ``size`` bytes, or b"" at the end. Raises Bad (truncated) in between."""
        at = self._at
        if at + size <= self._end:
            self._at = at + size
            return bytes(self._view[at : at + size])
        found = b"".join(self._some(size))
        if found and len(found) < size:
            raise Bad("truncated", "the archive ends in the middle of a header")
        return found

    def exactly(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        """``size`` bytes as they lie. Raises Bad (truncated) where there are fewer."""
        for piece in self._some(size):
            size -= len(piece)
            yield piece
        if size:
            raise Bad("truncated", f"the archive ends {size} bytes too early")

    def _some(self, size: int) -> Iterator[memoryview]:
        while size:
            if self._at == self._end and not self._fill():
                return
            at = self._at
            take = min(size, self._end - at)
            self._at = at + take
            size -= take
            yield self._view[at : at + take]

    def skip(self, size: int) -> None:
        if self._at + size <= self._end:
            self._at += size
            return
        for _ in self.pieces(size):
            pass

    def drain(self) -> None:
        """To the end: what follows an archive belongs to its digest."""
        self._at = self._end
        while self._fill():
            self._at = self._end
