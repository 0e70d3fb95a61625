"""Isolat: isolated execution environments at every kind of virtualization, from one spec.

::

    import isolat

    print(isolat.run("debian", ["echo", "hello"]).stdout)
    with isolat.Client().run("debian", ["sleep", "60"], detach=True) as env:
        env.exec(["true"]).check()

Names are loaded when they are first used: ``import isolat`` itself costs nothing, because every command pays for it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isolat.client.logs import LogRecord
    from isolat.client.sdk import Client, CommandFailed, Environment, Exit, Result, run
    from isolat.errors import IsolatError

__version__ = "0.1.0"
__all__ = [
    "Client",
    "CommandFailed",
    "Environment",
    "Exit",
    "IsolatError",
    "LogRecord",
    "Result",
    "__version__",
    "run",
]

_WHERE = {
    "Client": "isolat.client.sdk",
    "CommandFailed": "isolat.client.sdk",
    "Environment": "isolat.client.sdk",
    "Exit": "isolat.client.sdk",
    "IsolatError": "isolat.errors",
    "LogRecord": "isolat.client.logs",
    "Result": "isolat.client.sdk",
    "run": "isolat.client.sdk",
}


if not TYPE_CHECKING:  # to a type checker only the names above exist

    def __getattr__(name: str) -> object:
        where = _WHERE.get(name)
        if where is None:
            raise AttributeError(f"module 'isolat' has no attribute {name!r}")
        return getattr(__import__(where, fromlist=[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
