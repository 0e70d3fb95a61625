"""Every test of this folder runs once for each layer and stack; ``--layer NAME`` (repeatable) chooses others."""

from __future__ import annotations

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


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.fixture(params=["run", "exec"])
def launch(request: pytest.FixtureRequest, root: Root, subject: Subject) -> Launcher:
    """Starts a command both ways: as the application itself, and by exec."""
    if request.param == "exec" and not subject.can.enter:
        pytest.skip(f"{subject.name} declares that it cannot be entered")
    return Launcher(root, subject, request.param)
