"""A start that fails says where and why, and nothing of it survives."""

from __future__ import annotations

import errno
import time

import pytest

from isolat.errors import CommandNotFound, DeadlineExceeded, NotExecutable, StartFailed
from tests.conformance.subject import Subject
from tests.support import traces
from tests.support.roots import Root

pytestmark = pytest.mark.root

START_S = 2.0


def _nothing(root: Root) -> None:
    assert root.environments() == []
    assert traces.none_of_environments(root.path, 2) == []


def test_a_command_that_does_not_start_leaves_no_environment(root: Root, subject: Subject) -> None:
    for command, error in (("/no/such", CommandNotFound), ("/etc/passwd", NotExecutable)):
        with pytest.raises(error) as told:
            root.ask("run", {"spec": subject.spec(command), "attach": False})
        assert told.value.stage
        assert told.value.errno in (errno.ENOENT, errno.EACCES)
        _nothing(root)


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.applies(to=lambda s: s.layers[-1].name == "fake")
def test_a_step_that_fails_undoes_those_before_it(root: Root, subject: Subject, step: int) -> None:
    options = {"x-fake": {"steps": 5, "fail_step": step}}
    with pytest.raises(StartFailed) as told:
        root.ask("run", {"spec": {**subject.spec("true"), **options}})
    assert told.value.stage
    _nothing(root)


@pytest.mark.applies(to=lambda s: s.layers[-1].name == "fake")
def test_a_start_past_its_deadline_fails_and_nothing_survives(fresh_root: Root, subject: Subject) -> None:
    fresh_root.start_daemon(ISOLAT_START_S=str(START_S))
    began = time.monotonic()
    with pytest.raises((StartFailed, DeadlineExceeded)) as told:
        fresh_root.ask("run", {"spec": {**subject.spec("true"), "x-fake": {"slow_start_s": 86398}}})
    assert time.monotonic() - began < START_S + 5
    assert told.value.stage
    _nothing(fresh_root)
    assert traces.processes("sleep 86398") == {}


@pytest.mark.applies(to=lambda s: s.layers[-1].name == "fake")
def test_a_slow_start_within_its_deadline_succeeds(root: Root, subject: Subject) -> None:
    conversation, stream, _ = root.run({**subject.shell("echo up"), "x-fake": {"slow_start_s": 0.3}})
    assert stream.ended() == 0
    assert bytes(stream.out) == b"up\n"
    conversation.close()
    stream.close()


@pytest.mark.applies(to=lambda s: s.outer.capabilities.images)
def test_an_unknown_image_is_refused_before_any_effect(root: Root, subject: Subject) -> None:
    from isolat.errors import NotFound

    with pytest.raises(NotFound):
        root.ask("run", {"spec": {**subject.spec("true"), "image": "no-such-image"}})
    _nothing(root)


def test_two_environments_with_one_name_conflict(root: Root, subject: Subject) -> None:
    from isolat.errors import Conflict

    root.run_detached(subject.spec("sleep", "600", container_name="the-one"))
    with pytest.raises(Conflict):
        root.run_detached(subject.spec("sleep", "600", container_name="the-one"))
    assert len(root.environments()) == 1
