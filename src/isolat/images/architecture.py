"""Whether this machine can run an image's programs, before anything starts: else it ends in `exec format error`."""

from __future__ import annotations

from pathlib import Path

from isolat.errors import Unsupported
from isolat.images.oci import own_platform

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_COMPATIBLE = {("amd64", "386"), ("amd64", "i386"), ("arm64", "arm"), ("arm64", "armhf"), ("arm64", "armel")}
_QEMU = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "arm", "armel": "arm", "386": "i386", "ppc64el": "ppc64le"}


def check(name: str, architecture: str, *, emulated: bool) -> None:
    """Raises Unsupported for an image whose CPU is neither this machine's nor emulated here.

    ``emulated``: whether this kernel's interpreters are there where it will run, which they are not in a machine.

    An interpreter counts when it is registered to be opened in advance (flag F, binfmt_misc of the kernel's
    documentation): only then is it found from inside of another root.
    """
    native = own_platform().architecture
    if not architecture or architecture == native or (native, architecture) in _COMPATIBLE:
        return
    entry = _BINFMT / f"qemu-{_QEMU.get(architecture, architecture)}"
    try:
        lines = entry.read_text().splitlines()
    except OSError:
        lines = []
    if emulated and "enabled" in lines and any(line.startswith("flags:") and "F" in line for line in lines):
        return
    raise Unsupported(
        f"the image {name} is for {architecture}, and this machine is {native}",
        hint="apt-get install qemu-user-static binfmt-support, for containers; or take the image for this machine",
    )
