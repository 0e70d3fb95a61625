"""What is put into a skeleton and taken out of a fresh root file system."""

from __future__ import annotations

import os
from pathlib import Path

from isolat.images import host, tidy

SECRET = "not to be seen"


def _machine(top: Path) -> Path:
    """A small machine with something private in every place that is looked at."""
    for name in (
        "usr/bin",
        "usr/lib",
        "usr/share/ca-certificates/mozilla",
        "etc/alternatives",
        "etc/ld.so.conf.d",
        "lib64",
    ):
        (top / name).mkdir(parents=True)
    (top / "bin").symlink_to("usr/bin")
    (top / "usr/lib/os-release").write_text("ID=debian\n")
    (top / "usr/share/ca-certificates/mozilla/one.crt").write_text("ONE\n")
    (top / "etc/ld.so.cache").write_text("cache")
    (top / "etc/ld.so.conf.d/a.conf").write_text("/usr/local/lib\n")
    (top / "etc/alternatives/editor").symlink_to("/usr/bin/nano")
    (top / "etc/alternatives/odd").symlink_to("/home/someone/.secret")
    for name in ("passwd", "shadow", "hostname", "resolv.conf", "machine-id", "hosts"):
        (top / "etc" / name).write_text(SECRET)
    return top


def test_the_skeleton_shows_nothing_private(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    host.make_skeleton(tree, _machine(tmp_path / "machine"))
    texts = [path.read_text() for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not any(SECRET in text for text in texts)
    assert not (tree / "etc/shadow").exists()
    assert not (tree / "etc/alternatives/odd").is_symlink()


def test_the_skeleton_has_what_programs_need(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    binds = host.make_skeleton(tree, _machine(tmp_path / "machine"))
    assert binds == (("/usr", "/usr"), ("/lib64", "/lib64"))
    assert (tree / "bin").readlink() == Path("usr/bin")
    assert list((tree / "usr").iterdir()) == []
    assert (tree / "etc/passwd").read_text().startswith("root:x:0:0:")
    assert (tree / "etc/alternatives/editor").readlink() == Path("/usr/bin/nano")
    assert (tree / "etc/ssl/certs/ca-certificates.crt").read_text() == "ONE\n"
    assert (tree / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_tidying_takes_out_identity_caches_and_logs(tmp_path: Path) -> None:
    for name in (
        "etc/ssh",
        "var/log/apt",
        "var/cache/apt/archives",
        "var/lib/apt/lists",
        "dev",
        "usr/share/doc/a",
        "proc",
    ):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "etc/machine-id",
        "etc/hostname",
        "etc/resolv.conf",
        "etc/ssh/ssh_host_key",
        "etc/passwd-",
        "etc/passwd",
    ):
        (tmp_path / name).write_text(SECRET)
    for name in ("var/log/apt/term.log", "var/cache/apt/archives/x.deb", "var/lib/apt/lists/y", "dev/null"):
        (tmp_path / name).write_text(SECRET)
    tidy.tidy(tmp_path)
    assert [(tmp_path / name).read_text() for name in ("etc/machine-id", "etc/hostname", "etc/resolv.conf")] == [""] * 3
    assert (tmp_path / "etc/passwd").read_text() == SECRET
    assert not list(tmp_path.glob("etc/ssh/*")) and not (tmp_path / "etc/passwd-").exists()
    for name in ("var/log", "var/cache/apt", "var/lib/apt/lists", "dev"):
        assert list((tmp_path / name).iterdir()) == []


def test_a_link_in_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "dev").symlink_to(outside)
    tidy.tidy(tree)
    assert (outside / "kept").exists()


def test_times_are_clamped_and_older_ones_kept(tmp_path: Path) -> None:
    copyright_file = tmp_path / "usr/share/doc/a/copyright"
    copyright_file.parent.mkdir(parents=True)
    copyright_file.write_text("free")
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    new.touch()
    os.utime(copyright_file, ns=(2_000, 2_000))
    os.utime(old, ns=(1_000, 1_000))
    tidy.clamp_times(tmp_path, tidy.newest_packaged_ns(tmp_path))
    assert [path.stat().st_mtime_ns for path in (old, new, copyright_file, tmp_path)] == [1_000, 2_000, 2_000, 2_000]
