"""The parts of a service that are made of several values: volumes, tmpfs, logging, storage_opt, the stack."""

from __future__ import annotations

import re

from isolat.spec import units
from isolat.spec.model import Tmpfs, Volume
from isolat.spec.problems import Problems, quote
from isolat.spec.values import FLAG, PATH, Kind, Schema, absolute, choice, known_keys, size, text
from isolat.volumes import record

MAX_VOLUMES = 64
MAX_TMPFS = 64
MAX_LAYERS = 4
TMPFS_SIZE = size(4 << 10)
DISK_SIZE = size(16 << 20)
DRIVER = choice({"file": "file", "json-file": "file", "none": "none"})
_LAYER = "[a-z][a-z0-9-]{0,31}"
VOLUME_SIZE = size(record.MIN_BYTES)
_BIND, _VOLUME = "bind", "volume"
_VOLUME_NAME = text(record.NAME.pattern, f"a volume's name ({record.NAME.pattern})", 128)


def _read_volumes(value: object, path: str, problems: Problems) -> tuple[Volume, ...] | None:
    if not isinstance(value, list | tuple):
        problems.add(path, f"must be a list, not {quote(value)}")
        return None
    if len(value) > MAX_VOLUMES:
        problems.add(path, f"has {len(value)} volumes; at most {MAX_VOLUMES} are allowed")
        return None
    found = [_volume(entry, f"{path}[{i}]", problems) for i, entry in enumerate(value)]
    return tuple(volume for volume in found if volume is not None)


def _volume(entry: object, path: str, problems: Problems) -> Volume | None:
    if isinstance(entry, str):
        return _short(entry, path, problems)
    parts = known_keys(entry, path, problems, ("type", "source", "target", "read_only"))
    if parts is None:
        return None
    kind = _kind(parts, f"{path}.type", problems)
    source = _source(parts.get("source"), f"{path}.source", problems, kind)
    target = _target(parts.get("target"), f"{path}.target", problems)
    read_only = FLAG.read(parts.get("read_only", False), f"{path}.read_only", problems)
    if kind is None or source is None or target is None or read_only is None:
        return None
    return Volume(source, target, read_only)


def _kind(parts: dict[str, object], path: str, problems: Problems) -> str | None:
    """bind or volume; where it is not said, as the source looks."""
    source = parts.get("source")
    kind = parts.get("type", _BIND if not isinstance(source, str) or "/" in source else _VOLUME)
    if isinstance(kind, str) and kind in (_BIND, _VOLUME):
        return kind
    problems.add(path, f"{quote(kind)} is not one of {_BIND}, {_VOLUME}")
    return None


def _short(entry: str, path: str, problems: Problems) -> Volume | None:
    source_text, _, rest = entry.partition(":")
    target_text, colon, mode = rest.partition(":")
    if not source_text or not target_text:
        problems.add(path, f"{quote(entry)} must be SOURCE:TARGET or SOURCE:TARGET:ro")
        return None
    if colon and mode not in {"ro", "rw"}:
        problems.add(path, f"{quote(mode)} is not one of ro, rw")
        return None
    kind = _BIND if "/" in source_text or source_text in {".", ".."} else _VOLUME
    source, target = _source(source_text, path, problems, kind), _target(target_text, path, problems)
    return None if source is None or target is None else Volume(source, target, mode == "ro")


def _source(value: object, path: str, problems: Problems, kind: str | None) -> str | None:
    if kind == _BIND and isinstance(value, str) and record.NAME.fullmatch(value):
        problems.add(path, f"{quote(value)} names a volume: give a path, or type: volume")
        return None
    if kind != _VOLUME:
        return absolute(value, path, problems, "an absolute path of this machine")
    if value is None:
        problems.add(path, "is missing: volumes without a name are not supported")
        return None
    name: str | None = _VOLUME_NAME.read(value, path, problems)
    return name


def _target(value: object, path: str, problems: Problems) -> str | None:
    target = absolute(value, path, problems)
    if target == "/":
        problems.add(path, "the root itself cannot be replaced")
        return None
    return target


def named_volumes(value: object) -> tuple[Volume, ...]:
    """The named volumes of a service's ``volumes``, whatever else is wrong with it: for handles of other versions."""
    found = _read_volumes(value, "", Problems()) if value else None
    return tuple(volume for volume in found or () if volume.named)


