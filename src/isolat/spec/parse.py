"""A Compose service to a ``Spec`` and back.

One table says what each key is; reading, writing, the JSON Schema and docs/spec.md all follow it. Every error
of a service is reported at once, each with its path. Nothing but SpecError is ever raised, whatever the
input.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from isolat.spec import mounts, values
from isolat.spec.model import Spec
from isolat.spec.problems import Problems, child, did_you_mean, quote
from isolat.spec.values import Kind

MIN_MEMORY_BYTES = 6 << 20
MAX_SECONDS = 10 * 365 * 86400.0
MAX_FILE_BYTES = 1 << 20
MAX_FILE_NODES = 100_000

_NAME = "[a-zA-Z0-9][a-zA-Z0-9_.-]+"
_INSIDE = "[a-zA-Z0-9][a-zA-Z0-9_.-]*"  # the beginning of an id, too
_IMAGE = "[a-zA-Z0-9][a-zA-Z0-9_.:/@+-]*"
_USER = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]*\$?(:[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_NETWORKS = {"none": "none", "host": "host"}


@dataclass(frozen=True)
class Key:
    """One key of a service: its field in the model, its form, and what it is for."""

    name: str
    field: str
    kind: Kind
    summary: str


_ACCELERATORS = {word: word for word in ("auto", "tcg", "kvm")}

KEYS: tuple[Key, ...] = (
    Key("image", "image", values.text(_IMAGE, "an image's name", 512), "the root filesystem; required"),
    Key("runtime", "layers", mounts.LAYERS, "the layer, or a stack of layers from the hardware up"),
    Key("container_name", "name", values.text(_NAME, f"a name ({_NAME})", 128), "the environment's name"),
    Key("command", "command", values.WORDS, "a list, or one line that is split as a shell would"),
    Key("entrypoint", "entrypoint", values.WORDS, "goes before the command; empty: none, not even the image's"),
    Key("environment", "environment", values.pairs(False), "variables: a map or a list of NAME=value"),
    Key("working_dir", "working_dir", values.PATH, "where the command starts"),
    Key("user", "user", values.text(_USER, "a user[:group]", 128, numbers=True), "name or uid, with a group"),
    Key("hostname", "hostname", values.text(rf"{_LABEL}(\.{_LABEL})*", "a host name", 64), "its host name"),
    Key("tty", "tty", values.FLAG, "a terminal for the command"),
    Key("stdin_open", "stdin_open", values.FLAG, "the caller's standard input is passed on"),
    Key("read_only", "read_only", values.FLAG, "the root filesystem cannot be written"),
    Key("init", "init", values.FLAG, "a small init is the first process"),
    Key("network_mode", "network_mode", values.choice(_NETWORKS, "; no others yet"), "none or host"),
    Key("mem_limit", "memory_bytes", values.size(MIN_MEMORY_BYTES), "memory"),
    Key("memswap_limit", "memory_swap_bytes", values.size(MIN_MEMORY_BYTES), "memory and swap together"),
    Key("cpus", "cpus", values.number(0.01, 4096), "how many CPUs' time it may use"),
    Key("cpu_shares", "cpu_shares", values.whole(2, 262144), "weight against others when CPUs are short"),
    Key("pids_limit", "pids_limit", values.whole(1, 4194304, "; there is always a limit"), "processes"),
    Key("volumes", "volumes", mounts.VOLUMES, "SOURCE:TARGET[:ro], or maps of type bind or volume"),
    Key("tmpfs", "tmpfs", mounts.TMPFS, "TARGET or TARGET:size=64m; one or a list"),
    Key("labels", "labels", values.pairs(True), "a map or a list of NAME=value"),
    Key("stop_grace_period", "stop_grace_s", values.duration(0, 86400), "between asking and killing"),
    Key("stop_signal", "stop_signal", values.SIGNAL, "what it is asked to end with"),
    Key("logging", "logging", mounts.LOGGING, "driver: file (also: json-file) or none"),
    Key("storage_opt", "disk_bytes", mounts.STORAGE, "size: what may be written to the root filesystem"),
    Key("x-in", "inside", values.text(_INSIDE, "an environment's name or id", 128), "the environment it is put into"),
    Key("x-timeout", "timeout_s", values.duration(0.001, MAX_SECONDS), "it is killed when it has run so long"),
    Key("x-remove", "remove", values.FLAG, "it is removed when it has ended"),
    Key(
        "x-oci-runtime",
        "oci_runtime",
        values.text("[a-zA-Z0-9_/][a-zA-Z0-9_./+-]*", "a program", 255),
        "the OCI runtime of the container layer: crun, runc, or a path",
    ),
    Key("x-accel", "accel", values.choice(_ACCELERATORS), "how a machine's processors run"),
    Key("x-kernel", "kernel", values.PATH, "a machine's kernel: a bzImage or vmlinux with its modules beside it"),
)
BY_NAME = {key.name: key for key in KEYS}
LAYER_OPTIONS = re.compile("x-([a-z][a-z0-9-]{0,31})")
_COMPOSE = """
    annotations attach build blkio_config cap_add cap_drop cgroup cgroup_parent configs cpu_count cpu_percent
    cpu_period cpu_quota cpu_rt_period cpu_rt_runtime cpuset credential_spec depends_on deploy develop
    device_cgroup_rules devices dns dns_opt dns_search domainname driver_opts env_file expose
    extends external_links extra_hosts gpus group_add healthcheck ipc isolation label_file links mac_address
    mem_reservation mem_swappiness models networks oom_kill_disable oom_score_adj pid platform ports
    post_start pre_stop privileged profiles provider pull_policy restart scale secrets security_opt shm_size
    sysctls ulimits use_api_socket userns_mode uts volumes_from
