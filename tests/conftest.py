"""What holds for every test: who may skip what, and when.

``root``: makes real environments; skipped without root, but failed instead of skipped where ISOLAT_MUST_WORK is set
(CI), because a suite that passes by not looking is worse than none. ``soak``: only when asked for with ``-m soak``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

MUST_WORK = os.environ.get("ISOLAT_MUST_WORK", "") not in ("", "0")


# A shell starts what is in its background with interrupts ignored (POSIX, "Asynchronous Lists"), nohup(1) does so with
# hangups; and what a test then starts would ignore them, too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in str(config.getoption("markexpr", "")):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything must work, a skipped test has failed. An expected failure is not a skipped test."""
    report = yield
    if MUST_WORK and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} would have been skipped, and ISOLAT_MUST_WORK is set: {reason}"
    return report
