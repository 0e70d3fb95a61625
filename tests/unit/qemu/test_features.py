"""What is concluded from QEMU's answers, and how long they are believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import StartFailed, Unsupported
from isolat.qemu import features
from isolat.qemu.features import Qemu

QEMU = Qemu("/usr/bin/q", "7.2.22", "Debian", ("microvm", "none"), (*features.NEEDED["microvm"],), True, "id")


def program(directory: Path, name: str = features.FULL, text: str = "#!/bin/sh\nexit 3\n") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a program was really asked; each answers with ``QEMU``, the small one without its filter."""
    calls: list[str] = []

    def answer(binary: str, file: str, d: Deadline) -> Qemu:
        calls.append(binary)
        small = binary.endswith(features.SMALL)
        return Qemu(binary, "7.2", "", QEMU.machines, QEMU.devices, not small, file)

    monkeypatch.setattr(features, "_asked", answer)
    return calls


def test_nothing_is_missing_where_all_is_there() -> None:
    assert QEMU.missing("microvm") == ()
    assert QEMU.missing("q35")[0] == "the machine q35"
    assert "VGA" in QEMU.missing("q35")


def test_none_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        features.find(Deadline(1), path=str(tmp_path))
    assert "qemu-system-x86" in caught.value.hint


def test_it_is_asked_once(tmp_path: Path, asked: list[str]) -> None:
    program(tmp_path / "bin")
    found = [features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin")) for _ in range(3)]
    assert len(asked) == 1
    assert found[0] == found[1] == found[2]


def test_another_program_at_the_same_place_is_asked_again(tmp_path: Path, asked: list[str]) -> None:
    path = program(tmp_path / "bin")
    first = features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin"))
    os.utime(path, ns=(1, 1))
    second = features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin"))
    assert len(asked) == 2
    assert first.identity != second.identity


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "files": {"x": 3}}'])
def test_a_damaged_cache_is_an_empty_one(tmp_path: Path, asked: list[str], text: str) -> None:
    program(tmp_path / "bin")
    (tmp_path / "cache").write_text(text)
    features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin"))
    features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin"))
    assert len(asked) == 1


def test_a_row_of_another_form_is_not_believed(tmp_path: Path, asked: list[str]) -> None:
    program(tmp_path / "bin")
    features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin"))
    data = json.loads((tmp_path / "cache").read_text())
    for row in data["files"].values():
        del row["sandbox"]
    (tmp_path / "cache").write_text(json.dumps(data))
    features.find(Deadline(1), tmp_path / "cache", path=str(tmp_path / "bin"))
    assert len(asked) == 2


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, asked: list[str]) -> None:
    program(tmp_path / "bin")
    features.find(Deadline(1), tmp_path / "no/such/cache", path=str(tmp_path / "bin"))
    assert len(asked) == 1


def test_the_small_one_is_not_used_without_its_filter(tmp_path: Path, asked: list[str]) -> None:
    for name in (features.FULL, features.SMALL):
        program(tmp_path / "bin", name)
    found = features.find(Deadline(1), tmp_path / "cache", kvm=True, path=str(tmp_path / "bin"))
    assert found.binary.endswith(features.FULL)
    assert [Path(name).name for name in asked] == [features.SMALL, features.FULL]
    features.find(Deadline(1), tmp_path / "cache", kvm=True, path=str(tmp_path / "bin"))
    assert len(asked) == 2


def test_a_program_that_is_no_qemu_is_told(tmp_path: Path) -> None:
    program(tmp_path / "bin", text="#!/bin/sh\necho what is this >&2\nexit 3\n")
    with pytest.raises(StartFailed) as caught:
        features.find(Deadline(5), path=str(tmp_path / "bin"))
    assert "what is this" in caught.value.details
