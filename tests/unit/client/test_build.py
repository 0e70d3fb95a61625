"""What a build's caller opens and reads: the context, the Containerfile, standard input."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from isolat.client import build
from isolat.errors import UsageError

EMPTY = io.BytesIO()


def archive() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("Containerfile"))
    return target.getvalue()


def drained(source: build.Source) -> bytes:
    with open(source.descriptors.pop(), "rb") as stream:
        return stream.read()


def test_a_directory_is_opened_and_its_containerfile_read(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM b")
    found = build.source(str(tmp_path), "", EMPTY)
    assert found.args == {"context": "directory", "containerfile": "FROM b"}
    assert Path(f"/proc/self/fd/{found.descriptors[0]}").readlink() == tmp_path
    found.close()
    (tmp_path / "Containerfile").write_text("FROM a")
    found = build.source(str(tmp_path), "", EMPTY)
    assert found.args["containerfile"] == "FROM a"
    found.close()


def test_a_named_containerfile_is_from_here_or_else_from_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tmp_path / "context"
    (context / "deep").mkdir(parents=True)
    (context / "deep/File").write_text("FROM deep")
    monkeypatch.chdir(tmp_path)
    for file in ("deep/File", str(context / "deep/File"), "context/deep/File"):
        found = build.source("context", file, EMPTY)
        assert found.args["containerfile"] == "FROM deep"
        found.close()
    found = build.source("context", "-", io.BytesIO(b"FROM stdin"))
    assert found.args["containerfile"] == "FROM stdin"
    found.close()


@pytest.mark.parametrize("head", [b"FROM debian\n", b"#\n" * 600 + b"FROM debian\n"])
def test_text_on_standard_input_is_the_containerfile(head: bytes) -> None:
    found = build.source("-", "", io.BytesIO(head))
    assert found.args == {"context": "none", "containerfile": head.decode()}
    assert not found.descriptors


def test_an_archive_on_standard_input_is_the_context() -> None:
    data = archive()
    found = build.source("-", "sub/File", io.BytesIO(data))
    assert found.args == {"context": "archive", "compression": "", "file": "sub/File"}
    assert drained(found) == data
    packed = gzip.compress(data)
    found = build.source("-", "", io.BytesIO(packed))
    assert found.args["compression"] == "gzip"
    assert drained(found) == packed


def test_who_has_had_enough_of_an_archive_stops_reading(tmp_path: Path) -> None:
    found = build.source("-", "", io.BytesIO(archive() + bytes(4 << 20)))
    found.close()


@pytest.mark.parametrize(
    ("context", "file", "stdin", "reason"),
    [
        ("-", "-", b"", "can't be both"),
        ("-", "", b"", "is empty"),
        ("-", "", b"\xff\xfe" * 10, "not UTF-8"),
        ("-", "", b"a\0b", "NUL"),
        ("-", "", b"x" * (2 << 20), "neither"),
        ("/nonexistent", "", b"", "there is no Containerfile or Dockerfile"),
        ("/nonexistent", "nofile", b"", "there is no Containerfile nofile"),
        ("/", "/dev/null", b"", "is no file"),
        ("/", "/etc", b"", "can't be read|is no file"),
    ],
)
def test_what_can_be_no_context_is_refused(context: str, file: str, stdin: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        build.source(context, file, io.BytesIO(stdin))


def test_a_file_is_no_context(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("FROM a")
    with pytest.raises(UsageError, match="can't be opened"):
        build.source(str(tmp_path / "file"), str(tmp_path / "file"), EMPTY)


def test_an_argument_without_a_value_takes_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "x")
    monkeypatch.delenv("NOT_HERE", raising=False)
    assert build.arguments(["A=b", "HERE", "NOT_HERE", "E="]) == ["A=b", "HERE=x", "E="]


def test_the_time_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "17")
    assert build.timestamp() == 17
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert build.timestamp() == -1


def test_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text("FROM a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    build.source(str(tmp_path), "", EMPTY).close()
    with pytest.raises(UsageError):
        build.source(str(tmp_path), "none", EMPTY)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
