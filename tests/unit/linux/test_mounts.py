"""Reading mountinfo, and being patient with what is not mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    wanted = confine.Wanted(["--read", "/a", "--write", "/b", "--user", "--", "program", "--read"])
    assert (wanted.read, wanted.write, wanted.program) == (["/a"], ["/b"], ["program", "--read"])
    assert (wanted.capabilities, wanted.network, wanted.file_bytes) == ("-all,+dac_read_search", False, -1)
    wanted = confine.Wanted(["--nobody", "--network", "--file-bytes", "5", "--", "program"])
    assert (wanted.capabilities, wanted.network, wanted.file_bytes) == ("-all", True, 5)


@pytest.mark.parametrize("argv", [[], ["--read"], ["program"], ["--user", "--"], ["--what", "--", "program"]])
def test_the_confinement_refuses_what_it_does_not_understand(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="confine: "):
        confine.Wanted(argv)


def test_loop_config_has_the_kernels_size() -> None:
    assert len(loop._config(3, "/x", 0)) == 304
