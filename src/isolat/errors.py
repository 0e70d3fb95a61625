"""Every error that Isolat raises, as one tree.

The library raises; only the command line turns an error into text and an exit code. Each class has a stable
``code`` that never changes once released, so that programs can tell errors apart without reading messages.

::

    IsolatError
    ├── UsageError            usage            the command line or a request is malformed
    │   └── SpecError         spec             one or more fields of a spec are wrong, each with its path
    ├── NotFound              not-found        no such environment, layer, volume, file
    │   └── ImageNotFound     image-not-found  no such image here; pulling it may help
    ├── Conflict              conflict         the name is taken, the thing is in use
    │   └── Busy              busy             another operation holds this environment
    ├── IllegalState          state            the verb is not legal in the environment's state
    ├── Unsupported           unsupported      the layer or this machine cannot do it; refused before any effect
    ├── Refused               refused          admission: it would starve the machine; or the caller lacks rights
    ├── StartFailed           start            a stage of making an environment failed, with errno and log tail
    │   ├── NotExecutable     not-executable   the command was found but cannot be executed (exit code 126)
    │   └── CommandNotFound   command-not-found the command does not exist inside (exit code 127)
    ├── DeadlineExceeded      deadline         an operation did not end in its time
    ├── Lost                  lost             the environment's keeper or machine died; nothing is known of its end
    ├── ProtocolError         protocol         a peer sent what the protocol does not allow
    ├── DaemonUnavailable     daemon           the daemon cannot be reached or started
    ├── CopyFailed            copy             files could not be read or written, inside or outside
    ├── StoreError            store            an image could not be built or is damaged
    │   ├── BuildFailed       build            a Containerfile does not build (exit code 1); ``details``: its last lines
    │   └── InvalidImage      invalid-image    what came from elsewhere breaks the rules; ``stage`` names which
    └── InternalError         internal         a defect of Isolat itself
"""

from __future__ import annotations

from typing import ClassVar

EXIT_BUILD = 1
EXIT_OURS = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


class IsolatError(Exception):
    """The root of the tree.

    ``message`` says what failed, on what and why; ``hint`` what to do about it; ``stage`` where in a longer
    operation; ``details`` further lines (field errors, the tail of a log).
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = EXIT_OURS

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        stage: str = "",
        errno: int = 0,
        details: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.stage = stage
        self.errno = errno
        self.details = details

    def to_json(self) -> dict[str, object]:
        """The form that travels from the daemon to a client."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "stage": self.stage,
            "errno": self.errno,
            "details": list(self.details),
        }


class UsageError(IsolatError):
    code = "usage"


class SpecError(UsageError):
    """All errors of a spec at once: ``details`` holds one ``path: reason`` line for each."""

    code = "spec"


class NotFound(IsolatError):
    code = "not-found"


class ImageNotFound(NotFound):
    code = "image-not-found"


class Conflict(IsolatError):
    code = "conflict"


class Busy(Conflict):
    code = "busy"


class IllegalState(IsolatError):
    code = "state"


class Unsupported(IsolatError):
    code = "unsupported"


class Refused(IsolatError):
    code = "refused"


class StartFailed(IsolatError):
    code = "start"


class NotExecutable(StartFailed):
    code = "not-executable"
    exit_code = EXIT_NOT_EXECUTABLE


class CommandNotFound(StartFailed):
    code = "command-not-found"
    exit_code = EXIT_NOT_FOUND


class DeadlineExceeded(IsolatError):
    code = "deadline"


class Lost(IsolatError):
    code = "lost"


class ProtocolError(IsolatError):
    code = "protocol"


class DaemonUnavailable(IsolatError):
    code = "daemon"


class CopyFailed(IsolatError):
    code = "copy"


class StoreError(IsolatError):
    code = "store"


class BuildFailed(StoreError):
    """A Containerfile that does not build, as opposed to whatever else can go wrong when one is built."""

    code = "build"
    exit_code = EXIT_BUILD


class InvalidImage(StoreError):
    """An archive, manifest or blob from elsewhere that is refused. ``stage`` is a stable word for the reason."""

    code = "invalid-image"


class InternalError(IsolatError):
    code = "internal"


def _tree(cls: type[IsolatError]) -> dict[str, type[IsolatError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[IsolatError]] = _tree(IsolatError)


def from_json(data: object) -> IsolatError:
    """Rebuild an error that came from the daemon; an unknown code becomes the root class.

    The classes differ only in their code, so nothing is lost. Never raises: what is not of the form
    becomes an ``InternalError``.
    """
    if not isinstance(data, dict):
        return InternalError(f"the daemon answered with a malformed error: {data!r}")
    cls = BY_CODE.get(str(data.get("code")), IsolatError)
    details = data.get("details")
    errno = data.get("errno")
    return cls(
        str(data.get("message", "")),
        hint=str(data.get("hint", "")),
        stage=str(data.get("stage", "")),
        errno=errno if isinstance(errno, int) else 0,
        details=tuple(str(line) for line in details) if isinstance(details, list) else (),
    )
