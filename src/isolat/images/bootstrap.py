"""Images of Debian itself, made from its packages on this machine: nobody's binary is trusted but the distribution's.

``mmdebstrap`` checks the archive's signatures against the keys of debian-archive-keyring and lets apt download and
dpkg install. Its maintainer scripts run as root in a chroot, as on every Debian installation; here also in mount, PID,
IPC and UTS namespaces of their own, so that no mount and no process of theirs can stay behind. The network is theirs.
The result is read name by name in its own directories (images/flatten/pack.py), whatever links it has.

The archive's mirror is mmdebstrap's default; ISOLAT_DEBIAN_MIRROR names another.

``debian`` is for the layers that bring an init of their own. ``debian-systemd`` is the same suite as a machine runs it,
with systemd, udev and a message bus: what the layer ``vm`` needs, which boots it. Ordinary images for ordinary layers
otherwise: only the packages that are included when nothing is said differ.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import Unsupported, UsageError
from isolat.images import host, tidy
from isolat.images.image import Image, ImageConfig
from isolat.images.progress import Progress, no_progress
from isolat.images.store import Build, ImageStore
from isolat.linux import child

DEFAULT_SUITE = "bookworm"
DEFAULT_INCLUDE = ("python3-minimal",)
SYSTEMD = "debian-systemd"
SYSTEMD_INCLUDE = ("dbus", "kmod", "login", "python3-minimal", "systemd-sysv", "udev")
_INCLUDED = {"debian": DEFAULT_INCLUDE, SYSTEMD: SYSTEMD_INCLUDE}
SUITES = ("bullseye", "bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "i386", "riscv64": "riscv64", "ppc64le": "ppc64el"}
_QEMU = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "arm", "i386": "i386", "riscv64": "riscv64"}
_QEMU |= {"ppc64el": "ppc64le", "s390x": "s390x"}
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?")
_PACKAGE_LETTERS_MAX = 100
_EPOCH = "1700000000"  # what the scripts take for now; the files' times are set afterwards (images/tidy.py)
_BOOTSTRAP_S = 1800.0
_MMDEBSTRAP_STEPS = 8  # lines "I: …" of one run
_LEFT_OUT = ("man", "info", "locale", "lintian", "doc")


def bootstrap(
    store: ImageStore,
    name: str,
    include: Sequence[str] | None = None,
    arch: str = "",
    d: Deadline = NEVER,
    progress: Progress = no_progress,
) -> Image:
    """Make the image ``debian``, ``debian-systemd``, either with ``:SUITE``, or ``host``, and give it its names.

    ``debian`` alone makes ``debian:bookworm`` and ``debian:latest``. ``include``: further packages (what the name
    stands for when nothing is said; for ``debian-systemd`` these come on top). Raises UsageError for a name it can't
    make, Unsupported for what is missing here, StoreError with the last lines of mmdebstrap when that fails.
    """
    if name in ("host", "host:latest"):
        if include or arch:
            raise UsageError("the image `host` is this machine's own /usr: it takes no packages and no architecture")
        return host.bootstrap(store, d, progress)
    suite = parse_suite(name)
    packages = check_packages(included(name, include))
    architecture = check_architecture(arch)
    if shutil.which("mmdebstrap", path=child.SAFE_PATH) is None:
        raise Unsupported(
            "could not find mmdebstrap, which is required to make a Debian image", hint="apt-get install mmdebstrap"
        )
    distribution, colon, _ = name.partition(":")
    names = [f"{distribution}:{suite}"] if colon else [f"{distribution}:{suite}", f"{distribution}:latest"]
    return _build(store, suite, packages, architecture, names, d.sooner(_BOOTSTRAP_S), progress)


def _build(
    store: ImageStore,
    suite: str,
    packages: Sequence[str],
    architecture: str,
    names: Sequence[str],
    d: Deadline,
    progress: Progress,
) -> Image:
    config = ImageConfig(
        kind="debian",
        command=("bash",),
        architecture=architecture,
        source=f"debian {suite} with {', '.join(packages) or 'nothing more'}",
    )
    with store.build() as build:
        tree = _make_tree(build, suite, packages, architecture, d, progress)
        progress("packing the file system", _MMDEBSTRAP_STEPS, _MMDEBSTRAP_STEPS + 1)
        tidy.tidy(tree)
        tidy.drop_special_files(tree)
        image = build.finish(tree, config, names, d)
    progress(f"made image {image.digest[:12]}", _MMDEBSTRAP_STEPS + 1, _MMDEBSTRAP_STEPS + 1)
    return image


def _make_tree(
    build: Build, suite: str, packages: Sequence[str], architecture: str, d: Deadline, progress: Progress
) -> Path:
    tree, temporary = build.path / "tree", build.path / "tmp"
    temporary.mkdir(mode=0o1777)
    temporary.chmod(0o1777)
    done = 0

    def on_line(line: str) -> None:
        nonlocal done
        if line.startswith("I: ") and "success" not in line:
            progress(line.removeprefix("I: ").rstrip("."), min(done, _MMDEBSTRAP_STEPS), _MMDEBSTRAP_STEPS + 1)
            done += 1

    child.run(
        mmdebstrap_argv(tree, suite, packages, architecture, os.environ.get("ISOLAT_DEBIAN_MIRROR", "")),
        f"bootstrapping Debian {suite}",
        d,
        environment={"TMPDIR": str(temporary), "SOURCE_DATE_EPOCH": _EPOCH, "DEBIAN_FRONTEND": "noninteractive"},
        on_line=on_line,
        pass_fds=(build.lock,),
    )
    return tree


def mmdebstrap_argv(tree: Path, suite: str, packages: Sequence[str], architecture: str, mirror: str) -> list[str]:
    """The whole command line. The death signal reaches unshare(1), and through --kill-child all that is inside."""
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT]
    return [
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--"),
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase"),
        *([f"--include={','.join(packages)}"] if packages else []),
        f"--architectures={architecture}",
        '--aptopt=Acquire::Languages "none"',
        *excluded,
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--dpkgopt=path-include=/usr/share/locale/locale.alias",
        *(suite, str(tree)),
        *([mirror] if mirror else []),
    ]


def included(name: str, include: Sequence[str] | None) -> tuple[str, ...]:
    """The packages beyond the minimum. What is asked for replaces the default, but never takes a system's init."""
    distribution = name.partition(":")[0]
    if include is None:
        return _INCLUDED[distribution]
    return (*include, *SYSTEMD_INCLUDE) if distribution == SYSTEMD else tuple(include)


