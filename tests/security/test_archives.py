"""Layers that mean harm: each is refused by name, or becomes a sound EROFS; nothing else is touched, nothing is left.

The attacks are those of this field's holes: paths and links that lead out, numbers that lie, bombs, archives that end
early, names that mean something to somebody. After them comes what nobody thinks of: mutations, with right sums so that
they get far.
"""

from __future__ import annotations

import gzip
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from isolat.deadline import Deadline
from isolat.errors import InvalidImage, StoreError
from isolat.images import flatten
from isolat.images.flatten import Limits
from isolat.linux import mounts
from tests.support.layers import BLOCK, Archive, blob, blobs, extended, header, octal, padded

pytestmark = pytest.mark.root
SMALL = Limits(total_bytes=16 << 20, entries=2000, file_bytes=1 << 30, memory_bytes=512 << 20, cpu_s=20)
SOURCE = Path(__file__).resolve().parents[2] / "src"


def workers() -> set[int]:
    """The confined processes of this one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes()
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if b"flatten.worker" in words and parent == os.getpid():
                found.add(int(path.name))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where it all happens; afterwards there is nothing that was not put there, and no process."""
    (tmp_path / "out").mkdir()
    (tmp_path / "blobs").mkdir()
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    before = canary.stat().st_mtime_ns
    yield tmp_path
    assert canary.read_text() == "untouched" and canary.stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "blobs", "canary", "mounted"}
    assert workers() == set()


def flattened(place: Path, *layers: flatten.LayerBlob, limits: Limits = SMALL) -> flatten.Flattened:
    return flatten.flatten(layers, place / "out/image", Deadline(60), limits)


def refused(place: Path, *layers: flatten.LayerBlob, limits: Limits = SMALL) -> InvalidImage:
    with pytest.raises(InvalidImage) as found:
        flattened(place, *layers, limits=limits)
    assert list((place / "out").iterdir()) == []
    error = found.value
    assert error.hint and error.stage and error.message.isprintable()
    return error


def refused_archive(place: Path, archive: Archive | bytes, limits: Limits = SMALL) -> InvalidImage:
    return refused(place, *blobs(place / "blobs", [archive]), limits=limits)


def pax(values: dict[bytes, bytes], name: bytes = b"f", size: int = 0) -> bytes:
    return extended(values) + header(name, size=size)


