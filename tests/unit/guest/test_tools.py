"""The image with the runtime and the init."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from isolat.errors import Unsupported
from isolat.guest import tools

LDD = """\
\tlinux-vdso.so.1 (0x00007f8632ed0000)
\tlibcap.so.2 => /lib/x86_64-linux-gnu/libcap.so.2 (0x00007f8632d4a000)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f8632b5c000)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f8632ed2000)
""".splitlines()


def test_libraries_and_loader_are_read_from_ldd() -> None:
    assert [path.name for path in tools.parse_ldd(LDD)] == ["libcap.so.2", "libc.so.6", "ld-linux-x86-64.so.2"]
    assert tools.parse_ldd(["\tnot a dynamic executable"]) == []


def test_the_tree_works_as_a_root_and_by_its_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [tmp_path / "lib" / "x86_64-linux-gnu" / "libc.so.6", tmp_path / "lib64" / "ld-linux-x86-64.so.2"]
    for path in parts:
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
    for name in ("crun", "init"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(tools, "libraries_of", lambda program: parts)
    tools.tree(tmp_path / "tree", tmp_path / "init", tmp_path / "crun")
    root = tmp_path / "tree"
    for name in ("bin/crun", "bin/isolat-init", "lib/ld.so", "lib64/ld-linux-x86-64.so.2"):
        assert (root / name).exists(), name
    assert (root / "lib/x86_64-linux-gnu/libc.so.6").read_text() == "libc.so.6"
    assert tools.CRUN_ARGV[0].removeprefix(tools.AT) == "/lib/ld.so"


@pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="no mkfs.erofs")
def test_the_same_programs_make_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "init").write_bytes(b"init" * 3000)
    made = []
    for name in ("a", "b"):
        tools.build(tmp_path / name, tmp_path / "init", None)
        made.append((tmp_path / name).read_bytes())
        time.sleep(1.1)  # a time of making would show
    assert made[0] == made[1] and b"init" in made[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "init"]


def test_without_mkfs_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, **_: None)
    with pytest.raises(Unsupported, match=r"mkfs\.erofs"):
        tools.build(tmp_path / "out", tmp_path / "init", None)