def write_volume(volume: Volume) -> dict[str, object]:
    kind = _VOLUME if volume.named else _BIND
    written: dict[str, object] = {"type": kind, "source": volume.source, "target": volume.target}
    return {**written, "read_only": True} if volume.read_only else written


def _long(kind: str, source: Schema) -> Schema:
    properties = {"type": {"enum": [kind]}, "source": source, "target": PATH.schema, "read_only": FLAG.schema}
    required = ["source", "target"]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_SHORT: Schema = {"type": "string", "pattern": f"^(/[^:]*|{record.NAME.pattern}):/[^:]+(:(ro|rw))?$"}
_FORMS = [_SHORT, _long(_BIND, PATH.schema), _long(_VOLUME, _VOLUME_NAME.schema)]
VOLUMES = Kind(
    _read_volumes,
    {"type": "array", "maxItems": MAX_VOLUMES, "items": {"anyOf": _FORMS}},
    lambda volumes: [write_volume(volume) for volume in volumes],
)


def _read_tmpfs(value: object, path: str, problems: Problems) -> tuple[Tmpfs, ...] | None:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        problems.add(path, f"must be a path or a list of paths, not {quote(value)}")
        return None
    if len(entries) > MAX_TMPFS:
        problems.add(path, f"has {len(entries)} entries; at most {MAX_TMPFS} are allowed")
        return None
    found = [_one_tmpfs(entry, f"{path}[{i}]", problems) for i, entry in enumerate(entries)]
    return tuple(tmpfs for tmpfs in found if tmpfs is not None)


def _one_tmpfs(entry: object, path: str, problems: Problems) -> Tmpfs | None:
    target_text, colon, options = entry.partition(":") if isinstance(entry, str) else (entry, "", "")
    target = _target(target_text, path, problems)
    if target is None:
        return None
    size_bytes = Tmpfs.size_bytes
    for option in options.split(",") if colon else ():
        name, _, text = option.partition("=")
        if name != "size":
            problems.add(path, f"the option {quote(name)} is not known; allowed: size=64m")
            return None
        read = TMPFS_SIZE.read(text, path, problems)
        if read is None:
            return None
        size_bytes = read
    return Tmpfs(target, size_bytes)


def _write_tmpfs(entries: tuple[Tmpfs, ...]) -> list[str]:
    return [f"{entry.target}:size={units.format_bytes(entry.size_bytes)}" for entry in entries]


_TMPFS_TEXT: Schema = {"type": "string", "pattern": "^/[^:]+(:size=[^:,]+(,size=[^:,]+)*)?$"}
TMPFS = Kind(
    _read_tmpfs,
    {"anyOf": [_TMPFS_TEXT, {"type": "array", "items": _TMPFS_TEXT, "maxItems": MAX_TMPFS}]},
    _write_tmpfs,
)


def _read_logging(value: object, path: str, problems: Problems) -> str | None:
    parts = known_keys(value, path, problems, ("driver",))
    if parts is None:
        return None
    driver: str | None = DRIVER.read(parts.get("driver", "file"), f"{path}.driver", problems)
    return driver


def _one_key(name: str, schema: Schema) -> Schema:
    return {"type": "object", "properties": {name: schema}, "additionalProperties": False}


LOGGING = Kind(
    _read_logging,
    _one_key("driver", DRIVER.schema),
    lambda value: {"driver": DRIVER.write(value)},
)


def _read_storage(value: object, path: str, problems: Problems) -> int | None:
    parts = known_keys(value, path, problems, ("size",))
    if not parts:
        return None
    count: int | None = DISK_SIZE.read(parts["size"], f"{path}.size", problems)
    return count


STORAGE = Kind(
    _read_storage,
    _one_key("size", DISK_SIZE.schema),
    lambda value: {"size": DISK_SIZE.write(value)},
)


def _read_layers(value: object, path: str, problems: Problems) -> tuple[str, ...] | None:
    if not isinstance(value, str) or not re.fullmatch(f"{_LAYER}(/{_LAYER})*", value):
        problems.add(path, f"{quote(value)} is not a layer, or a stack such as microvm/container")
        return None
    layers = tuple(value.split("/"))
    if len(layers) > MAX_LAYERS:
        problems.add(path, f"a stack has at most {MAX_LAYERS} layers, not {len(layers)}")
        return None
    return layers


LAYERS = Kind(
    _read_layers,
    {"type": "string", "pattern": f"^{_LAYER}(/{_LAYER}){{0,{MAX_LAYERS - 1}}}$"},
    "/".join,
)
