"""From the merged tree to EROFS's metadata: where every inode goes, then all of it written behind the data.

::

    block 0        superblock
    1 …            data of files, in the order in which it came
    meta …         inodes, each with its extended attributes, and small contents right behind them
    …              blocks of directories that are larger than one

Inodes of one directory lie together, so that listing it reads few blocks. The same tree gives the same bytes: names are
in order, the UUID is fixed, and the superblock's time is the most frequent of the files' own, which makes their inodes
half as large (a compact inode has no time of its own).
"""

from __future__ import annotations

import os
import stat
import struct

from isolat.images.flatten import ondisk
from isolat.images.flatten.bad import Bad
from isolat.images.flatten.blocks import BITS, BLOCK, Blocks, write_failed
from isolat.images.flatten.tree import Node, Tree

MAP_MAX = 64 << 20  # bytes of chunk maps in one image
_TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}  # fmt: skip
_CLASSES = 9
_CLASS = BLOCK // (_CLASSES - 1)


class _Room:
    """Places in the metadata.

    Inline data must not cross a block's end, so blocks are left with gaps; what is small fills them. Gaps are kept by
    size, the youngest first, because what belongs together should lie together.
    """

    def __init__(self) -> None:
        self.end = 2 * ondisk.SLOT  # number 0 would be taken for a deleted file by C libraries
        self._gaps: list[list[int]] = [[] for _ in range(_CLASSES)]

    def place(self, size: int) -> int:
        """Room of ``size`` bytes within one block, or from a block's start on where it is larger; its offset."""
        size = -(-size // ondisk.SLOT) * ondisk.SLOT
        rest = -self.end % BLOCK
        if size <= rest:
            return self._take(self.end, size)
        if size < BLOCK:
            for which in range((size + _CLASS - 1) // _CLASS, _CLASSES):
                if self._gaps[which]:
                    at = self._gaps[which].pop()
                    self._keep(at + size)
                    return at
        at = self.end + rest
        self._keep(self.end)
        return self._take(at, size)

    def _take(self, at: int, size: int) -> int:
        self.end = at + size
        return at

    def _keep(self, at: int) -> None:
        rest = -at % BLOCK
        if rest >= ondisk.SLOT:
            self._gaps[rest // _CLASS].append(at)


class Layout:
    """``write`` does it all once; ``inodes`` and ``content_bytes`` count what is in it."""

    def __init__(self, tree: Tree, blocks: Blocks) -> None:
        self.inodes = 0
        self.content_bytes = 0
        self._tree = tree
        self._blocks = blocks
        self._room = _Room()
        self._maps = 0
        self._time = (0, 0)
        self._chunked = False
        self._nodes: list[Node] = []
        self._directories: list[tuple[Node, list[bytes]]] = []
        self._tables: list[tuple[int, bytes]] = []

    def write(self) -> int:
        """Write the metadata and the superblock, and end the file there; its size. Raises Bad (too-large, no-space)."""
        self._directories = list(self._tree.directories())
        self._time = self._most_frequent_time()
        for node, names in self._directories:
            self._place_directory(node, names)
        self._blocks.flush()
        meta = self._blocks.reserve(-(-self._room.end // BLOCK))
        content = bytearray(-(-self._room.end // BLOCK) * BLOCK)
        for node, names in self._directories:
            self._fill_directory(content, node, names)
        for node in self._nodes:
            if node.children is None:
                self._fill_file(content, node)
        self._blocks.write(content, meta << BITS)
        for start, table in self._tables:
            self._blocks.write(table, start << BITS)
        return self._end(meta)

    def _end(self, meta: int) -> int:
        seconds, nanoseconds = self._time
        total = self._blocks.next
        head = ondisk.super_block(
            root=self._tree.root.nid, inodes=self.inodes, seconds=seconds, nanoseconds=nanoseconds, blocks=total,
            meta=meta, chunked=self._chunked,
        )  # fmt: skip
        self._blocks.write(head, 0)
        try:
            os.ftruncate(self._blocks.descriptor, total << BITS)
        except OSError as error:
            raise write_failed(error) from error
        return total << BITS

    def _most_frequent_time(self) -> tuple[int, int]:
        count: dict[tuple[int, int], int] = {}
        for directory, _ in self._directories:
            assert directory.children is not None
            for node in directory.children.values():
                time = (node.mtime_s, node.mtime_ns)
                count[time] = count.get(time, 0) + 1
        return max(count, key=lambda time: (count[time], time), default=(0, 0))

    # Places

    def _place_directory(self, node: Node, names: list[bytes]) -> None:
        """Itself, when it is the root, and all in it: a directory's size is known when its parent is placed."""
        if node.parent is None:
            node.parent = node
            self._measure(node)
            self._place(node)
        assert node.children is not None
        for name in names:
            child = node.children[name]
            if child.nid < 0:
                if child.children is not None:
                    self._measure(child)
                self._place(child)

    def _measure(self, node: Node) -> None:
        """A directory's size, its links, and the blocks of its own that it needs."""
        assert node.children is not None
        names = [b".", b"..", *node.children]
        node.nlink = 2 + sum(1 for child in node.children.values() if child.children is not None)
        if sum(map(len, names)) + ondisk.DIRENT * len(names) <= BLOCK:
            node.size = sum(map(len, names)) + ondisk.DIRENT * len(names)
        else:
            names.sort()
            found = ondisk.split_names(names)
            node.size = (len(found) - 1) * BLOCK + found[-1][2]
        node.blocks = -(-node.size // BLOCK)

    def _place(self, node: Node) -> None:
        self.inodes += 1
        head = self._head(node) + len(node.xattrs)
        tail = self._tail(node)
        inline = tail > 0 and head + tail <= BLOCK
        if node.children is not None:
            node.blocks -= inline
        elif node.data is not None and not inline and node.size:
            # With many extended attributes there is no room beside the inode
            piece = memoryview(node.data)
            node.start, node.data = self._blocks.append([piece], node.size), None
        if node.chunks is not None:
            self._maps += 4 * node.chunks.count
            if self._maps > MAP_MAX:
                raise Bad("too-large", f"sparse files whose maps take more than {MAP_MAX} bytes")
            head += 4 * node.chunks.count
        node.nid = self._room.place(head + (tail if inline else 0)) // ondisk.SLOT
        self._nodes.append(node)

    def _tail(self, node: Node) -> int:
        """What of the content may lie behind the inode."""
        if node.children is not None:
            return node.size % BLOCK
        return len(node.data) if node.data is not None else 0

    def _head(self, node: Node) -> int:
        small = (
            (node.mtime_s, node.mtime_ns) == self._time
            and node.uid | node.gid < 1 << 16
            and node.nlink < 1 << 16
            and node.size < 1 << 32
        )
        return ondisk.COMPACT if small else ondisk.EXTENDED

    # Content

    def _fill_directory(self, content: bytearray, node: Node, names: list[bytes]) -> None:
        """Its blocks, if it has any, directly into the file; the rest behind the inode."""
        assert node.children is not None and node.parent is not None
        children = {**node.children, b".": node, b"..": node.parent}
        names = sorted(children) if names else [b".", b".."]
        parts = []
        for first, behind, _ in ondisk.split_names(names):
            some = names[first:behind]
            nodes = [children[name] for name in some]
            kinds = [_TYPES[stat.S_IFMT(child.mode)] for child in nodes]
            parts.append(ondisk.dirents(some, [child.nid for child in nodes], kinds))
        tail = b""
        if node.blocks < len(parts):
            tail = parts.pop()
        if parts:
            node.start = self._blocks.reserve(len(parts))
            self._tables.append((node.start, b"".join(part.ljust(BLOCK, b"\0") for part in parts)))
        layout = ondisk.FLAT_INLINE if tail else ondisk.FLAT_PLAIN
        self._fill(content, node, layout, node.start, tail)

    def _fill_file(self, content: bytearray, node: Node) -> None:
        if node.chunks is not None:
            self._chunked = True
            self._fill(content, node, ondisk.CHUNK_BASED, node.chunks.bits, self._map(node))
        elif node.data:
            self._fill(content, node, ondisk.FLAT_INLINE, 0, node.data)
        elif stat.S_ISREG(node.mode) or stat.S_ISLNK(node.mode):
            self._fill(content, node, ondisk.FLAT_PLAIN, node.start, b"")
        else:
            self._fill(content, node, ondisk.FLAT_PLAIN, node.rdev, b"")
        if stat.S_ISREG(node.mode):
            self.content_bytes += node.size if node.chunks is None else node.blocks << BITS

    def _map(self, node: Node) -> bytes:
        chunks = node.chunks
        assert chunks is not None
        found = bytearray(ondisk.HOLE * chunks.count)
        step = 1 << chunks.bits
        for first, count, at in chunks.runs:
            start = node.start + at
            struct.pack_into(f"<{count}I", found, 4 * first, *range(start, start + count * step, step))
        return bytes(found)

    def _fill(self, content: bytearray, node: Node, layout: int, union: int, tail: bytes) -> None:
        count = ondisk.xattr_count(node.xattrs)
        number = node.nid + 1
        if self._head(node) == ondisk.COMPACT:
            inode = ondisk.compact_inode(
                layout, count, node.mode, node.nlink, node.size, union, number, node.uid, node.gid
            )
        else:
            inode = ondisk.extended_inode(
                layout, count, node.mode, node.nlink, node.size, union, number, node.uid, node.gid, node.mtime_s,
                node.mtime_ns,
            )  # fmt: skip
        at = node.nid * ondisk.SLOT
        whole = inode + node.xattrs + tail if node.xattrs or tail else inode
        content[at : at + len(whole)] = whole
