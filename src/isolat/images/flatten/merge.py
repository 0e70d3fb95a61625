"""Layers on layers (OCI image-spec, layer.md), the oldest first: entries change the tree, data goes to the blocks.

The rules are umoci's, which unpacks into a real directory, wherever an image is one that any engine would make; what no
engine makes is refused by name. docs/images.md has them all.
"""

from __future__ import annotations

import stat

from isolat.images.flatten.bad import Bad
from isolat.images.flatten.blocks import Blocks
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import BLOCK, CHAR, DIRECTORY, FIFO, FILE, LINK, SYMLINK, Bounds, Entry, Reader
from isolat.images.flatten.tree import PATH_MAX, Node, Tree, cleaned

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INLINE_MAX = 3072  # bytes of a file that lies beside its inode: one read less, and no block that is mostly empty
INLINE_TOTAL = 256 << 20  # what may wait in memory for its inode's place
_WHITEOUT, _META, _OPAQUE = b".wh.", b".wh..wh.", b".wh..wh..opq"
_HIDDEN = b"/.wh."
_TYPES = {CHAR: stat.S_IFCHR, BLOCK: stat.S_IFBLK, FIFO: stat.S_IFIFO}


class Merger:
    """Takes layers in, one after the other; then ``tree`` is the file system and ``blocks`` has its data."""

    def __init__(self, blocks: Blocks, bounds: Bounds) -> None:
        self.tree = Tree(bounds.entries_left * 2)
        self.blocks = blocks
        self.entries = 0
        self._bounds = bounds
        self._inline_left = INLINE_TOTAL
        self._make: dict[str, Callable[[Entry, Reader, Node, bytes], None]] = {
            FILE: self._file,
            LINK: self._link,
            SYMLINK: self._symlink,
            DIRECTORY: self._directory,
            CHAR: self._special,
            BLOCK: self._special,
            FIFO: self._special,
        }

    def layer(self, source: Source) -> None:
        """Raises Bad, with the entry at hand."""
        self.tree.begin_layer()
        reader = Reader(source, self._bounds)
        try:
            for entry in reader:
                self.entries += 1
                self._apply(entry, reader)
        except Bad as bad:
            bad.entry = bad.entry or reader.name
            raise
        self._forget()

    def _forget(self) -> None:
        for node in self.tree.freed:
            if node.blocks == 0:
                self._inline_left += len(node.data or b"")
        self.blocks.free(self.tree.freed)
        self.tree.freed.clear()

    def _apply(self, entry: Entry, reader: Reader) -> None:
        path = cleaned(entry.name)
        head, _, name = path.rpartition(b"/")
        if name.startswith(_WHITEOUT) or _HIDDEN in path or path.startswith(_WHITEOUT):
            self._whiteout(path, head, name)
        elif name:
            parent = self.tree.directory(head, entry.mtime_s, entry.mtime_ns)
            self._make[entry.kind](entry, reader, parent, name)
        elif entry.kind is DIRECTORY:
            self._describe(self.tree.root, entry)
        else:
            raise Bad("bad-path", "the root is no directory")

    def _whiteout(self, path: bytes, head: bytes, name: bytes) -> None:
        """Remove what the name says.

        AUFS's own files (``.wh..wh.plnk``) are none of the image's. Other names like these mean removal, and nothing
        else: kept as files, they would be taken for that when the image is sent on.
        """
        if (b"/" + _META) in b"/" + (head if name == _OPAQUE else path):
            return
        removed = name[len(_WHITEOUT) :]
        if (
            not name.startswith(_WHITEOUT)
            or removed in (b"", b".", b"..")
            or head.startswith(_WHITEOUT)
            or _HIDDEN in head
        ):
            raise Bad("bad-path", "a name that is kept for whiteouts", path)
        parent = self.tree.lookup(head)
        if parent is None:
            return
        if name == _OPAQUE:
            self.tree.opaque(parent)
        else:
            self.tree.whiteout(parent, removed)

    # One for each kind

    def _node(self, entry: Entry, kind: int) -> Node:
        self.tree.count()
        return Node(
            kind | entry.mode, entry.uid, entry.gid, entry.mtime_s, entry.mtime_ns, entry.xattrs, self.tree.layer
        )

    def _file(self, entry: Entry, reader: Reader, parent: Node, name: bytes) -> None:
        node = self._node(entry, stat.S_IFREG)
        node.size = size = entry.size
        if entry.segments is not None and size:
            self._sparse(node, entry, reader)
        elif size <= INLINE_MAX and size <= self._inline_left:
            node.data = b"".join(reader.data(size))
            self._inline_left -= size
        else:
            node.start = self.blocks.append(reader.data(size), size)
            node.blocks = self.blocks.next - node.start
        self.tree.put(parent, name, node)

    def _sparse(self, node: Node, entry: Entry, reader: Reader) -> None:
        assert entry.segments is not None
        start, count, chunks = self.blocks.append_sparse(reader.data, entry.segments, entry.size)
        node.start, node.blocks = start, count
        whole = [(0, chunks.count, 0)]
        node.chunks = None if chunks.runs == whole else chunks

    def _directory(self, entry: Entry, _: Reader, parent: Node, name: bytes) -> None:
        assert parent.children is not None
        there = parent.children.get(name)
        if there is None or there.children is None:
            self.tree.new_directory(
                parent, name, entry.mode, entry.uid, entry.gid, entry.mtime_s, entry.mtime_ns, entry.xattrs
            )
        else:
            self._describe(there, entry)

    def _describe(self, node: Node, entry: Entry) -> None:
        """A directory that is listed again: new attributes, the same content."""
        node.mode = stat.S_IFDIR | entry.mode
        node.uid, node.gid = entry.uid, entry.gid
        node.mtime_s, node.mtime_ns = entry.mtime_s, entry.mtime_ns
        node.xattrs = entry.xattrs
        node.layer = self.tree.layer

    def _symlink(self, entry: Entry, _: Reader, parent: Node, name: bytes) -> None:
        target = entry.link
        if not target or len(target) >= PATH_MAX or b"\0" in target:
            raise Bad("bad-link", f"a symbolic link whose target has {len(target)} bytes, or a zero byte")
        node = self._node(entry, stat.S_IFLNK)
        node.mode = stat.S_IFLNK | 0o777  # as Linux makes them, whatever the archive says
        node.data, node.size = target, len(target)
        self.tree.put(parent, name, node)

    def _special(self, entry: Entry, _: Reader, parent: Node, name: bytes) -> None:
        node = self._node(entry, _TYPES[entry.kind])
        major, minor = entry.major, entry.minor
        node.rdev = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)  # new_encode_dev (linux/kdev_t.h)
        self.tree.put(parent, name, node)

    def _link(self, entry: Entry, _: Reader, parent: Node, name: bytes) -> None:
        """A name more for what is there already. A link to itself is how tar says that it was given a name twice."""
        assert parent.children is not None
        target = self._target(entry.link)
        there = parent.children.get(name)
        if target is not None and there is target:
            return
        if there is not None and there.children is not None:
            self.tree.remove(parent, name)
            target = self._target(entry.link)  # which may have been in there
        if target is None:
            raise Bad("bad-link", "a hard link to what is not there (yet)")
        if target.children is not None:
            raise Bad("bad-link", "a hard link to a directory")
        self.tree.count()
        self.tree.link(parent, name, target)

    def _target(self, link: bytes) -> Node | None:
        head, _, name = cleaned(link, "link").rpartition(b"/")
        if not name:
            return self.tree.root
        parent = self.tree.lookup(head)
        return parent.children.get(name) if parent is not None and parent.children is not None else None

    # The end

    def finish(self) -> None:
        """/dev becomes an empty directory, and the file is made as short as it can be.

        OCI runtimes have followed links that an image had placed in /dev (CVE-2025-52565), and every layer mounts its
        own over it.
        """
        root = self.tree.root
        assert root.children is not None
        there = root.children.get(b"dev")
        self.tree.begin_layer()
        if there is None or there.children is None:
            self.tree.new_directory(root, b"dev", 0o755, 0, 0, root.mtime_s, root.mtime_ns, b"")
        else:
            self.tree.opaque(there)
        self._forget()
        if self.blocks.has_gaps:
            self.blocks.compact(self.tree.files())
