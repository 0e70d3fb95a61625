"""Every test of this folder runs once for each layer and stack; ``--layer NAME`` (repeatable) chooses others."""

from __future__ import annotations

import inspect

import pytest

from tests.conformance.subject import FEW, QUICK, SLOW, STACKS, Launcher, Subject
from tests.support import images
from tests.support.fixtures import fresh_root, root, session_root
from tests.support.roots import Root

BOOTING_S = 1800  # for a test on what takes its time to boot

__all__ = ["fresh_root", "root", "session_root"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layer", action="append", help="a layer or stack that the conformance suite is run on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        quick = FEW.get(metafunc.module.__name__.rpartition(".")[2], QUICK)
        slow = [pytest.param(name, marks=pytest.mark.soak) for name in (*STACKS, *SLOW) if name not in quick]
        chosen = metafunc.config.getoption("--layer", default=None) or [*quick, *slow]
        metafunc.parametrize("subject", chosen, indirect=True, ids=lambda name: name.replace("/", "+"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "applies(to): only to subjects of which that is true, by what they declare")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What does not follow from a subject's declaration is no test of it: it is left out, not skipped."""
    out = [item for item in items if isinstance(item, pytest.Function) and not _applies(item)]
    for item in items:
        if _subject(item) and Subject(_subject(item)).can.boots:
            item.add_marker(pytest.mark.timeout(BOOTING_S), append=False)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def _subject(item: pytest.Item) -> str:
    """The name of the subject that this test is run on, if it is."""
    found = (
        item.callspec.params.get("subject", "")
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else ""
    )
    return str(found)


def _applies(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "subject" not in params:
        return True
    subject = Subject(_subject(item))
    if params.get("launch") == "exec" and not subject.can.enter:
        return False
    for mark in item.iter_markers("applies"):
        to = mark.kwargs["to"]
        if not to(subject, *(params[name] for name in list(inspect.signature(to).parameters)[1:])):
            return False
    return True


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    found = Subject(request.param)
    if found.can.boots:
        for name in ("session_root", "fresh_root"):
            if name in request.fixturenames:
                images.share_bootable(request.getfixturevalue(name).path)
    return found


@pytest.fixture(params=["run", "exec"])
def launch(request: pytest.FixtureRequest, root: Root, subject: Subject) -> Launcher:
    """Starts a command both ways: as the application itself, and by exec."""
    return Launcher(root, subject, request.param)
