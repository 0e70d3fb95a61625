"""Specs that the parser can produce, for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isolat.spec.model import Spec, Tmpfs, Volume
from isolat.volumes import record

MIB = 1 << 20
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NAMES = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,20}", fullmatch=True)
LAYERS = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
COMPONENTS = TEXT.map(lambda text: text.replace("/", "_").replace(":", ";")).filter(
    lambda text: text not in {"", ".", ".."}
)
PATHS = st.lists(COMPONENTS, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
VOLUMES = st.from_regex(record.NAME, fullmatch=True)
VARIABLES = TEXT.map(lambda text: text.replace("=", "_")).filter(bool)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OURS = {"timeout", "remove", "oci-runtime"}


def _durations(first_ns: int, last_ns: int) -> st.SearchStrategy[float]:
    return st.integers(first_ns, last_ns).map(lambda count: count / 10**9)


def _pairs() -> st.SearchStrategy[tuple[tuple[str, str], ...]]:
    return st.dictionaries(VARIABLES, TEXT, max_size=4).map(lambda found: tuple(found.items()))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    memory = draw(st.integers(6 * MIB, 1 << 45))
    targets = draw(st.lists(PATHS, unique=True, max_size=4))
    split = draw(st.integers(0, len(targets)))
    options = draw(
        st.dictionaries(
            LAYERS.filter(lambda name: name not in OURS), st.dictionaries(TEXT, JSON, max_size=3), max_size=2
        )
    )
    values: dict[str, Any] = {
        "image": draw(st.from_regex(r"[a-z0-9][a-z0-9_.:/@-]{0,20}", fullmatch=True)),
        "layers": tuple(draw(st.lists(LAYERS, min_size=1, max_size=4))),
        "name": draw(st.just("") | NAMES),
        "command": tuple(draw(st.just([]) | st.tuples(TEXT.filter(bool), TEXT, TEXT))),
        "environment": draw(_pairs()),
        "working_dir": draw(st.just("") | PATHS),
        "user": draw(st.sampled_from(["", "root", "1000", "1000:100", "www-data:staff", "_apt"])),
        "hostname": draw(st.sampled_from(["", "web", "a.example", "x-1"])),
        **{name: draw(st.booleans()) for name in ("tty", "stdin_open", "read_only", "init", "remove")},
        "network_mode": draw(st.sampled_from(["none", "host"])),
        "memory_bytes": memory,
        "memory_swap_bytes": draw(st.none() | st.integers(memory, 1 << 46)),
        "cpus": draw(st.floats(0.01, 4096)),
        "cpu_shares": draw(st.integers(2, 262144)),
        "pids_limit": draw(st.integers(1, 4194304)),
        "disk_bytes": draw(st.integers(16 * MIB, 1 << 50)),
        "volumes": tuple(Volume(draw(PATHS | VOLUMES), target, draw(st.booleans())) for target in targets[:split]),
        "tmpfs": tuple(Tmpfs(target, draw(st.integers(4096, 1 << 50))) for target in targets[split:]),
        "labels": draw(_pairs()),
        "stop_grace_s": draw(_durations(0, 86400 * 10**9)),
        "timeout_s": draw(st.none() | _durations(10**6, 10**17)),
        "logging": draw(st.sampled_from(["file", "none"])),
        "oci_runtime": draw(st.sampled_from(["", "runc", "/usr/bin/crun"])),
        "accel": draw(st.sampled_from(["auto", "tcg", "kvm"])),
        "kernel": draw(st.sampled_from(["", "/boot/vmlinuz"])),
        "options": tuple(options.items()),
    }
    return Spec(**values)
