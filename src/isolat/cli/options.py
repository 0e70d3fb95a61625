"""The small parser of the command line, and the two verbs of the hot path; the others are in ``verbs``.

Docker's habits: ``-it`` combines, ``--opt=value`` and ``--opt value`` are the same, ``run`` ends its options at the
image and ``exec`` at the environment, ``--`` ends them anywhere. The help texts are made from the same table. The
parser is ours because ``argparse`` alone takes longer to import than a whole ``isolat run`` has.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from isolat.errors import UsageError

    Handler = Callable[["Parsed"], int]

FLAG, VALUE, LIST = 0, 1, 2


class Option:
    """One option: where its value goes, its names, and what help says."""

    __slots__ = ("dest", "help", "kind", "metavar", "names")

    def __init__(self, names: str, kind: int, help: str, metavar: str = "", dest: str = "") -> None:
        self.names = names.split()
        self.kind = kind
        self.metavar = metavar
        self.help = help
        self.dest = dest or self.names[-1].lstrip("-").replace("-", "_")


class Verb:
    """One verb: its usage, options, how many words follow, and the function that carries it out."""

    __slots__ = ("least", "most", "name", "options", "stop", "summary", "target", "usage")

    def __init__(
        self,
        name: str,
        usage: str,
        summary: str,
        target: str,
        options: tuple[Option, ...] = (),
        words: tuple[int, int | None] = (0, 0),
        stop: bool = False,
    ) -> None:
        self.name = name
        self.usage = usage
        self.summary = summary
        self.target = target  # module:function, below isolat.cli
        self.options = options
        self.least, self.most = words
        self.stop = stop  # options end at the first word


class Parsed:
    """What was given: ``values`` by dest (only what was given), and the words that are no options."""

    __slots__ = ("values", "verb", "words")

    def __init__(self, verb: Verb, values: dict[str, Any], words: list[str]) -> None:
        self.verb = verb
        self.values = values
        self.words = words

    def flag(self, dest: str) -> bool:
        return bool(self.values.get(dest, False))

    def text(self, dest: str, default: str = "") -> str:
        found: str = self.values.get(dest, default)
        return found

    def texts(self, dest: str) -> list[str]:
        found: list[str] = self.values.get(dest, [])
        return found


_ROOT = Option("--root", VALUE, "the state root (default: ISOLAT_ROOT, or /var/lib/isolat)", "DIR")
_HELP = Option("-h --help", FLAG, "show this and exit")
JSON = Option("--json", FLAG, "print JSON")
NO_TRUNC = Option("--no-trunc", FLAG, "do not shorten ids and commands")
GLOBAL = (_ROOT, _HELP, Option("--version", FLAG, "show the version and exit"))
COMMON = (_ROOT, _HELP)

_INTERACTIVE = Option("-i --interactive", FLAG, "pass standard input on")
_TTY = Option("-t --tty", FLAG, "give it a terminal")
_ENV = Option("-e --env", LIST, "set a variable; NAME alone takes the caller's value", "NAME[=VALUE]")
_WORKDIR = Option("-w --workdir", VALUE, "the directory it starts in", "DIR")
_USER = Option("-u --user", VALUE, "who runs it", "USER[:GROUP]")

_RUN_OPTIONS = (
    Option("-d --detach", FLAG, "print the id and leave it running"),
    _INTERACTIVE,
    _TTY,
    Option("--rm", FLAG, "remove it when it has ended"),
    Option("--name", VALUE, "its name", "NAME"),
    Option(
        "--layer --runtime", VALUE, "the layer, or a stack from the hardware up: microvm/container", "LAYER", "layer"
    ),
    Option("--layer-opt", LIST, "what only one layer understands: microvm.park_s=0", "LAYER.KEY=VALUE"),
    Option("--in", VALUE, "put it into this environment, which runs", "ENV"),
    _ENV,
    Option("-v --volume", LIST, "a named volume, or a directory or file, visible inside", "SOURCE:TARGET[:ro]"),
    _WORKDIR,
    _USER,
    Option("--entrypoint", VALUE, "instead of the image's; empty: none", "COMMAND"),
    Option("--hostname", VALUE, "its host name", "NAME"),
    Option("-m --memory", VALUE, "memory (default: 512m)", "SIZE"),
    Option("--memory-swap", VALUE, "memory and swap together (default: no swap)", "SIZE"),
    Option("--cpus", VALUE, "how many CPUs' time it may use (default: 2)", "N"),
    Option("--cpu-shares", VALUE, "weight against others when CPUs are short (default: 1024)", "N"),
    Option("--pids-limit", VALUE, "processes (default: 1024)", "N"),
    Option("--disk", VALUE, "what it may write to its root filesystem (default: 10g)", "SIZE"),
    Option("--read-only", FLAG, "its root filesystem cannot be written"),
    Option("--tmpfs", LIST, "a directory in memory", "TARGET[:size=SIZE]"),
    Option("--net --network", VALUE, "none (default) or host", "MODE", "network"),
    Option("--timeout", VALUE, "kill it when it has run so long", "TIME"),
    Option("--stop-timeout", VALUE, "between asking it to end and killing it (default: 10s)", "TIME"),
    Option("--stop-signal", VALUE, "what it is asked to end with (default: the image's, else SIGTERM)", "SIGNAL"),
    Option("--init", FLAG, "a small init is its first process (default)"),
    Option("--no-init", FLAG, "the command itself is its first process"),
    Option("--label", LIST, "whatever helps you to find it", "NAME[=VALUE]"),
    Option("--pull", VALUE, "the image from its registry: missing (default), always or never", "WHEN"),
    Option("--log-driver", VALUE, "file (default) or none", "DRIVER"),
    Option("--oci-runtime", VALUE, "the OCI runtime of the container layer: crun, runc or a path", "PROGRAM"),
    Option("--accel", VALUE, "how a machine's processors run: auto (default), tcg or kvm", "KIND"),
    Option("--kernel", VALUE, "a machine's kernel instead of the distribution's", "FILE"),
    Option("--from-snapshot", VALUE, "go on where this snapshot was, instead of an image and a command", "SNAPSHOT"),
    Option("--plan", FLAG, "print every effect it would have, and do nothing"),
    Option("--json", FLAG, "with --plan: print JSON"),
)
_EXEC_OPTIONS = (
    Option("-d --detach", FLAG, "do not wait for it"),
    _INTERACTIVE,
    _TTY,
    _ENV,
    _WORKDIR,
    _USER,
)

HOT: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("run", "IMAGE [COMMAND…]", "run a command in a new environment", "run:run", _RUN_OPTIONS, (1, None), True),
        Verb("exec", "ENV COMMAND…", "run a command in one that runs", "exec:exec_", _EXEC_OPTIONS, (2, None), True),
    )
}
HELP = Verb("help", "[VERB]", "show help", "help:show", (), (0, 2))


def usage_error(message: str, hint: str = "") -> UsageError:
    from isolat.errors import UsageError

    return UsageError(message, hint=hint)


def _near(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(word, known, 1, 0.6)
    return f"did you mean {found[0]}?" if found else ""


def parse(argv: list[str]) -> Parsed:
    """The verb, its options and words. Raises UsageError. Help and version are verbs of their own."""
    values, rest = read(argv, GLOBAL, "", True)
    if values.get("version"):
        from isolat.cli.verbs import VERBS

        return Parsed(VERBS["version"], values, [])
    if values.get("help") or not rest:
        return Parsed(HELP, values, [])
    if rest[0] == "help":
        return Parsed(HELP, values, rest[1:])
    verb, rest = _verb(rest)
    if verb is None:
        return Parsed(HELP, values, rest)
    given, words = read(rest, (*verb.options, *COMMON), verb.name, verb.stop)
    values.update(given)
    if values.get("help"):
        return Parsed(HELP, values, verb.name.split())
    if "from_snapshot" not in values:
        _check_count(verb, words)
    return Parsed(verb, values, words)


def _verb(words: list[str]) -> tuple[Verb | None, list[str]]:
    name, rest = words[0], words[1:]
    if name in HOT:
        return HOT[name], rest
    from isolat.cli.verbs import GROUPS, VERBS

    if name in GROUPS and not (name in VERBS and rest and f"{name} {rest[0]}" not in VERBS):
        if not rest or rest[0] in {"-h", "--help"}:
            return None, [name]
        name, rest = f"{name} {rest[0]}", rest[1:]
    verb = VERBS.get(name)
    if verb is None:
        raise usage_error(f"unknown verb: {name}", _near(name, list(VERBS)) or "`isolat --help` lists them")
    return verb, rest


def _check_count(verb: Verb, words: list[str]) -> None:
    if len(words) >= verb.least and (verb.most is None or len(words) <= verb.most):
        return
    problem = "too few words" if len(words) < verb.least else f"unexpected: {words[verb.most or 0]}"
    raise usage_error(f"{verb.name}: {problem}", f"isolat {verb.name} [OPTIONS] {verb.usage}".rstrip())


def read(words: list[str], options: tuple[Option, ...], command: str, stop: bool) -> tuple[dict[str, Any], list[str]]:
    """Options and the other words. With ``stop`` the options end at the first other word."""
    known = {name: option for option in options for name in option.names}
    values: dict[str, Any] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += left
        elif word.startswith("--"):
            _long(word, left, known, values, command)
        elif word.startswith("-") and len(word) > 1:
            _short(word, left, known, values, command)
        else:
            rest.append(word)
            if stop:
                rest += left
    return values, rest


def _long(word: str, left: Any, known: dict[str, Option], values: dict[str, Any], command: str) -> None:
    name, equals, value = word.partition("=")
    option = known.get(name)
    if option is None:
        raise _unknown(name, known, command)
    if option.kind != FLAG:
        _put(values, option, value if equals else _next(left, name, option, command))
    elif not equals or value in {"true", "false"}:
        values[option.dest] = not equals or value == "true"
    else:
        raise usage_error(f"{_of(command)}{name} takes no value, or true or false")


def _short(word: str, left: Any, known: dict[str, Option], values: dict[str, Any], command: str) -> None:
    for at in range(1, len(word)):
        name = f"-{word[at]}"
        option = known.get(name)
        if option is None:
            raise _unknown(name if at > 1 or len(word) == 2 else word, known, command)
        if option.kind == FLAG:
            values[option.dest] = True
            continue
        value = word[at + 1 :].removeprefix("=")
        _put(values, option, value if len(word) > at + 1 else _next(left, name, option, command))
        return


def _put(values: dict[str, Any], option: Option, value: str) -> None:
    if option.kind == LIST:
        values.setdefault(option.dest, []).append(value)
    else:
        values[option.dest] = value


def _next(left: Any, name: str, option: Option, command: str) -> str:
    value: str | None = next(left, None)
    if value is None:
        raise usage_error(f"{_of(command)}{name} needs a value: {name} {option.metavar}")
    return value


def _unknown(name: str, known: dict[str, Option], command: str) -> UsageError:
    help = f"see `isolat {command} --help`" if command else "see `isolat --help`"
    return usage_error(f"{_of(command)}unknown option {name}", _near(name, list(known)) or help)


def _of(command: str) -> str:
    return f"{command}: " if command else ""