def with_size(size: int) -> bytes:
    block = header(b"f")
    block = block[:124] + octal(size, 12) + block[136:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


HOSTILE: dict[str, tuple[Archive | bytes, str]] = {
    "a negative size": (with_size(-1), "bad-size"),
    "a huge size": (with_size(1 << 70), "too-large"),
    "a size without data": (with_size(100_000), "truncated"),
    "a terabyte in PAX": (pax({b"size": b"1099511627776"}), "too-large"),
    "a size of 30 digits": (pax({b"size": b"9" * 30}), "bad-header"),
    "sparse, a terabyte": (
        pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"1099511627776"}, size=512)
        + padded(b"0\n"),
        "too-large",
    ),
    "sparse, overlapping": (
        pax({b"GNU.sparse.size": b"10000", b"GNU.sparse.map": b"0,512,100,512"}, size=1024) + bytes(1024), "bad-size"
    ),
    "sparse, over the edge": (
        pax({b"GNU.sparse.size": b"10000", b"GNU.sparse.map": b"9223372036854775807,512"}, size=512) + bytes(512),
        "bad-size",
    ),
    "sparse, a map of millions": (
        pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"100"}, size=5120)
        + padded(b"99999999\n").ljust(5120, b"0"),
        "bad-size",
    ),
    "a hard link out": (Archive().link(b"f", b"../../../../../../etc/passwd"), "bad-link"),
    "a hard link to an absolute path": (Archive().link(b"f", b"/etc/shadow"), "bad-link"),
    "a hard link to a directory": (Archive().directory(b"d").link(b"f", b"d"), "bad-link"),
    "a hard link to the root": (Archive().link(b"f", b"."), "bad-link"),
    "a hard link to what comes later": (Archive().link(b"f", b"g").add(b"g"), "bad-link"),
    "links in a circle": (Archive().symlink(b"a", b"b").symlink(b"b", b"a").add(b"a/f"), "bad-link"),
    "the root a link": (Archive().symlink(b"./", b"/etc"), "bad-path"),
    "a name with a zero byte": (pax({b"path": b"a\0b"}), "bad-path"),
    "a link with a zero byte": (extended({b"linkpath": b"a\0b"}) + header(b"f", b"2"), "bad-link"),
    "a name of 256 bytes": (Archive().add(b"n" * 256), "bad-path"),
    "a path of 5000 bytes": (Archive().add(b"n/" * 2500), "bad-path"),
    "more directories than allowed": (
        Archive().directory(b"d/" * 2000).directory(b"e/" * 2000 + b"f/g"), "too-many-entries"
    ),
    "a file below a file": (Archive().add(b"f").add(b"f/g"), "bad-path"),
    "removing the parent": (Archive().add(b"d/.wh..."), "bad-path"),
    "removing the directory itself": (Archive().add(b"d/.wh.."), "bad-path"),
    "removing nothing": (Archive().add(b".wh."), "bad-path"),
    "a whiteout as a directory": (Archive().add(b".wh.../x"), "bad-path"),
    "too many entries": (Archive().raw(header(b"f") * 2001), "too-many-entries"),
    "too many extended headers": (Archive().raw(extended({b"a": b"b"}) * 2001), "too-many-entries"),
    "an extended header of 2 MiB": (extended({b"comment": bytes(2 << 20)}), "too-large"),
    "an attribute of 70,000 bytes": (Archive().add(b"f", xattrs={b"user.a": bytes(70_000)}), "too-large"),
    "attributes of 200,000 bytes": (
        Archive().add(b"f", xattrs={b"user.%d" % n: bytes(10_000) for n in range(20)}), "too-large"
    ),
    "an entry of no type": (header(b"f", b"Z"), "bad-header"),
    "a wrong sum": (header(b"f", sum=b"000000\0 "), "bad-header"),
    "an uid beyond 32 bits": (header(b"f", uid=octal(1 << 32, 8)), "bad-header"),
    "a device beyond the kernel's": (Archive().add(b"f", "char", device=(4096, 0)), "bad-header"),
    "no archive at all": (b"\x7fELF" + bytes(2000), "bad-header"),
    "a zip": (b"PK\x03\x04" + bytes(2000), "bad-compression"),
    "an xz": (b"\xfd7zXZ\0" + bytes(2000), "bad-compression"),
    "a terminal's own language": (Archive().link(b"\x1b]0;x\x07\x1b[2J", b"nowhere"), "bad-link"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_by_name(place: Path, name: str) -> None:
    archive, stage = HOSTILE[name]
    error = refused_archive(place, archive)
    assert error.stage == stage, error.message


def test_paths_that_lead_out_lead_nowhere(place: Path) -> None:
    """As by umoci and containerd: seen from the root, whatever they say. Nothing of the host is opened."""
    canary = os.fsencode(place / "canary")
    archive = Archive().add(b"../" * 30 + canary[1:], data=b"owned").add(canary, data=b"owned")
    archive.symlink(b"way", b"../" * 30).add(b"way" + canary, data=b"owned").symlink(b"abs", os.fsencode(place))
    archive.add(b"abs/canary", data=b"owned").add(b"abs/.wh.canary").directory(b"..", mode=0o777)
    assert flattened(place, *blobs(place / "blobs", [archive])).entries > 0


def compressed_bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(header(b"f", size=megabytes << 20))]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(megabytes)]
    return b"".join(parts) + packer.flush()


def test_bombs_are_stopped_at_the_limit(place: Path) -> None:
    gz = compressed_bomb(600)
    zstd = zstandard.compress(header(b"f", size=600 << 20) + bytes(600 << 20))
    assert len(gz) < 1 << 20 and len(zstd) < 1 << 20
    for packed in (gz, zstd, gzip.compress(gz)):
        started = time.monotonic()
        error = refused(place, blob(place / "blobs", b"", packed, ""))
        assert error.stage in ("too-large", "bad-header") and time.monotonic() - started < 20


def test_many_layers_together_stay_within_the_limit(place: Path) -> None:
    layers = [Archive().add(b"f", data=os.urandom(3 << 20)) for _ in range(8)]
    assert refused(place, *blobs(place / "blobs", layers)).stage == "too-large"


