"""What a machine boots from: made when it is missing, made anew when what it is made from changed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, StoreError
from isolat.guest import files, kernel, modules, tools
from isolat.guest.files import ensure
from isolat.guest.kernel import Kernel
from tests.unit.guest.elves import RELEASE, VMLINUX, bzimage, module_tree

pytestmark = pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="no mkfs.erofs")


class Fetched(list[Path]):
    """Where kernels were fetched to."""

    def fetch(self, into: Path, progress: object = None, d: object = None) -> Kernel:
        self.append(into)
        into.mkdir()
        (into / "vmlinux").write_bytes(VMLINUX)
        (into / "release").write_text(RELEASE)
        module_tree(into / "modules", {"erofs": "", "sound": ""}, tuple(set(modules.REQUIRED) - {"erofs"}))
        return Kernel(RELEASE, into / "vmlinux", into / "modules")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    found = Fetched()
    monkeypatch.setattr(kernel, "fetch", found.fetch)
    monkeypatch.setattr(tools, "find_crun", lambda: None)
    return found


@pytest.fixture
def native(tmp_path: Path) -> Path:
    at = tmp_path / "native"
    at.mkdir()
    for name in (files.AGENT, files.INIT):
        (at / name).write_bytes(name.encode())
    return at


def test_what_is_there_is_neither_fetched_nor_made_again(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    made = ensure(tmp_path / "guest", native)
    before = made.initramfs.stat().st_mtime_ns
    assert ensure(tmp_path / "guest", native) == made
    assert made.initramfs.stat().st_mtime_ns == before and len(fetched) == 1
    assert made.release == RELEASE and made.vmlinux.read_bytes() == VMLINUX and not made.has_crun
    assert not list(made.vmlinux.parent.rglob("sound.ko"))


def test_a_new_agent_makes_a_new_key_with_the_same_kernel(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    made = ensure(tmp_path / "guest", native)
    (native / files.AGENT).write_bytes(b"another agent")
    again = ensure(tmp_path / "guest", native)
    assert again.key != made.key and b"another agent" in again.initramfs.read_bytes() and len(fetched) == 1


def test_the_same_content_has_the_same_key_wherever_it_is(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    keys = {ensure(tmp_path / name, native).key for name in ("a", "b")}
    (native / files.INIT).touch()
    assert keys == {ensure(tmp_path / "a", native).key}


@pytest.mark.parametrize("name", ["initramfs.cpio", "tools.erofs", "manifest.json", "kernel"])
def test_what_is_lost_is_made_again(tmp_path: Path, native: Path, fetched: Fetched, name: str) -> None:
    made = ensure(tmp_path / "guest", native)
    lost = tmp_path / "guest" / name
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert ensure(tmp_path / "guest", native) == made
    assert lost.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "inputs": 3}'])
def test_a_damaged_manifest_is_none(tmp_path: Path, native: Path, fetched: Fetched, text: str) -> None:
    made = ensure(tmp_path / "guest", native)
    (tmp_path / "guest" / "manifest.json").write_text(text)
    assert ensure(tmp_path / "guest", native) == made


def test_what_a_killed_maker_left_is_swept(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    (tmp_path / "guest" / ".kernel-xyz" / "tree").mkdir(parents=True)
    ensure(tmp_path / "guest", native)
    assert not [path for path in (tmp_path / "guest").iterdir() if path.name.startswith(".")]


def test_two_at_once_make_it_once(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    found: list[files.GuestFiles] = []
    threads = [threading.Thread(target=lambda: found.append(ensure(tmp_path / "guest", native))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(fetched) == 1


def test_waiting_for_another_maker_has_an_end(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    (tmp_path / "guest").mkdir()
    with files._locked(tmp_path / "guest", Deadline(None)), pytest.raises(DeadlineExceeded):
        ensure(tmp_path / "guest", native, d=Deadline(0.2))


def test_a_missing_agent_is_named(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    (native / files.AGENT).unlink()
    with pytest.raises(StoreError, match="isolat-agent"):
        ensure(tmp_path / "guest", native)


def test_a_users_kernel_fetches_nothing(tmp_path: Path, native: Path, fetched: Fetched) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    made = ensure(tmp_path / "guest", native, own_kernel=tmp_path / "vmlinuz")
    assert (made.release, fetched) == (RELEASE, [])
    assert ensure(tmp_path / "guest", native, own_kernel=tmp_path / "vmlinuz") == made
    assert ensure(tmp_path / "guest", native).key != made.key  # without it: another kernel


def _as_an_older_isolat_left_it(at: Path) -> None:
    """Pruned for fewer modules, and its initramfs made without them."""
    (at / "kernel" / "modules" / "kept").unlink()
    (at / "manifest.json").unlink()


def test_a_kernel_that_was_pruned_for_fewer_modules_is_fetched_again(
    tmp_path: Path, native: Path, fetched: Fetched
) -> None:
    made = ensure(tmp_path / "guest", native)
    _as_an_older_isolat_left_it(tmp_path / "guest")
    assert ensure(tmp_path / "guest", native) == made
    assert len(fetched) == 2 and sorted(p.name for p in (tmp_path / "guest").glob("kernel*")) == ["kernel"]


def test_without_the_network_it_goes_on_to_serve(
    tmp_path: Path, native: Path, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ensure(tmp_path / "guest", native)
    _as_an_older_isolat_left_it(tmp_path / "guest")

    def fail(*_: object, **__: object) -> Kernel:
        raise StoreError("the network is needed")

    monkeypatch.setattr(kernel, "fetch", fail)
    assert ensure(tmp_path / "guest", native) == made
    monkeypatch.setattr(kernel, "fetch", fetched.fetch)
    (tmp_path / "guest" / "manifest.json").unlink()  # as when the agent is another one
    assert ensure(tmp_path / "guest", native) == made and len(fetched) == 2, (
        "it is tried again when there is an occasion"
    )


def test_whether_the_kernel_can_share_directories_is_known(
    tmp_path: Path, native: Path, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not ensure(tmp_path / "without", native).live
    monkeypatch.setattr(modules, "LIVE", ("sound",))
    assert ensure(tmp_path / "with", native).live
    assert ensure(tmp_path / "with", native).live
