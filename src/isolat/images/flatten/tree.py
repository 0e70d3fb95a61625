"""The file system that the layers add up to, as data in memory.

Nothing here touches a file. A path is resolved by walking nodes; a symbolic link is followed only in the middle of a
path and never leaves the root, which is what umoci's SecureJoin does on a real directory
(github.com/cyphar/filepath-securejoin): ``..`` at the root stays there, an absolute target starts at the root, and what
does not exist is followed by its words.
"""

from __future__ import annotations

import stat

from isolat.images.flatten.bad import Bad

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from isolat.images.flatten.blocks import Chunks

NAME_MAX = 255  # EROFS_NAME_LEN
PATH_MAX = 4096  # linux/limits.h
DEPTH_MAX = 2048
_LINKS_MAX = 255  # as SecureJoin; the kernel gives up after 40
_STEPS_MAX = 16_384  # parts of one way, those of links counted


class Node:
    """One inode. A directory has ``children`` and one ``parent``; anything else may have several names (``nlink``).

    ``layer`` is the last layer that made it or, of a directory, put something into it: whiteouts spare those.
    The content is ``data`` (small files, targets of symbolic links) or ``blocks`` blocks from ``start`` on.
    """

    __slots__ = (
        "blocks", "children", "chunks", "data", "depth", "gid", "layer", "mode", "mtime_ns", "mtime_s", "nid", "nlink",
        "parent", "rdev", "size", "start", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, mode: int, uid: int, gid: int, mtime_s: int, mtime_ns: int, xattrs: bytes, layer: int) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_s = mtime_s
        self.mtime_ns = mtime_ns
        self.xattrs = xattrs
        self.layer = layer
        self.children: dict[bytes, Node] | None = None
        self.parent: Node | None = None
        self.depth = 0
        self.nlink = 1
        self.size = 0
        self.rdev = 0
        self.data: bytes | None = None
        self.start = self.blocks = 0
        self.chunks: Chunks | None = None
        self.nid = -1


def cleaned(path: bytes, what: str = "path") -> bytes:
    """The path as seen from the root, by its words alone: no ``.``, no ``..``, no empty part. Raises Bad (bad-path)."""
    if b"\0" in path:
        raise Bad("bad-path", f"a {what} with a zero byte in it", path)
    if len(path) > PATH_MAX:
        raise Bad("bad-path", f"a {what} of {len(path)} bytes; at most {PATH_MAX} are allowed", path)
    if path[:2] == b"./":
        path = path[2:]
    path = path.rstrip(b"/")
    edged = b"/%b/" % path
    if b"//" not in edged and b"/./" not in edged and b"/../" not in edged:
        return path
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


