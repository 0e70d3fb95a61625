"""Reading mountinfo, and being patient with what is not mounted."""

from __future__ import annotations

from pathlib import Path

from isolat.linux import btrfs, confine, loop, mounts


def test_mountinfo_is_read_with_and_without_optional_fields() -> None:
    text = (
        "36 35 98:0 /a /mnt rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n"
        "37 35 0:9 / /with\\040space\\134 ro - erofs /images/x\\040y.erofs ro\n"
        "garbage\n"
    )
    assert mounts.parse_mountinfo(text) == [
        mounts.MountEntry("/a", "/mnt", "ext3", "/dev/root", ("rw", "errors=continue")),
        mounts.MountEntry("/", "/with space\\", "erofs", "/images/x y.erofs", ("ro",)),
    ]


def test_the_root_is_a_mount_point_and_a_fresh_directory_is_not(tmp_path: Path) -> None:
    assert mounts.is_mountpoint("/")
    assert not mounts.is_mountpoint(str(tmp_path))
    assert mounts.umount_below(str(tmp_path)) == 0


def test_a_device_that_is_bound_to_nothing_has_no_file() -> None:
    assert loop.backing_file("/dev/loop9999") == ""


def test_a_plain_directory_is_no_subvolume(tmp_path: Path) -> None:
    assert not btrfs.is_subvolume(str(tmp_path / "absent"))


def test_the_confinement_reads_its_arguments() -> None:
    argv = ["--read", "/a", "--write", "/b", "--user", "--", "program", "--read"]
    assert confine._arguments(argv) == (["/a"], ["/b"], True, ["program", "--read"])


def test_loop_config_has_the_kernels_size() -> None:
    assert len(loop._config(3, "/x", 0)) == 304