"""
_COMPOSE_KEYS = frozenset(_COMPOSE.split())


def parse(data: object, path: str = "") -> Spec:
    """The spec of one service. ``path`` goes before every error's path. Raises SpecError with all errors."""
    problems = Problems()
    spec = _service(data, path, problems)
    problems.check()
    assert spec is not None  # no problem, so it was made
    return spec


def _service(data: object, path: str, problems: Problems) -> Spec | None:
    if not isinstance(data, dict):
        problems.add(path, f"a service must be a map, not {quote(data)}")
        return None
    found: dict[str, Any] = {}
    options: list[tuple[str, Any]] = []
    for name, value in data.items():
        at = child(path, name)
        key = BY_NAME.get(name) if isinstance(name, str) else None
        layer = None if key or not isinstance(name, str) else LAYER_OPTIONS.fullmatch(name)
        if key is not None:
            read = None if value is None else key.kind.read(value, at, problems)
            if read is not None:
                found[key.field] = read
        elif layer and isinstance(value, dict):
            options.append((layer[1], values.read_open_map(value, at, problems)))
        else:
            problems.add(at, _unknown(name))
    if data.get("image") is None:
        problems.add(child(path, "image"), "is missing: every service needs an image")
    _check_together(found, path, problems)
    return None if problems.lines else Spec(**found, options=tuple(options))


def _unknown(name: object) -> str:
    if not isinstance(name, str):
        return "a key must be text"
    if name in _COMPOSE_KEYS:
        return "is a Compose key that Isolat does not support yet"
    if LAYER_OPTIONS.fullmatch(name):
        return "is not known" + (did_you_mean(name, BY_NAME) or "; options of a layer (x-LAYER) must be a map")
    return "is not known" + did_you_mean(name, BY_NAME)


def _check_together(found: dict[str, Any], path: str, problems: Problems) -> None:
    """What no single key can tell."""
    swap, memory = found.get("memory_swap_bytes"), found.get("memory_bytes", Spec.memory_bytes)
    if swap is not None and swap < memory:
        problems.add(f"{path}.memswap_limit", f"is less than the memory ({memory} bytes), which it includes")
    seen: set[str] = set()
    for key in ("volumes", "tmpfs"):
        for i, entry in enumerate(found.get(key, ())):
            if entry.target in seen:
                problems.add(f"{path}.{key}[{i}]", f"{quote(entry.target)} is already a target")
            seen.add(entry.target)


_DEFAULTS = {field.name: field.default for field in fields(Spec)}


def to_service(spec: Spec) -> dict[str, Any]:
    """The service of a spec, without what is as it is by default: ``parse(to_service(spec)) == spec``."""
    service: dict[str, Any] = {}
    for key in KEYS:
        value = getattr(spec, key.field)
        if value != _DEFAULTS[key.field]:
            service[key.name] = key.kind.write(value)
    for layer, options in spec.options:
        service[f"x-{layer}"] = options
    return service


def parse_file(path: Path) -> Spec:
    """The spec of a Compose file with one service. Raises SpecError, also where the file cannot be read."""
    problems = Problems()
    data = _load(path, problems)
    problems.check()
    services = _services(data, problems)
    problems.check()
    ((name, service),) = services.items()
    where = child(".services", name)
    service = _literal(service, where, problems, 32, [MAX_FILE_NODES])
    problems.check()
    return parse(_relative_to(service, path.parent), where)


def _load(path: Path, problems: Problems) -> object:
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            problems.add(str(path), f"is larger than {MAX_FILE_BYTES} bytes")
            return None
        return yaml.safe_load(content)
    except OSError as error:
        problems.add(str(path), f"cannot be read: {error.strerror}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.add(str(path), f"is not YAML: {' '.join(str(error).split())[:300]}")
    return None


def _services(data: object, problems: Problems) -> dict[str, Any]:
    if not isinstance(data, dict) or not isinstance(data.get("services"), dict) or not data["services"]:
        problems.add(".services", "a Compose file needs a map of services")
        return {}
    for key in data:
        if key not in {"services", "name", "version"} and not (isinstance(key, str) and key.startswith("x-")):
            problems.add(child("", key), "is not supported yet")
    services: dict[str, Any] = data["services"]
    if len(services) != 1:
        problems.add(".services", f"has {len(services)} services; only one is supported for now")
    return services


def _literal(value: object, path: str, problems: Problems, depth: int, budget: list[int]) -> Any:
    """A copy with ``$$`` as ``$``. A variable is refused: taken as text it would be wrong silently."""
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        if budget[0] == -1 or depth == 0:
            problems.add(path, "is nested too deeply or too large")
        return None
    if isinstance(value, str):
        if "$" in value.replace("$$", ""):
            problems.add(path, "variables are not interpolated; write $$ for a dollar sign")
        return value.replace("$$", "$")
    if isinstance(value, dict):
        return {k: _literal(v, child(path, k), problems, depth - 1, budget) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(v, f"{path}[{i}]", problems, depth - 1, budget) for i, v in enumerate(value)]
    return value


def _relative_to(service: Any, directory: Path) -> Any:
    """Volume sources that begin with a dot are relative to the file, as in Compose."""
    volumes = service.get("volumes") if isinstance(service, dict) else None
    if not isinstance(volumes, list):
        return service
    changed: list[object] = []
    for entry in volumes:
        if isinstance(entry, str) and entry.startswith("."):
            source, colon, rest = entry.partition(":")
            changed.append(f"{(directory / source).resolve()}{colon}{rest}")
        elif isinstance(entry, dict) and str(entry.get("source", "")).startswith("."):
            changed.append({**entry, "source": str((directory / entry["source"]).resolve())})
        else:
            changed.append(entry)
    return {**service, "volumes": changed}
