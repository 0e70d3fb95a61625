"""Every test of this folder runs once for each layer and stack; ``--layer NAME`` (repeatable) chooses others."""

from __future__ import annotations

import inspect

import pytest

from tests.conformance.subject import STACKS, Launcher, Subject
from tests.support.fixtures import fresh_root, root, session_root
from tests.support.roots import Root

__all__ = ["fresh_root", "root", "session_root"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layer", action="append", help="a layer or stack that the conformance suite is run on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--layer", default=None) or STACKS
        metafunc.parametrize("subject", chosen, indirect=True, ids=lambda name: name.replace("/", "+"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "applies(to): only to subjects of which that is true, by what they declare")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What does not follow from a subject's declaration is no test of it: it is left out, not skipped."""
    out = [item for item in items if isinstance(item, pytest.Function) and not _applies(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def _applies(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "subject" not in params:
        return True
    subject = Subject(str(params["subject"]))
    if params.get("launch") == "exec" and not subject.can.enter:
        return False
    for mark in item.iter_markers("applies"):
        to = mark.kwargs["to"]
        if not to(subject, *(params[name] for name in list(inspect.signature(to).parameters)[1:])):
            return False
    return True


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.fixture(params=["run", "exec"])
def launch(request: pytest.FixtureRequest, root: Root, subject: Subject) -> Launcher:
    """Starts a command both ways: as the application itself, and by exec."""
    return Launcher(root, subject, request.param)