def test_what_is_not_what_its_digest_says_is_refused(place: Path) -> None:
    good = blobs(place / "blobs", [Archive().add(b"f", data=b"x" * 10_000)])[0]
    zeros = "sha256:" + "0" * 64
    assert refused(place, replace(good, digest=zeros)).stage == "digest-mismatch"
    assert refused(place, replace(good, diff_id=zeros)).stage == "digest-mismatch"
    assert refused(place, replace(good, size_bytes=5)).stage == "size-mismatch"
    data = bytearray(gzip.compress(good.path.read_bytes()))
    packed = blob(place / "blobs", good.path.read_bytes(), bytes(data))
    for at in (0, 5, len(data) // 2, len(data) - 6):  # whatever the damage looks like further on
        data[at] ^= 0xFF
        packed.path.write_bytes(data)
        assert refused(place, packed).stage in ("digest-mismatch", "bad-compression" if at == 0 else "digest-mismatch")
        data[at] ^= 0xFF


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress])
def test_what_ends_early_is_refused(place: Path, pack: Callable[[bytes], bytes]) -> None:
    archive = Archive().add(b"a", data=os.urandom(100_000)).add(b"b", data=os.urandom(100_000)).bytes()
    whole = pack(archive)
    for end in (len(whole) // 3, len(whole) // 2, 1000, 100):
        assert refused(place, blob(place / "blobs", b"", whole[:end], "")).stage == "truncated"


def test_what_follows_a_gzip_is_no_layer(place: Path) -> None:
    packed = gzip.compress(Archive().add(b"f").bytes()) + b"rubbish" * 100
    assert refused(place, blob(place / "blobs", b"", packed, "")).stage == "bad-compression"


def test_a_full_disk_is_this_machines_fault_and_leaves_nothing(place: Path) -> None:
    """More than the disk has beside what is kept free of it."""
    disk = place / "mounted"
    disk.mkdir()
    mounts.mount("tmpfs", str(disk), "tmpfs", 0, "size=80m")
    try:
        layer = blob(place / "blobs", Archive().add(b"f", data=os.urandom(20 << 20)).bytes())
        with pytest.raises(StoreError) as found:
            flatten.flatten([layer], disk / "image", Deadline(60), Limits())
        assert found.value.stage == "no-space" and not isinstance(found.value, InvalidImage)
        assert list(disk.iterdir()) == []
    finally:
        mounts.umount(str(disk))


def test_a_flood_of_attributes_meets_the_memorys_limit(place: Path) -> None:
    """Each entry is within its bounds; together they would fill the machine."""
    one = Archive().add(b"f", xattrs={b"user.%d" % n: bytes(60_000) for n in range(2)})
    archive = Archive()
    for n in range(1500):
        archive.raw(one.parts[0], header(b"f%d" % n))
    packed = gzip.compress(archive.bytes(), 1)
    limits = replace(SMALL, total_bytes=1 << 30, entries=10_000, memory_bytes=150 << 20)
    assert refused(place, blob(place / "blobs", b"", packed, ""), limits=limits).stage == "too-large"


def test_a_flood_of_work_meets_the_processors_limit(place: Path) -> None:
    """Each name leads through thousands of parts of links; none is too long, and together they take minutes."""
    archive = Archive().symlink(b"l", b"x/../" * 800 + b"d").directory(b"d").symlink(b"d/m", b"/l/../l/../l/../l/../l")
    for n in range(60_000):
        archive.add(b"d/m/%d/.wh.x" % n)
    packed = gzip.compress(archive.bytes(), 1)
    limits = replace(SMALL, total_bytes=1 << 30, entries=100_000, cpu_s=1)
    assert refused(place, blob(place / "blobs", b"", packed, ""), limits=limits).stage == "too-slow"


def test_a_blob_that_is_no_file_is_not_opened(place: Path) -> None:
    os.mkfifo(place / "blobs/fifo")
    (place / "blobs/link").symlink_to("/etc/passwd")
    for name in ("fifo", "link", "nothing", "."):
        layer = flatten.LayerBlob(place / "blobs" / name, "sha256:" + "0" * 64, "", 0)
        with pytest.raises(StoreError):
            flattened(place, layer)


# The processes themselves


def slow_layer(place: Path) -> flatten.LayerBlob:
    archive = Archive()
    for n in range(40_000):
        archive.add(b"d%d/f%d" % (n // 100, n), data=b"x" * 100)
    return blob(place / "blobs", archive.bytes(), gzip.compress(archive.bytes(), 1))


BIG = Limits()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_crashes_is_a_named_error(place: Path, sign: signal.Signals, which: int) -> None:
    layer = slow_layer(place)

    def kill() -> None:
        deadline = time.monotonic() + 10
        while len(found := sorted(workers())) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(found[which], sign)

    killer = threading.Thread(target=kill)
    killer.start()
    error = refused(place, layer, limits=BIG)
    killer.join()
    assert error.stage == "crashed"


def test_they_are_nobody_and_can_do_nothing(place: Path) -> None:
    """Looked at from outside, while they work."""
    layer = slow_layer(place)
    seen: dict[str, dict[str, str]] = {}

    def look() -> None:
        deadline = time.monotonic() + 10
        while len(seen) < 2 and time.monotonic() < deadline:
            for pid in workers():
                with suppress(OSError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
                    if lines["Seccomp"].strip() == "2":
                        files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115
                        lines["files"] = " ".join(sorted(files))
                        words = Path(f"/proc/{pid}/cmdline").read_text()
                        lines["net"] = os.readlink(f"/proc/{pid}/ns/net")  # noqa: PTH115
                        seen["merge" if '"role": "merge"' in words else "inflate"] = lines
            time.sleep(0.001)

    looker = threading.Thread(target=look)
    looker.start()
    flattened(place, layer, limits=BIG)
    looker.join()
    assert set(seen) == {"merge", "inflate"}
    for lines in seen.values():
        assert lines["Uid"].split() == ["65534"] * 4 and lines["Gid"].split() == ["65534"] * 4
        assert lines["Groups"].split() == [] and lines["NoNewPrivs"].strip() == "1"
        for which in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(lines[which], 16) == 0
        assert lines["net"] != os.readlink("/proc/self/ns/net")  # noqa: PTH115
        assert all(name.startswith(("pipe:", "/dev/null", str(place))) for name in lines["files"].split())
    assert str(place / "out") not in seen["inflate"]["files"] and str(place / "blobs") not in seen["merge"]["files"]


PROBE = """
import os, sys, ctypes
sys.path.insert(0, sys.argv[1])
from isolat.linux import lockdown
spare = os.open("/dev/null", os.O_RDWR)
lockdown.lock(os.getppid(), memory_bytes=1 << 30, file_bytes=1 << 20, cpu_s=10)
libc = ctypes.CDLL(None, use_errno=True)
tries = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY), "stat": lambda: os.stat("/"), "list": lambda: os.listdir("/"),
    "create": lambda: os.open("/tmp/x", os.O_CREAT | os.O_RDWR), "unlink": lambda: os.unlink("/tmp/x"),
    "fork": os.fork, "kill": lambda: os.kill(os.getppid(), 0), "exec": lambda: os.execv("/bin/true", ["true"]),
    "setuid": lambda: os.setresuid(0, 0, 0), "pipe": os.pipe, "ioctl": lambda: raw(16, spare, 0, 0),
    "socket": lambda: raw(41, 1, 1, 0), "ptrace": lambda: raw(101, 16, os.getppid(), 0), "mount": lambda: raw(165, 0),
    "bpf": lambda: raw(321, 0, 0, 0), "userfaultfd": lambda: raw(323, 0), "x32": lambda: raw(0x40000002, 0, 0, 0),
    "memfd": lambda: raw(319, b"x", 0), "prctl": lambda: raw(157, 22, 0, 0), "handle": lambda: raw(304, 0, 0, 0),
}
def raw(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "no")
for name, do in tries.items():
    try:
        do()
        os.write(1, name.encode() + b" worked\\n")
    except OSError as error:
        if error.errno != 1:
            os.write(1, b"%s %d\\n" % (name.encode(), error.errno))
try:
    bytearray(2 << 30)
    os.write(1, b"memory\\n")
except MemoryError:
    pass
os.write(1, b"end\\n")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of its calls")
def test_a_locked_process_is_denied_everything_else() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROBE, str(SOURCE)], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.stdout == "end\n", done.stdout + done.stderr


def test_they_die_with_whoever_started_them(place: Path) -> None:
    layer = slow_layer(place)
    code = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from pathlib import Path
from isolat.deadline import NEVER
from isolat.images import flatten
layer = flatten.LayerBlob(Path({str(layer.path)!r}), {layer.digest!r}, "", {layer.size_bytes})
flatten.flatten([layer] * 50, Path({str(place / "out/image")!r}), NEVER, progress=lambda *_: print(flush=True))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0)
    assert parent.stdout is not None
    for _ in range(3):
        parent.stdout.readline()
    children = {int(word) for word in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()}
    assert len(children) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in children)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Mutations


def victims() -> list[bytes]:
    """Archives with everything in them, to be damaged."""
    first = Archive().directory(b"./").directory(b"d", xattrs={b"user.a": b"b"}).add(b"d/f", data=b"x" * 700)
    first.add(b"big", data=b"y" * 9000, mtime=(5, 6)).symlink(b"s", b"d/f").link(b"h", b"big").symlink(b"up", b"../..")
    first.add(b"dev/null", "char", device=(1, 3)).add(b"p", "fifo").add(b"n" * 150 + b"/x", data=b"1")
    sparse = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"100000", b"mtime": b"1.5",
              b"GNU.sparse.name": b"sparse"}  # fmt: skip
    first.raw(pax(sparse, size=512 + 600), padded(b"2\n0\n100\n50000\n500\n"), padded(bytes(600)))
    first.raw(
        header(b"././@LongLink", b"L", 200), padded(b"l" * 199 + b"\0"), header(b"short", size=10), padded(b"z" * 10)
    )
    second = (
        Archive().add(b"d/.wh.f").add(b".wh.big").add(b"d/.wh..wh..opq").add(b"d/g").link(b"i", b"h").directory(b"s")
    )
    return [first.bytes(), second.bytes()]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """A few bytes, blocks or numbers changed; most of the time with sums that are right again."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(found))
        match chance.randrange(6):
            case 0:
                found[at] = chance.randrange(256)
            case 1:
                found[at : at + chance.randint(1, 12)] = chance.randbytes(chance.randint(1, 12))
            case 2:
                block = at // BLOCK * BLOCK
                found[block : block + BLOCK] = b"" if chance.random() < 0.5 else found[block : block + BLOCK] * 2
            case 3:
                field = at // BLOCK * BLOCK + chance.choice((0, 100, 108, 124, 136, 156, 157, 257, 345))
                found[field : field + 8] = chance.choice(
                    (b"\xff" * 8, b"77777777", b"\x80" + bytes(7), bytes(8), b"../.wh./")
                )
            case 4:
                kind = at // BLOCK * BLOCK + 156
                found[kind : kind + 1] = bytes([chance.choice(b"01234567xgLKSVA\0")])
            case 5:
                del found[at : at + chance.choice((1, BLOCK, 3 * BLOCK))]
        if not found:
            return b""
    if chance.random() < 0.9:
        for at in range(0, len(found) - BLOCK + 1, BLOCK):
            head = found[at : at + BLOCK]
            if head[257:262] == b"ustar" or chance.random() < 0.1:
                head[148:156] = b" " * 8
                found[at + 148 : at + 156] = b"%06o\0 " % sum(head)
    return bytes(found)


def mount_and_walk(place: Path) -> None:
    """The kernel can read all of it, too."""
    target = place / "mounted"
    target.mkdir(exist_ok=True)
    mounts.mount_erofs(str(place / "out/image"), str(target))
    try:
        for directory, _, files in os.walk(os.fsencode(target)):
            for name in files:
                path = directory + b"/" + name
                for key in os.listxattr(path, follow_symlinks=False):
                    os.getxattr(path, key, follow_symlinks=False)
                if os.path.isfile(path) and not os.path.islink(path) and os.lstat(path).st_size < 1 << 20:  # noqa: PTH113, PTH114
                    with open(path, "rb") as stream:
                        stream.read()
    finally:
        mounts.umount(str(target))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_mutations_become_a_sound_image_or_a_named_error(place: Path, count: int) -> None:
    originals, sound = victims(), 0
    for seed in range(count):
        chance = random.Random(seed)
        layers = []
        for original in originals:
            data = mutated(chance, original) if chance.random() < 0.7 else original
            packed = chance.choice((lambda it: it, lambda it: gzip.compress(it, 1), zstandard.compress))(data)
            if chance.random() < 0.15:
                packed = mutated(chance, packed) or b"x"
            layers.append(blob(place / "blobs", b"", packed, ""))
        try:
            flattened(place, *layers)
        except InvalidImage as error:
            assert error.stage not in ("crashed", "too-slow") and error.hint, f"seed {seed}: {error.message}"
            assert list((place / "out").iterdir()) == [], f"seed {seed}"
        else:
            assert [path.name for path in (place / "out").iterdir()] == ["image"]
            assert (place / "out/image").stat().st_size <= SMALL.total_bytes
            done = subprocess.run(["fsck.erofs", place / "out/image"], capture_output=True, check=False, timeout=60)
            assert done.returncode == 0, f"seed {seed}: {done.stdout!r}{done.stderr!r}"
            mount_and_walk(place)
            (place / "out/image").unlink()
            sound += 1
        for path in (place / "blobs").iterdir():
            path.unlink()
    assert count // 20 < sound < count
