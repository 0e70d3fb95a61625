"""When KVM counts as working, and for how long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, Unsupported, UsageError
from isolat.guest.files import GuestFiles
from isolat.qemu import accel, features
from tests.unit.qemu.test_features import QEMU

GUEST = GuestFiles("6.1", Path("/v"), Path("/i"), Path("/t"), "key", has_crun=False)
Verdict = tuple[bool, str]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """A machine whose KVM opens; the list holds what the next trials say, the last one for ever."""
    verdicts: list[Verdict] = [(True, "a guest came up under KVM")]
    monkeypatch.setattr(accel, "_closed", lambda: "")
    monkeypatch.setattr(features, "find", lambda d, cache, kvm: replace(QEMU, binary="/kvm"))
    monkeypatch.setattr(accel, "_try", lambda *_: verdicts.pop(0) if verdicts else pytest.fail("tried again"))
    return verdicts


def choose(cache: Path, asked: str = "auto", guest: GuestFiles = GUEST) -> accel.Accel:
    return accel.choose(QEMU, guest, cache / "accel.json", Deadline(5), asked)


def test_kvm_is_used_where_a_guest_comes_up(tmp_path: Path, tried: list[Verdict]) -> None:
    found = choose(tmp_path)
    assert (found.kind, found.qemu.binary) == ("kvm", "/kvm")


def test_the_verdict_is_kept(tmp_path: Path, tried: list[Verdict]) -> None:
    assert choose(tmp_path) == choose(tmp_path)


def test_other_guest_files_are_tried_again(tmp_path: Path, tried: list[Verdict]) -> None:
    tried.append((False, "it hangs"))
    assert choose(tmp_path).kind == "kvm"
    found = choose(tmp_path, guest=replace(GUEST, key="other"))
    assert (found.kind, found.reason, found.qemu) == ("tcg", "it hangs", QEMU)


def test_the_next_boot_of_this_machine_is_tried_again(
    tmp_path: Path, tried: list[Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried.append((False, "it hangs"))
    assert choose(tmp_path).kind == "kvm"
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(accel, "_BOOT_ID", tmp_path / "boot_id")
    assert choose(tmp_path).kind == "tcg"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}'])
def test_a_damaged_cache_is_tried_again(tmp_path: Path, tried: list[Verdict], text: str) -> None:
    (tmp_path / "accel.json").write_text(text)
    assert choose(tmp_path).kind == "kvm"


def test_emulation_needs_no_trial(tmp_path: Path, tried: list[Verdict]) -> None:
    assert choose(tmp_path, "tcg").kind == "tcg"
    assert len(tried) == 1


def test_kvm_that_does_not_work_is_refused(tmp_path: Path, tried: list[Verdict]) -> None:
    tried[:] = [(False, "it hangs")]
    with pytest.raises(Unsupported, match="it hangs"):
        choose(tmp_path, "kvm")


def test_another_word_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hvf"):
        choose(tmp_path, "hvf")


def test_without_the_device_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "_KVM", str(tmp_path / "kvm"))
    monkeypatch.setattr(accel, "_try", lambda *_: pytest.fail("tried"))
    assert choose(tmp_path).reason == f"there is no {tmp_path}/kvm"


def test_a_callers_deadline_is_no_verdict(
    tmp_path: Path, tried: list[Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> Verdict:
        raise DeadlineExceeded("trying KVM did not end in time")

    monkeypatch.setattr(accel, "_try", late)
    with pytest.raises(DeadlineExceeded):
        choose(tmp_path)
    assert not (tmp_path / "accel.json").exists()