def parse_suite(name: str) -> str:
    """The suite that ``debian``, ``debian-systemd`` or either with ``:SUITE`` means. Raises UsageError."""
    distribution, colon, suite = name.partition(":")
    if distribution not in _INCLUDED:
        raise UsageError(
            f"can't bootstrap {name!r}",
            hint="`debian`, `debian-systemd` (which the layer vm boots), both also with `:SUITE`, and `host` are known",
        )
    if not colon or suite == "latest":
        return DEFAULT_SUITE
    if suite not in SUITES:
        raise UsageError(f"there is no Debian suite {suite!r} here", hint=f"the suites are: {', '.join(SUITES)}")
    return suite


def check_packages(packages: Sequence[str]) -> tuple[str, ...]:
    """Sorted, each once. Raises UsageError for what can't be a package's name (deb-control(5), Package)."""
    for package in packages:
        if not _PACKAGE.fullmatch(package) or len(package) > _PACKAGE_LETTERS_MAX:
            raise UsageError(f"{package!r} can't be the name of a Debian package")
    return tuple(sorted(set(packages)))


def check_architecture(arch: str) -> str:
    """Debian's name of the architecture. Raises UsageError, and Unsupported where it can't be run here."""
    native = _ARCHITECTURES.get(platform.machine(), platform.machine())
    wanted = _ARCHITECTURES.get(arch, arch) or native
    if wanted == native or (native, wanted) == ("amd64", "i386"):
        return wanted
    if wanted not in _QEMU:
        raise UsageError(
            f"there is no architecture {arch!r}", hint=f"the architectures are: {', '.join(sorted(_QEMU))}"
        )
    if not Path(f"/proc/sys/fs/binfmt_misc/qemu-{_QEMU[wanted]}").exists():
        raise Unsupported(
            f"this machine is {native} and can't run {wanted}, which installing its packages requires",
            hint="apt-get install qemu-user-static binfmt-support",
        )
    return wanted
