"""``cp`` and ``export``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.client import archives, connect, copying

_STANDARD = archives.STANDARD
_TELL_S = 0.1


def cp(parsed: o.Parsed) -> int:
    (env, inside), (other, outside) = (_place(word) for word in parsed.words)
    if bool(env) == bool(other):
        what = "both are inside" if env else "neither is inside"
        raise o.usage_error(f"cp: {what}", "isolat cp ENV:PATH TARGET, or isolat cp SOURCE ENV:PATH")
    root = connect.find_root(parsed.values.get("root"))
    options = copying.Options(owners=parsed.flag("archive"), follow=parsed.flag("follow_link"))
    if env:
        return _told(parsed, outside, lambda tell: _out(root, env, inside, outside, options, tell))
    return _told(parsed, f"{other}:{outside}", lambda tell: _in(root, inside, other, outside, options, tell))


def _place(word: str) -> tuple[str, str]:
    """ENV and path, or nothing and a path of the caller's: one with a slash or a dot before its first colon."""
    env, colon, path = word.partition(":")
    if not colon or not env or "/" in env or env.startswith("."):
        return "", word
    return env, path


def _out(
    root: str, env: str, path: str, target: str, options: copying.Options, tell: copying.Progress
) -> copying.Copied:
    if target != _STANDARD:
        return copying.copy_out(root, env, path, target, options, tell)
    with archives.target(_STANDARD) as descriptor:
        return copying.get_archive(root, env, path, descriptor, options, tell)


def _in(
    root: str, source: str, env: str, path: str, options: copying.Options, tell: copying.Progress
) -> copying.Copied:
    if source != _STANDARD:
        return copying.copy_in(root, env, source, path, options, tell)
    with archives.source(_STANDARD) as descriptor:
        return copying.put_archive(root, env, descriptor, path, tell)


def export(parsed: o.Parsed) -> int:
    root, env = connect.find_root(parsed.values.get("root")), parsed.words[0]
    output = parsed.text("output", _STANDARD)

    def work(tell: copying.Progress) -> copying.Copied:
        with archives.target(output) as descriptor:
            return copying.export(root, env, descriptor, tell)

    return _told(parsed, output, work)


def _told(parsed: o.Parsed, target: str, work: Callable[[copying.Progress], copying.Copied]) -> int:
    """How far it is on a terminal, and at the end how much it was, on standard error."""
    quiet = parsed.flag("quiet")
    with progress.show(quiet=quiet or not sys.stderr.isatty()) as bar:
        told_s = 0.0

        def tell(count: int) -> None:
            nonlocal told_s
            if time.monotonic() - told_s > _TELL_S:
                told_s = time.monotonic()
                bar.put("copying, bytes", count, 0)

        copied = work(tell)
    for line in copied.left:
        sys.stderr.write(f"isolat: left out: {tables.clean(line)}\n")
    if not quiet and target != _STANDARD:
        sys.stderr.write(f"copied {tables.size(copied.bytes)} to {tables.clean(target)}\n")
    return 0
