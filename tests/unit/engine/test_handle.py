"""The handle survives its way to disk and back, and a damaged one is an error of the tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isolat.engine.handle import Around, Handle, guest_words, handle_from_json, read_exit, read_handle, write_handle
from isolat.errors import StoreError
from isolat.layers.base import Frame, State
from isolat.places.base import Command, Exit
from isolat.places.steps import Cgroup, Idmap, MakeDir, Mount, PutFile, Run, Subvolume


def sample() -> Handle:
    steps = (
        Subvolume("/r/pool/x", 1 << 30),
        MakeDir("/r/pool/x/u", 0o755, 5, 5, keep=True),
        PutFile("/r/envs/x/config.json", '{"a": "ü"}'),
        Mount("overlay", "/r/envs/x/rootfs", "overlay", "lowerdir=/a,upperdir=/b", 4),
        Idmap("/r/mounts/d", "/r/envs/x/image", ((0, 1 << 30, 65536),), 1),
        Cgroup(("/sys/fs/cgroup/pids/isolat/t/x",), (("/sys/fs/cgroup/pids/isolat/t/x/pids.max", "9"),)),
        Run((), ("crun", "delete", "-f", "x")),
    )
    main = Command(("true",), (("PATH", "/bin"),), "/", "0")
    guest = Command(("crun", "run"), control=True, pidfile="/r/envs/x/guest.pid")
    frame = Frame("container", steps, True, "guest/main", main, guest)
    return Handle(
        id="x", name="calm_teal", image="debian", digest="d", spec={"image": "debian", "command": ["true"]},
        frames=(frame,), state=State.EXITED, created_ns=1, boot_id="b", uid_index=3,
        exit=Exit(137, 9, 1, 2, forced=True), labels=(("a", "b"),),
    )  # fmt: skip


def test_a_handle_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    write_handle(tmp_path, sample())
    assert read_handle(tmp_path) == sample()


def test_the_main_process_of_a_stack_has_the_path_of_its_guests() -> None:
    outer = Frame("container", (), True, "", None, None)
    inner = Frame("fake", (), True, "guest/main", Command(("true",)), None)
    assert sample().with_(frames=(outer, inner)).main_name == "guest/guest/main"
    assert sample().main_name == "guest/main"


def test_one_inside_of_another_is_below_it_at_its_keeper(tmp_path: Path) -> None:
    around = Around("o", "outer", ("microvm",), "guest")
    frame = Frame("container", (), True, "x/main", Command(("true",)), None, guest_key="x")
    inner = sample().with_(frames=(frame,), around=around)
    assert (inner.first_name, inner.main_name, inner.guest_name) == ("guest/x", "guest/x/main", "guest/x")
    assert inner.layers == ("microvm", "container")
    write_handle(tmp_path, inner)
    assert read_handle(tmp_path) == inner


def test_a_handle_of_before_has_nothing_around_it() -> None:
    data = sample().to_json()
    del data["around"]
    for frame in data["frames"]:
        del frame["guest_key"]
    assert handle_from_json(data) == sample()


def test_no_handle_is_none_and_half_a_handle_is_never_read(tmp_path: Path) -> None:
    assert read_handle(tmp_path) is None
    (tmp_path / ".handle.json.new").write_text("{")
    assert read_handle(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "frames": 3}'])
def test_a_damaged_handle_is_a_store_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "handle.json").write_text(text)
    with pytest.raises(StoreError):
        read_handle(tmp_path)


def test_a_handle_of_another_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(StoreError) as caught:
        handle_from_json({**sample().to_json(), "version": 99})
    assert "99" in caught.value.message and caught.value.hint


def test_an_exit_record_tells_signals_from_codes(tmp_path: Path) -> None:
    record = {"version": 1, "started_ns": 1, "ended_ns": 2, "code": None, "signal": 9}
    (tmp_path / "exit.json").write_text(json.dumps(record))
    assert read_exit(tmp_path) == Exit(137, 9, 1, 2)
    (tmp_path / "exit.json").write_text(json.dumps({**record, "code": 3, "signal": 0}))
    assert read_exit(tmp_path) == Exit(3, 0, 1, 2)
    (tmp_path / "exit.json").unlink()
    assert read_exit(tmp_path) is None


def test_an_exit_record_tells_an_end_with_the_guest(tmp_path: Path) -> None:
    record = {"version": 1, "started_ns": 1, "ended_ns": 2, "code": None, "signal": 9, "with_guest": True, "oom": True}
    (tmp_path / "exit.json").write_text(json.dumps(record))
    assert read_exit(tmp_path) == Exit(137, 9, 1, 2, oom=True, with_guest=True)


def test_a_guests_last_words_are_one_printable_line(tmp_path: Path) -> None:
    assert guest_words(tmp_path) == ""
    words = "".join(f"line {n}\r\n" for n in range(20)) + "\x1b[31mthe end\x1b[0m \xff\n\n"
    (tmp_path / "guest.tail").write_bytes(words.encode("latin-1"))
    told = guest_words(tmp_path)
    assert told.startswith("line 11 | ") and "the end" in told and told.isprintable()


def test_of_a_panic_its_first_lines_are_told(tmp_path: Path) -> None:
    words = ["before", "[ 1.0] Kernel panic - not syncing: why", *(f"RAX: {n}" for n in range(20))]
    (tmp_path / "guest.tail").write_text("\n".join(words))
    told = guest_words(tmp_path)
    assert told.startswith("[ 1.0] Kernel panic - not syncing: why | RAX: 0") and told.endswith("RAX: 8")
