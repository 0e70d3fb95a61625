"""skopeo(1), which speaks with registries: confined, bounded, its errors told as ours.

What it reads comes from strangers, so it runs as nobody without any capability and any new privilege, dies with the
daemon, and sees of the file system (landlock(7)) the system's libraries, certificates, the resolver's files and what
is said about registries in /etc; credentials come through a descriptor. It has the network. Files that it writes are
bounded in size, and unless a transfer gives it a directory there is none in which it could make one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import selectors
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolat.errors import InvalidImage, IsolatError, NotFound, Refused, StoreError, Unsupported
from isolat.images.oci import DOCUMENT_BYTES_MAX, Platform
from isolat.images.registries.watch import Watch
from isolat.linux import child, confine

PROGRAM = "skopeo"
_OWN_FILES_BYTES = 1 << 20  # what it says, and nothing else
_SAID_BYTES = 8192
_TICK_S = 0.1
_READ = (
    "/etc/containers/registries.d",
    *("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/containers/certs.d", "/etc/docker/certs.d"),
    *("/etc/containers/registries.conf", "/etc/containers/registries.conf.d"),
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/nsswitch.conf"),
    *("/etc/services", "/etc/protocols", "/etc/localtime"),
)


@dataclass(frozen=True)
class Access:
    """How a registry is spoken with: ``tls_verify`` None is Docker's rule, ``auths`` as in containers-auth.json(5)."""

    tls_verify: bool | None = None
    auths: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def verifies(self, registry: str) -> bool:
        """Docker takes plain HTTP and any certificate from this machine itself, and from nobody else."""
        return not is_local(registry) if self.tls_verify is None else self.tls_verify


def is_local(registry: str) -> bool:
    """Whether a registry's name means this machine, as Docker sees it: localhost, 127.0.0.0/8, ::1."""
    host = registry.rsplit(":", 1)[0] if not registry.endswith("]") else registry
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def platform_options(platform: Platform) -> list[str]:
    """Which instance of an index it chooses."""
    found = ["--override-os", platform.os, "--override-arch", platform.architecture]
    return [*found, *(["--override-variant", platform.variant] if platform.variant else [])]


def check_there() -> None:
    """Raises Unsupported, with the remedy, where there is no skopeo."""
    if shutil.which(PROGRAM, path=child.SAFE_PATH) is None:
        raise Unsupported(
            "could not find skopeo, which is required to speak with registries", hint="apt-get install skopeo"
        )


def check_reachable(path: Path) -> None:
    """Raises Unsupported where nobody, as whom skopeo runs, can't get to a file that it is to read or write."""
    closed = next((one for one in path.parents if not one.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        raise Unsupported(
            f"skopeo runs as nobody, who can't enter {closed}",
            hint=f"chmod o+x {closed}, or use a state root elsewhere",
        )


@contextlib.contextmanager
def auth_file(auths: Mapping[str, Any]) -> Iterator[int]:
    """A descriptor of an auth.json that exists nowhere else; its path for the child is ``fd_path``."""
    descriptor = os.memfd_create("auth.json", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, json.dumps({"auths": dict(auths)}).encode())
        yield descriptor
    finally:
        os.close(descriptor)


def fd_path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def argv(
    words: Sequence[str], *, read: Sequence[str] = (), write: Sequence[str] = (), file_bytes: int = _OWN_FILES_BYTES
) -> list[str]:
    """The whole command line, confinement included."""
    return [
        *(sys.executable, "-I", "-S", str(Path(confine.__file__).resolve())),
        *(word for path in (*_READ, *read) for word in ("--read", path)),
        *(word for path in write for word in ("--write", path)),
        *("--nobody", "--network", "--file-bytes", str(file_bytes), "--"),
        *(PROGRAM, *words),
    ]


class Running:
    """One skopeo at work. As a context manager it is gone at the end, with all that it has started."""

    def __init__(
        self,
        command: Sequence[str],
        what: str,
        *,
        pass_fds: Sequence[int] = (),
        stdout: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        check_there()
        self.what = what
        self._said = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
                stderr=self._said,
                env=child.clean_environment(environment),
                process_group=0,
                pass_fds=tuple(pass_fds),
            )
        except OSError as error:
            os.close(self._said)
            raise StoreError(f"{what}: could not start skopeo: {error.strerror}", stage=what) from error

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._said)

    def said(self) -> str:
        """The end of what it has written to standard error."""
        size = os.fstat(self._said).st_size
        return os.pread(self._said, _SAID_BYTES, max(0, size - _SAID_BYTES)).decode(errors="replace")

    def document(self, watch: Watch, most_bytes: int = DOCUMENT_BYTES_MAX) -> bytes:
        """All that it writes to standard output, and its end. Raises what it says, and what ``watch`` says."""
        assert self.process.stdout is not None
        found = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                watch.check()
                if not selector.select(_TICK_S):
                    continue
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                found += chunk
                if len(found) > most_bytes:
                    raise InvalidImage(f"{self.what}: more than {most_bytes} bytes came", stage="too-large")
                if not chunk:
                    break
        self.finish(watch)
        return found

    def finish(self, watch: Watch) -> None:
        """Wait for its end. Raises what it says when it failed."""
        while self.process.poll() is None:
            watch.check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_TICK_S)
        if self.process.returncode:
            raise self.failure()

    def failure(self) -> IsolatError:
        """Why it ended, as one of our errors."""
        code = self.process.returncode
        if code is not None and code < 0:
            return StoreError(f"{self.what} failed: skopeo was killed by signal {-code}", stage="skopeo")
        return told(_last_words(self.said()), self.what)


