"""What is in a build's sandbox besides this machine's /usr: a few files, and buildah's command line. Pure.

buildah is told to talk to nobody: images come from an OCI layout beside it or are there already, and the policy refuses
every other transport, whatever a Containerfile names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from isolat.images.oci import Platform
from isolat.oci.capabilities import oci_capabilities
from isolat.oci.config import MASKED, READ_ONLY
from isolat.oci.seccomp import oci_seccomp

STORAGE, WORK, BASES, CONTEXT, OURS = "/storage", "/work", "/bases", "/context", "/isolat"
RESULT, ID_FILE, UNPACKED = f"{WORK}/out", f"{WORK}/id", f"{WORK}/context"
WORK_DIRECTORIES = ("tmp", "home", "context", "cache")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_ANY = {"": [{"type": "insecureAcceptAnything"}]}
_POLICY = {"default": [{"type": "reject"}], "transports": {"oci": _ANY, "containers-storage": _ANY}}
_REGISTRIES = 'unqualified-search-registries = ["docker.io"]\nshort-name-mode = "disabled"\n'  # names only
_STORAGE = f'[storage]\ndriver = "overlay"\nrunroot = "/run/containers"\ngraphroot = "{STORAGE}/graph"\n'
_CONTAINERS = '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
_GROUP = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"
_RUNTIME = """\
#!/bin/sh
for name; do :; done
record="/run/stubs-$name"
case " $* " in
*" create "*) {python} -I -S {ours}/runtime.py create {ours}/ours.json "$record" || exit 1 ;;
*" delete "*) if [ -e "$record" ]; then {python} -I -S {ours}/runtime.py delete "$record"; fi ;;
esac
exec {crun} --cgroup-manager=disabled "$@"
"""


@dataclass(frozen=True)
class Options:
    """What ``isolat build`` says to buildah. ``timestamp``: seconds since the epoch, or -1."""

    target: str = ""
    platform: Platform | None = None
    no_cache: bool = False
    arguments: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    timestamp: int = -1


def files(
    machine: str, crun: str, python: str, runtime: str, containerfile: str | None, network: Mapping[str, str]
) -> dict[str, tuple[str, int]]:
    """Path to text and mode. ``runtime``: the text of runtime.py. ``network``: /etc/hosts and /etc/resolv.conf."""
    ours = {
        "capabilities": oci_capabilities(),
        "seccomp": oci_seccomp(machine),
        "masked": MASKED,
        "read_only": READ_ONLY,
    }
    found = {
        "/etc/containers/containers.conf": _CONTAINERS,
        "/etc/containers/policy.json": json.dumps(_POLICY),
        "/etc/containers/registries.conf": _REGISTRIES,
        "/etc/containers/storage.conf": _STORAGE,
        "/etc/group": _GROUP,
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "/etc/passwd": _PASSWD,
        **network,
        f"{OURS}/ours.json": json.dumps(ours),
        f"{OURS}/runtime.py": runtime,
        **({f"{OURS}/Containerfile": containerfile} if containerfile is not None else {}),
    }
    program = _RUNTIME.format(python=python, ours=OURS, crun=crun)
    return {path: (text, 0o644) for path, text in found.items()} | {f"{OURS}/runtime": (program, 0o755)}


def environment(proxies: Mapping[str, str]) -> dict[str, str]:
    return {
        **proxies,
        "PATH": PATH,
        "HOME": f"{WORK}/home",
        "TMPDIR": f"{WORK}/tmp",
        "XDG_RUNTIME_DIR": "/run",
        "LC_ALL": "C.UTF-8",
        "BUILDAH_ISOLATION": "rootless",
        "_CONTAINERS_USERNS_CONFIGURED": "done",  # it is in its user namespace already
    }


def build_argv(options: Options, containerfile: str, context: str, contexts: Mapping[str, str]) -> list[str]:
    """``contexts``: names that stand for an image of this id."""
    platform = options.platform
    return [
        *("buildah", "build", "--layers", "--pull-never", "--identity-label=false", "--format=oci"),
        *("--network=host", f"--runtime={OURS}/runtime", f"--iidfile={ID_FILE}"),  # "host" is the sandbox
        *(["--no-cache"] if options.no_cache else []),
        *([f"--target={options.target}"] if options.target else []),
        *([f"--platform={platform}"] if platform else []),
        *([f"--timestamp={options.timestamp}"] if options.timestamp >= 0 else []),
        *(f"--build-arg={name}={value}" for name, value in options.arguments.items()),
        *(f"--label={label}" for label in options.labels),
        *(f"--build-context={name}=container-image://{id}" for name, id in contexts.items()),
        *("--file", containerfile, context),
    ]


def unpack_argv(compression: str) -> list[str]:
    """``compression``: gzip, bzip2, xz, zstd or nothing. Owners are left out: a COPY gives its own."""
    kinds = {"": (), "gzip": ("--gzip",), "bzip2": ("--bzip2",), "xz": ("--xz",), "zstd": ("--zstd",)}
    return ["tar", "--extract", "--file=-", f"--directory={UNPACKED}", "--no-same-owner", *kinds[compression]]
