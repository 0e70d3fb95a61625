"""Layers flattened, mounted, and compared entry by entry with what umoci unpacks of the same image.

Compared are kind, mode, owners, time, size, content, target, device, names of one file, and extended attributes. What
is not, and why: /dev, which is always empty here; the time of a directory that no archive lists, or in which such a one
was made (now, there; the entry's, here), and its set-group-ID bit, which umoci's disk hands down.
"""

from __future__ import annotations

import encodings
import gzip
import io
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, InvalidImage
from isolat.images import flatten
from isolat.images.flatten.pack import pack
from isolat.linux import mounts
from tests.support.layers import Archive, Described, blob, blobs, describe, digest, umoci

pytestmark = pytest.mark.root
IDS = (0, 1, 1000, 65534, 65535, 65536, 100_000, 1 << 31, (1 << 32) - 2)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep, version 2
ACL = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff")


@contextmanager
def mounted(file: Path) -> Iterator[Path]:
    target = file.with_name("mounted")
    target.mkdir()
    mounts.mount_erofs(str(file), str(target))
    try:
        yield target
    finally:
        mounts.umount(str(target))
        target.rmdir()


def check(file: Path) -> None:
    """fsck.erofs is content, and a virtio disk can be made of it."""
    done = subprocess.run(["fsck.erofs", str(file)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and "Error" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert file.stat().st_size % 4096 == 0


def flattened(tmp_path: Path, archives: Sequence[bytes]) -> dict[bytes, Described]:
    out = tmp_path / "out.erofs"
    result = flatten.flatten(blobs(tmp_path / "blobs", archives), out, Deadline(300))
    assert result.size_bytes == out.stat().st_size
    assert result.diff_ids == tuple(digest(archive) for archive in archives)
    check(out)
    with mounted(out) as target:
        found = describe(target)
    # one more for the root, less those that share a file
    assert result.entries == len(found) - sum(1 for path, it in found.items() if it.same not in (b"", path))
    return found


def difference(
    ours: dict[bytes, Described], theirs: dict[bytes, Described], started_ns: int
) -> dict[bytes, tuple[Described | None, Described | None]]:
    found = {}
    for path in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(path), theirs.get(path)
        if here != there and path != b"dev" and not _of_umocis_making(here, there, started_ns):
            found[path] = (here, there)
    return found


def _of_umocis_making(here: Described | None, there: Described | None, started_ns: int) -> bool:
    if here is None or there is None or here.kind != "d" or there.mtime_ns < started_ns:
        return False
    return here.mode in (there.mode, there.mode & ~0o2000) and (here.uid, here.xattrs) == (there.uid, there.xattrs)


def same_as_umoci(tmp_path: Path, archives: Sequence[Archive | bytes]) -> dict[bytes, Described]:
    """Flatten and compare; what is in it."""
    raw = [item if isinstance(item, bytes) else item.bytes() for item in archives]
    ours = flattened(tmp_path, raw)
    started_ns = time.time_ns() - 1_000_000_000
    unpacked, error = umoci(tmp_path, raw)
    assert not error, error
    assert difference(ours, describe(unpacked), started_ns) == {}
    return ours


def base() -> Archive:
    """A bit of everything, to put layers on."""
    archive = Archive().directory(b"./", mode=0o755, mtime=(1_500_000_000, 7))
    for name in (b"etc", b"usr", b"usr/bin", b"usr/lib", b"var", b"var/lib"):
        archive.directory(b"./" + name + b"/")
    for n in range(20):
        archive.add(b"./usr/lib/f%d" % n, data=(b"%d" % n) * (n * 997), mtime=(1_600_000_000 + n, n * 1001))
        archive.add(b"./var/lib/g%d" % n, data=b"x" * n, mode=0o600 + n)
    return archive.symlink(b"./bin", b"usr/bin").symlink(b"./lib", b"/usr/lib").add(b"./etc/hosts", data=b"localhost")


def test_whiteouts_and_opaque_directories_at_all_levels(tmp_path: Path) -> None:
    second = Archive().add(b"usr/lib/.wh.f3").add(b".wh.etc").add(b"var/.wh..wh..opq").add(b"var/new/x", data=b"1")
    second.directory(b"usr/lib/d").add(b"usr/lib/d/deep/file", data=b"y" * 5000)
    third = Archive().add(b"usr/lib/d/.wh.deep").add(b"usr/lib/d/deep", data=b"now a file").add(b"usr/lib/f3")
    third.add(b"var/new/.wh.x").directory(b"etc").add(b"etc/.wh..wh..opq").add(b"usr/lib/.wh.f4").add(b"usr/lib/f4")
    found = same_as_umoci(tmp_path, [base(), second, third])
    assert b"etc/hosts" not in found and b"var/lib" not in found and found[b"usr/lib/d/deep"].size == 10


def test_hard_links_within_and_across_layers(tmp_path: Path) -> None:
    first = base().link(b"usr/bin/one", b"usr/lib/f9").link(b"usr/bin/two", b"./usr/bin/one").link(b"s2", b"bin")
    second = Archive().link(b"var/three", b"usr/lib/f9").link(b"four", b"lib/f9").add(b"usr/lib/.wh.f9")
    third = Archive().link(b"five", b"usr/bin/two").add(b"usr/bin/one", data=b"apart now")
    found = same_as_umoci(tmp_path, [first, second, third])
    assert found[b"five"].links == 4 and found[b"five"].same == found[b"var/three"].same


def test_owners_modes_times_and_attributes(tmp_path: Path) -> None:
    archive = Archive()
    for n, uid in enumerate(IDS):
        for m, mode in enumerate((0o000, 0o644, 0o4755, 0o2711, 0o1777)):
            time_of = (n * 400_000_000 + 1, (m * 123_456_789) % 1_000_000_000)
            archive.add(b"f%d.%d" % (n, m), data=b"x", mode=mode, uid=uid, gid=IDS[-n - 1], mtime=time_of)
        archive.directory(b"d%d" % n, mode=0o2750, uid=uid, gid=7, mtime=(1, 999_999_999))
    archive.add(b"ping", data=b"#!", mode=0o755, xattrs={b"security.capability": CAPABILITY})
    archive.add(b"acl", mode=0o664, xattrs={b"system.posix_acl_access": ACL, b"user." + b"n" * 200: b"\0\xff="})
    archive.directory(b"acls", xattrs={b"system.posix_acl_default": ACL, b"trusted.t": b"v" * 900})
    archive.add(b"many", data=b"z" * 3000, xattrs={b"user.%d" % n: b"v" * 40 for n in range(40)})
    archive.symlink(b"old", b"x")
    same_as_umoci(tmp_path, [archive])


def test_overlays_own_attributes_are_left_out(tmp_path: Path) -> None:
    """An attribute without a value is kept, too, which umoci can't: Go's reader takes it for none."""
    marks = {b"trusted.overlay.opaque": b"y", b"user.overlay.redirect": b"/etc", b"user.kept": b"1", b"user.empty": b""}
    found = flattened(tmp_path, [Archive().directory(b"d", xattrs=marks).bytes()])
    assert found[b"d"].xattrs == (("user.empty", b""), ("user.kept", b"1"))


def test_odd_long_and_deep_names(tmp_path: Path) -> None:
    archive = Archive()
    for name in (
        b"\xff\xfe",
        b"new\nline",
        b" ",
        b"  x ",
        b"-rf",
        b"!",
        b"...",
        b"\\",
        b"\x01\x7f",
        "ä/ö".encode(),
        b"%s",
    ):
        archive.add(name, data=name)
        archive.symlink(name + b".link", name)
    archive.add(b"n" * 255, data=b"1").add(b"d" * 200 + b"/" + b"e" * 255).symlink(b"long", b"t/" * 2000 + b"t")
    archive.symlink(b"longer", b"t" * 4000).symlink(b"middle", b"t" * 300)
    archive.add(b"/".join([b"deep"] * 300) + b"/file", data=b"at the bottom")
    same_as_umoci(tmp_path, [archive])


def test_devices_and_fifos(tmp_path: Path) -> None:
    archive = Archive().add(b"null", "char", device=(1, 3), mode=0o666).add(b"disk", "block", device=(259, 300_000))
    archive.add(b"pipe", "fifo", mode=0o600, uid=70_000).link(b"null2", b"null").add(b"most", "char", device=(4095, 1))
    same_as_umoci(tmp_path, [archive])


@pytest.mark.parametrize("bytes", [0, 1, 100, 3071, 3072, 3073, 4032, 4095, 4096, 4097, 8192, 12_287, 1_000_000])
def test_files_of_every_size_lie_right(tmp_path: Path, bytes: int) -> None:
    archive = Archive()
    for n in range(5):
        archive.add(b"f%d" % n, data=os.urandom(bytes), xattrs={b"user.x": b"y" * 50 * n} if n else None)
    same_as_umoci(tmp_path, [archive])


def test_directories_of_every_size(tmp_path: Path) -> None:
    archive = Archive()
    for count in (0, 1, 100, 160, 200, 333, 3000):
        archive.directory(b"d%d" % count)
        for n in range(count):
            archive.add(b"d%d/%0*d" % (count, 1 + n % 40, n), data=b"x" * (n % 7))
    same_as_umoci(tmp_path, [archive])


@pytest.mark.parametrize("kind", ["gnu", "posix-0.0", "posix-0.1", "posix-1.0"])
def test_sparse_files_stay_sparse(tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    wanted = {
        "empty": ([], 100 << 20),
        "start": ([(0, 5000)], 10 << 20),
        "end": ([((50 << 20) - 3, 3)], 50 << 20),
        "many": ([(n * 100_000, 700 + n) for n in range(60)], 7 << 20),
        "far": ([(3 << 30, 4096), (1 << 36, 10)], (1 << 36) + 10),
        "dense": ([(0, 65536)], 65536),
    }
    for name, (pieces, size) in wanted.items():
        with (tree / name).open("wb") as stream:
            stream.truncate(size)
            for offset, length in pieces:
                stream.seek(offset)
                stream.write(os.urandom(length))
    format, _, version = kind.partition("-")
    argv = ["tar", "-C", str(tree), "-cf", str(tmp_path / "a.tar"), f"--format={format}", "--sparse"]
    subprocess.run([*argv, *([f"--sparse-version={version}"] if version else []), "."], check=True)
    out = tmp_path / "out.erofs"
    result = flatten.flatten(blobs(tmp_path / "blobs", [(tmp_path / "a.tar").read_bytes()]), out, Deadline(60))
    check(out)
    assert out.stat().st_blocks * 512 < 4 << 20 and result.content_bytes < 64 << 20
    with mounted(out) as target:
        for name, (pieces, size) in wanted.items():
            assert (target / name).stat().st_size == size
            with (target / name).open("rb") as there, (tree / name).open("rb") as here:
                for offset, length in [*pieces, (0, 100_000), (size // 2, 100_000), (max(0, size - 100_000), 100_000)]:
                    assert os.pread(there.fileno(), length, offset) == os.pread(here.fileno(), length, offset)


def test_a_hundred_layers(tmp_path: Path) -> None:
    layers = [base()]
    for n in range(99):
        layer = Archive().directory(b"var/lib").add(b"var/lib/g%d" % (n % 20), data=os.urandom(n * 90))
        if n % 7 == 0:
            layer.add(b"usr/lib/.wh.f%d" % (n % 20))
        if n % 13 == 0:
            layer.add(b"var/.wh..wh..opq")
        layers.append(layer.add(b"bin/tool%d" % (n % 9), data=b"#!" * n))
    same_as_umoci(tmp_path, layers)


def tree_of_many(count: int) -> Archive:
    archive = Archive()
    for n in range(count):
        if n % 50 == 0:
            archive.directory(b"m/%d" % (n // 50))
        archive.add(b"m/%d/file-%d" % (n // 50, n), data=b"%d" % n * (n % 1500), uid=n % 70_000, mtime=(n, n))
    return archive


@pytest.mark.parametrize("count", [2_000, pytest.param(200_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_many_files(tmp_path: Path, count: int) -> None:
    same_as_umoci(tmp_path, [tree_of_many(count)])


def test_a_real_tree(tmp_path: Path) -> None:
    """Some hundred files of this machine, as GNU tar archives them."""
    archive = tmp_path / "real.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as stream:
        stream.add("/etc", "etc", filter=lambda info: None if "passwd-" in info.name else info)
        stream.add(Path(encodings.__file__).parent, "usr/lib/encodings")
    same_as_umoci(tmp_path, [archive.read_bytes(), Archive().add(b"usr/lib/.wh.encodings").add(b"etc/hostname")])


NAMES = (b"a", b"b", b"c", b"d")


def some_path(chance: random.Random, depth: int = 3) -> bytes:
    return b"/".join(chance.choice(NAMES) for _ in range(chance.randint(1, depth)))


def some_layer(chance: random.Random) -> Archive:
    """Whatever may be in a layer, on few names, so that everything meets everything."""
    archive, made = Archive(), [some_path(chance)]
    for _ in range(chance.randint(1, 6)):
        path = some_path(chance)
        mtime = (chance.randint(0, 1 << 31), chance.choice((0, 123_456_789)))
        owner: dict[str, Any] = {"uid": chance.choice(IDS), "mtime": mtime}
        match chance.choice("ffffddddddddddsslwwwo"):
            case "f":
                archive.add(path, data=chance.randbytes(chance.choice((0, 10, 5000))), mode=0o4755, **owner)
                made.append(path)
            case "d":
                archive.directory(path + chance.choice((b"", b"/")), mode=chance.choice((0o755, 0o2700)), **owner)
            case "s":
                start = chance.choice((b"", b"/", b"../", b"x/../"))
                archive.symlink(path, start + some_path(chance, 2))
            case "l":
                archive.link(path, made[-1])
            case "w":
                head, slash, name = path.rpartition(b"/")
                archive.add(head + slash + b".wh." + name)
            case "o":
                archive.add(path + b"/.wh..wh..opq")
    return archive


# What umoci refuses and this takes: see docs/images.md
ALLOWED = ("not a directory", "link: no such file or directory")


@pytest.mark.parametrize("count", [40, pytest.param(1500, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_random_layers_mean_what_they_mean_to_umoci(tmp_path: Path, count: int) -> None:
    compared = 0
    for seed in range(count):
        chance = random.Random(seed)
        raw = [some_layer(chance).bytes() for _ in range(chance.randint(1, 4))]
        place = tmp_path / str(seed)
        place.mkdir()
        started_ns = time.time_ns() - 1_000_000_000
        unpacked, error = umoci(place, raw)
        try:
            ours = flattened(place, raw)
        except InvalidImage as refused:
            assert error, f"seed {seed}: {refused.message}"
            continue
        if error:
            assert any(words in error for words in ALLOWED), f"seed {seed}: {error}"
            continue
        assert difference(ours, describe(unpacked), started_ns) == {}, f"seed {seed}"
        compared += 1
    assert compared > count // 3


def test_the_same_layers_give_the_same_bytes_whatever_their_compression(tmp_path: Path) -> None:
    archives = [base().bytes(), Archive().add(b"etc/.wh.hosts").add(b"usr/lib/f19", data=b"x").bytes()]
    (tmp_path / "b").mkdir()
    skipped = b"\x50\x2a\x4d\x18\4\0\0\0skip"
    forms: dict[str, Callable[[bytes], bytes]] = {
        "plain": lambda data: data,
        "gzip": lambda data: gzip.compress(data, mtime=5),
        "members": lambda data: gzip.compress(data[:700]) + gzip.compress(b"") + gzip.compress(data[700:]),
        "zstd": zstandard.compress,
        "frames": lambda data: zstandard.compress(data[:700]) + skipped + zstandard.compress(data[700:]),
    }
    made = set()
    for name, form in forms.items():
        out = tmp_path / name
        layers = [blob(tmp_path / "b", archive, form(archive), "") for archive in archives]
        result = flatten.flatten(layers, out, Deadline(60))
        assert result.diff_ids == tuple(map(digest, archives))
        made.add(out.read_bytes())
    assert len(made) == 1


def test_what_is_packed_again_is_the_same_again(tmp_path: Path) -> None:
    """From an image to a layer, as commit and push do it, and back."""
    archive = base().add(b"ping", mode=0o4755, uid=70_000, xattrs={b"security.capability": CAPABILITY, b"user.a": b"b"})
    archive.add(b"n" * 200, data=b"x", mtime=(1, 999_999_999)).link(b"etc/other", b"ping").add(b"p", "fifo")
    archive.add(b"null", "char", device=(1, 3)).add(b"\xff\n", data=b"y" * 5000, gid=(1 << 32) - 2)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    before = flattened(tmp_path / "first", [archive.bytes()])
    stream = io.BytesIO()
    with mounted(tmp_path / "first/out.erofs") as target:
        diff_id = pack(target, stream)
    assert diff_id == digest(stream.getvalue())
    assert flattened(tmp_path / "second", [stream.getvalue()]) == before


def test_progress_is_told_and_never_goes_back(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    layer = blobs(tmp_path / "b", [Archive().add(b"f", data=os.urandom(20 << 20))])
    started = time.monotonic()
    flatten.flatten(layer, tmp_path / "out", Deadline(60), progress=lambda _, done, total: told.append((done, total)))
    assert len(told) <= 10 * (time.monotonic() - started) + 3
    assert told == sorted(told) and {total for _, total in told} == {layer[0].size_bytes} and told[-1][0] == told[-1][1]


def test_a_deadline_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    layer = blobs(tmp_path / "b", [tree_of_many(20_000)])
    (tmp_path / "o").mkdir()
    with pytest.raises(DeadlineExceeded):
        flatten.flatten(layer, tmp_path / "o/out", Deadline(0.1))
    assert list((tmp_path / "o").iterdir()) == []