_FATAL = re.compile(r'level=fatal msg=("(?:[^"\\]|\\.)*")')
_NAMING = re.compile(r'^(?:[Ee]rror )?(?:parsing image name|initializing source) "?[^ ]*"?: ')


def _last_words(said: str) -> str:
    found = _FATAL.findall(said)
    if not found:
        return said.strip().rpartition("\n")[2] or "it said nothing"
    try:
        return str(json.loads(found[-1]))
    except ValueError:
        return str(found[-1])


# Who asks, and the query, in which registries have tokens and signatures of their own
_SECRET = re.compile(r"""(\b[a-z]+://)(?:[^\s"'/@]*@)?([^\s"'?]*)(?:\?[^\s"']*)?""")
# What somebody has chosen, and means nothing: addresses, hosts, repositories, tags ("denied", "signature-service")
_NAMES = re.compile(r"(?<=manifest )\S+ in \S+|(?:container registry|lookup) \S+|\S*/\S*|\S*\w\.\w\S*")
_TOLD_CHARACTERS = 2000

# What containers/image and registries say (distribution-spec, error codes), and what it means here.
_MEANINGS: tuple[tuple[re.Pattern[str], type[IsolatError], str, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, stage, hint)
    for pattern, kind, stage, hint in (
        (r"rejected by policy|signature|Source image rejected", InvalidImage, "policy",
         "policy.json says what is accepted: docs/images.md"),
        (r"corrupted blob|does not match|digest mismatch|checksum", InvalidImage, "digest-mismatch", ""),
        (r"expected \d+ bytes in blob|unexpected EOF", InvalidImage, "truncated", "try again"),
        (r"unauthorized|authentication required|access to the resource is denied|denied:|status 40[13]", Refused,
         "credentials", "isolat login REGISTRY; or the name is wrong: many registries don't tell one from the other"),
        (r"no image found in", NotFound, "no-platform", "choose another with --platform"),
        (r"manifest unknown|name unknown|blob unknown|not found|status 404|StatusCode: 404", NotFound, "not-found", ""),
        (r"server gave HTTP response to HTTPS|certificate|tls:", StoreError, "tls",
         "--tls-verify=false takes plain HTTP and any certificate"),
        (r"toomanyrequests|status 429", StoreError, "rate-limit", "log in, or try again later"),
        (r"no such host|connection refused|network is unreachable|no route to host|timeout", StoreError, "network", ""),
        (r"unsupported|schema1|unknown.*(type|version)", InvalidImage, "bad-manifest", ""),
    )
)  # fmt: skip


def told(message: str, what: str) -> IsolatError:
    """What skopeo says as an error of the tree. Network and protocol of a registry are StoreError."""
    message = _SECRET.sub(r"\1\2", _NAMING.sub("", message.strip()))[:_TOLD_CHARACTERS]
    meant = _NAMES.sub(" ", message)
    for pattern, kind, stage, hint in _MEANINGS:
        if pattern.search(meant):
            return kind(f"{what}: {message}", stage=stage, hint=hint)
    return StoreError(f"{what}: {message}", stage="registry")
