"""The instructions that `commit` and `import` carry out."""

from __future__ import annotations

import pytest

from isolat.errors import UsageError
from isolat.images.changes import apply


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('CMD ["a", "b c"]', {"Cmd": ["a", "b c"]}),
        ("cmd echo $HOME", {"Cmd": ["/bin/sh", "-c", "echo $HOME"]}),
        ('ENTRYPOINT ["/x"]', {"Entrypoint": ["/x"]}),
        ("ENV A=1 B='two words'", {"Env": ["OLD=0", "A=1", "B=two words"]}),
        ("ENV OLD the rest of it", {"Env": ["OLD=the rest of it"]}),
        ("EXPOSE 80 53/udp", {"ExposedPorts": {"80/tcp": {}, "53/udp": {}}}),
        ("EXPOSE 80-82 9-9/UDP", {"ExposedPorts": {"80/tcp": {}, "81/tcp": {}, "82/tcp": {}, "9/udp": {}}}),
        ("LABEL a=b", {"Labels": {"a": "b"}}),
        ("STOPSIGNAL SIGINT", {"StopSignal": "SIGINT"}),
        ("USER 1:2", {"User": "1:2"}),
        ('VOLUME ["/data"]', {"Volumes": {"/data": {}}}),
        ("VOLUME /a /b", {"Volumes": {"/a": {}, "/b": {}}}),
        ("WORKDIR work", {"WorkingDir": "/srv/work"}),
        ("WORKDIR /abs/../x", {"WorkingDir": "/x"}),
    ],
)
def test_an_instruction_changes_its_field_and_no_other(text: str, expected: dict[str, object]) -> None:
    before = {"Env": ["OLD=0"], "WorkingDir": "/srv"}
    assert apply(before, [text]) == before | expected
    assert before == {"Env": ["OLD=0"], "WorkingDir": "/srv"}


def test_they_are_carried_out_in_order() -> None:
    assert apply({}, ["WORKDIR /a", "WORKDIR b", "USER x", "USER y"]) == {"WorkingDir": "/a/b", "User": "y"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "RUN x",
        "CMD",
        "CMD [1]",
        'CMD ["a"',
        "ENV",
        "ENV A=1 B",
        "EXPOSE 0",
        "EXPOSE x",
        "EXPOSE 1/foo",
        "USER",
        "EXPOSE 9-8",
        "EXPOSE 1-",
        "EXPOSE 1-65536",
        "ENV A=\udcff",
        'CMD ["\\ud800"]',
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--change"):
        apply({}, [text])