class Tree:
    """``made`` counts the nodes that were ever made; more than ``most`` is refused (too-many-entries)."""

    def __init__(self, most: int) -> None:
        self.root = Node(stat.S_IFDIR | 0o755, 0, 0, 0, 0, b"", 0)
        self.root.children = {}
        self.layer = 0
        self.freed: list[Node] = []  # what lost its last name and had data
        self._most = most
        self._made = 0
        self._found: dict[bytes, Node] = {}  # directories by clean path, until something on such a way is removed
        self._linked: set[tuple[int, bytes]] = set()  # names that are hard links of this layer

    def begin_layer(self) -> None:
        self.layer += 1
        self._found.clear()
        self._linked.clear()

    def count(self) -> None:
        self._made += 1
        if self._made > self._most:
            raise Bad("too-many-entries", f"the layers make more than {self._most} files and directories")

    # Ways

    def directory(self, path: bytes, mtime_s: int, mtime_ns: int) -> Node:
        """The directory at a clean path, made with its parents where it is missing. Raises Bad (bad-path, bad-link)."""
        found = self._found.get(path)
        if found is None:
            found = self._make(self._resolve(path), mtime_s, mtime_ns)
            self._found[path] = found
        self._touch(found)
        return found

    def lookup(self, path: bytes) -> Node | None:
        """The directory at a clean path, or None."""
        found = self._found.get(path)
        if found is not None:
            return found
        node, names = self.root, self._resolve(path)
        for name in names:
            child = node.children.get(name) if node.children is not None else None
            if child is None:
                return None
            node = child
        return node if node.children is not None else None

    def _resolve(self, path: bytes) -> list[bytes]:
        """The names from the root to where ``path`` leads, every symbolic link followed; the end need not exist."""
        names: list[bytes] = []
        nodes: list[Node | None] = [self.root]
        todo = path.split(b"/")[::-1] if path else []
        links = steps = 0
        while todo:
            part = todo.pop()
            steps += 1
            if part in (b"", b"."):
                continue
            if part == b"..":
                if names:
                    names.pop()
                    nodes.pop()
                continue
            here = nodes[-1]
            child = here.children.get(part) if here is not None and here.children is not None else None
            if child is not None and stat.S_ISLNK(child.mode):
                links += 1
                if links > _LINKS_MAX or steps > _STEPS_MAX:
                    raise Bad("bad-link", "symbolic links lead in a circle, or too far", path)
                target = child.data or b""
                if target[:1] == b"/":
                    names.clear()
                    del nodes[1:]
                todo += target.split(b"/")[::-1]
                continue
            names.append(part)
            nodes.append(child)
        return names

    def _make(self, names: list[bytes], mtime_s: int, mtime_ns: int) -> Node:
        """Walk down, making what is missing. A lower layer's file in the way gives way, as it does for an overlay."""
        node = self.root
        for name in names:
            assert node.children is not None
            child = node.children.get(name)
            if child is not None and child.children is None:
                if self.touched(node, name, child):
                    raise Bad(
                        "bad-path", "an entry lies below one of the same layer that is no directory", b"/".join(names)
                    )
                self.remove(node, name)
                child = None
            if child is None:
                child = self.new_directory(node, name, 0o755, 0, 0, mtime_s, mtime_ns, b"")
            node = child
        return node

    def _touch(self, node: Node | None) -> None:
        """Mark a directory as this layer's, and all above it: who is marked has only marked ones above."""
        while node is not None and node.layer != self.layer:
            node.layer = self.layer
            node = node.parent

    # Changes

    def new_directory(
        self, parent: Node, name: bytes, mode: int, uid: int, gid: int, mtime_s: int, mtime_ns: int, xattrs: bytes
    ) -> Node:
        self.count()
        self._touch(parent)
        node = Node(stat.S_IFDIR | mode, uid, gid, mtime_s, mtime_ns, xattrs, self.layer)
        node.children = {}
        node.parent = parent
        node.depth = parent.depth + 1
        if node.depth > DEPTH_MAX:
            raise Bad("bad-path", f"directories more than {DEPTH_MAX} deep", name)
        self.put(parent, name, node)
        return node

    def put(self, parent: Node, name: bytes, node: Node) -> None:
        """Give ``node`` the name; whatever had it is gone."""
        if len(name) > NAME_MAX:
            raise Bad("bad-path", f"a name of {len(name)} bytes; at most {NAME_MAX} are allowed", name)
        assert parent.children is not None
        if name in parent.children:
            self.remove(parent, name)
        parent.children[name] = node

    def link(self, parent: Node, name: bytes, node: Node) -> None:
        """Another name for what is no directory."""
        node.nlink += 1
        self.put(parent, name, node)
        self._linked.add((id(parent), name))

    def remove(self, parent: Node, name: bytes) -> None:
        """Take a name away, with all that is below it."""
        assert parent.children is not None
        node = parent.children.pop(name)
        if node.children is not None or stat.S_ISLNK(node.mode):
            self._found.clear()  # it may have been part of a way
        stack = [node]
        while stack:
            node = stack.pop()
            if node.children is not None:
                stack += node.children.values()
                node.children = {}
                continue
            node.nlink -= 1
            if node.nlink == 0:
                self.freed.append(node)

    def touched(self, parent: Node, name: bytes, node: Node) -> bool:
        """Whether this layer made this name, or put something below it."""
        return node.layer == self.layer or (id(parent), name) in self._linked

    def whiteout(self, parent: Node, name: bytes) -> None:
        """Take a name of the lower layers away; what this layer itself put there or below it stays."""
        assert parent.children is not None
        node = parent.children.get(name)
        if node is None:
            return
        if not self.touched(parent, name, node):
            self.remove(parent, name)
        elif node.children is not None:
            self.opaque(node)

    def opaque(self, directory: Node) -> None:
        """Take away all that the lower layers have in a directory."""
        stack = [directory]
        while stack:
            node = stack.pop()
            assert node.children is not None
            for name, child in list(node.children.items()):
                if not self.touched(node, name, child):
                    self.remove(node, name)
                elif child.children is not None:
                    stack.append(child)

    def files(self) -> set[Node]:
        """Everything but the root, each once."""
        found: set[Node] = set()
        for node, _ in self.directories():
            assert node.children is not None
            found.update(node.children.values())
        return found

    def directories(self) -> Iterator[tuple[Node, list[bytes]]]:
        """Every directory before those in it, with its names in order."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            assert node.children is not None
            names = sorted(node.children)
            yield node, names
            stack += [child for name in reversed(names) if (child := node.children[name]).children is not None]
