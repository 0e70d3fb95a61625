"""Every verb of the command line but the parser's own: one table, from which the help texts are made, too.

Apart from ``options`` because ``run`` and ``exec`` do not pay for it.
"""

from __future__ import annotations

from isolat.cli.options import FLAG, HOT, JSON, LIST, NO_TRUNC, VALUE, Option, Verb

_PS_OPTIONS = (
    Option("-a --all", FLAG, "also those that have ended"),
    Option("-q --quiet", FLAG, "only ids"),
    Option("--filter", LIST, "only those whose id, name, image, layer, state or label matches", "KEY=VALUE"),
    NO_TRUNC,
    JSON,
)
_LOGS_OPTIONS = (
    Option("-f --follow", FLAG, "go on until it ends"),
    Option("--since", VALUE, "only what is not older: 10m, or 2026-01-31T12:00:00", "TIME"),
    Option("-n --tail", VALUE, "only the last N lines", "N"),
    Option("-t --timestamps", FLAG, "begin each line with its time"),
)
_BOOTSTRAP_OPTIONS = (
    Option("--include", LIST, "a further package, or several with commas", "PACKAGE"),
    Option("--arch", VALUE, "another architecture than this machine's", "ARCH"),
    JSON,
)
_SNAPSHOTS_OPTIONS = (Option("-q --quiet", FLAG, "only names"), NO_TRUNC, JSON)
_IMAGES_OPTIONS = (
    *_SNAPSHOTS_OPTIONS,
    Option("--digests", FLAG, "also the digest of each manifest"),
    Option("--filter", LIST, "only those: reference=PATTERN, dangling=true, label=NAME[=VALUE]", "KEY=VALUE"),
)
_BUILD_OPTIONS = (
    Option("-t --tag", LIST, "a name for the image; may be repeated", "NAME[:TAG]"),
    Option("-f --file", VALUE, "the Containerfile (default: CONTEXT/Containerfile or Dockerfile)", "FILE"),
    Option("--build-arg", LIST, "a value for an ARG; NAME alone takes the caller's", "NAME[=VALUE]"),
    Option("--target", VALUE, "the stage to build (default: the last)", "STAGE"),
    Option("--platform", VALUE, "for which kind of machine (default: this one's)", "OS/ARCH"),
    Option("--network", VALUE, "of RUN steps: none (default) or host", "MODE"),
    Option("--pull", VALUE, "base images: missing (default), never or always", "WHEN"),
    Option("--no-cache", FLAG, "do not take steps from earlier builds"),
    Option("--label", LIST, "a label of the image", "NAME=VALUE"),
    Option("-m --memory", VALUE, "memory (default: 2g, or half of the machine's)", "SIZE"),
    Option("--disk", VALUE, "what it may write (default: 20g)", "SIZE"),
    Option("-q --quiet", FLAG, "print only the image's digest"),
    JSON,
)
_FORCE = "-f --force"
_RMI_OPTIONS = (Option(_FORCE, FLAG, "a digest with all its names; what is not there is fine"),)
_PLATFORM = Option("--platform", VALUE, "for which kind of machine (default: this one's)", "OS/ARCH")


_PRUNE_ALL = Option("-a --all", FLAG, "also images that have a name")
_TLS_VERIFY = Option("--tls-verify", VALUE, "false: plain HTTP, any certificate (as with localhost)", "true|false")
_YES = Option("-y --yes -f --force", FLAG, "do not ask", dest="yes")

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        *HOT.values(),
        Verb("ps", "", "list environments", "manage:ps", _PS_OPTIONS),
        Verb("logs", "ENV", "what it has written", "logs:logs", _LOGS_OPTIONS, (1, 1)),
        Verb(
            "attach", "ENV", "connect to what runs in it", "exec:attach",
            (Option("--no-stdin", FLAG, "do not pass standard input on"),), (1, 1),
        ),
        Verb(
            "stop", "ENV…", "ask it to end, then kill it", "manage:stop",
            (Option("-t --time", VALUE, "between asking and killing (default: its own)", "TIME"),), (1, None),
        ),
        Verb(
            "kill", "ENV…", "send a signal", "manage:kill",
            (Option("-s --signal", VALUE, "its name or number (default: KILL)", "SIGNAL"),), (1, None),
        ),
        Verb("wait", "ENV…", "wait for its end and print its exit code", "manage:wait", (), (1, None)),
        Verb(
            "rm", "ENV…", "remove what has ended", "manage:rm",
            (Option(_FORCE, FLAG, "also what still runs; what is not there is fine"),), (1, None),
        ),
        Verb("inspect", "ENV…", "everything known of it, as JSON", "manage:inspect", (JSON,), (1, None)),
        Verb(
            "screenshot", "ENV FILE", "what its screen shows, as PNG (FILE may be -)", "manage:screenshot", (), (2, 2),
        ),
        Verb(
            "events", "", "what happens, as it happens", "events:events",
            (Option("--since", VALUE, "begin with the past: 10m, or 2026-01-31T12:00:00", "TIME"),
             Option("--no-follow", FLAG, "end with the present"), JSON),
        ),
        Verb("images", "[NAME]", "list images", "images:images", _IMAGES_OPTIONS, (0, 1)),
        Verb("rmi", "IMAGE…", "remove images", "images:rmi", _RMI_OPTIONS, (1, None)),
        Verb("image bootstrap", "IMAGE", "make a base image: debian[:SUITE], or host", "images:bootstrap",
             _BOOTSTRAP_OPTIONS, (1, 1)),
        Verb("build", "CONTEXT", "build an image from a Containerfile (CONTEXT: a directory, or - )", "build:build",
             _BUILD_OPTIONS, (1, 1)),
        Verb("builder prune", "", "remove what builds keep to be quick", "build:prune", (JSON,)),
        Verb("image ls", "[NAME]", "list images", "images:images", _IMAGES_OPTIONS, (0, 1)),
        Verb("image rm", "IMAGE…", "remove images", "images:rmi", _RMI_OPTIONS, (1, None)),
        Verb("image inspect", "IMAGE…", "everything known of them, as JSON", "image_info:inspect", (JSON,), (1, None)),
        Verb("history", "IMAGE", "how an image was made, the newest step first", "image_info:history",
             (NO_TRUNC, JSON), (1, 1)),
        Verb("image tree", "", "which layers images share", "image_info:tree", (JSON,)),
        Verb("tag", "IMAGE NAME…", "give an image further names", "image_info:tag", (), (2, None)),
        Verb(
            "save", "IMAGE…", "write images into an archive", "archives:save",
            (Option("-o --output", VALUE, "the file (default: standard output)", "FILE"),
             Option("--format", VALUE, "docker-archive (default) or oci-archive", "FORMAT")), (1, None),
        ),
        Verb(
            "load", "", "take in the images of an archive of Docker's or OCI's form", "archives:load",
            (Option("-i --input", VALUE, "the file (default: standard input)", "FILE"), _PLATFORM,
             Option("-q --quiet", FLAG, "print only ids"), JSON),
        ),
        Verb(
            "import", "FILE [NAME]", "make an image of an archive of a root file system (FILE may be -)",
            "archives:import_",
            (Option("-c --change", LIST, "an instruction of a Containerfile: CMD, ENV, USER, …", "INSTRUCTION"),
             Option("-m --message", VALUE, "what its history says of it", "TEXT"), _PLATFORM, JSON), (1, 2),
        ),
        Verb(
            "template create", "", "boot a machine that others are cloned from", "templates:create",
            (Option("--layer", VALUE, "of which layer (default: microvm)", "LAYER"),
             Option("-m --memory", VALUE, "memory of the machines (default: 512m)", "SIZE"),
             Option("--cpus", VALUE, "processors of the machines (default: 1)", "N"), JSON),
        ),
        Verb("template ls", "", "list templates", "templates:ls", (Option("-q --quiet", FLAG, "only ids"), JSON)),
        Verb("template rm", "TEMPLATE…", "remove templates; machines go on", "templates:rm", (), (1, None)),
        Verb("template prune", "", "remove all templates; machines go on", "templates:prune"),
        Verb(
            "fork", "ENV", "make others that go on where it is, with all its processes", "snapshots:fork",
            (Option("-n --number", VALUE, "how many (default: 1)", "N"),
             Option("--name", VALUE, "the name of a single one", "NAME"), JSON), (1, 1),
        ),
        Verb("snapshot", "ENV NAME", "keep it as it is now, with all its processes", "snapshots:snapshot",
             (JSON,), (2, 2)),
        Verb("snapshots", "", "list snapshots", "snapshots:ls", _SNAPSHOTS_OPTIONS),
        Verb("snapshot ls", "", "list snapshots", "snapshots:ls", _SNAPSHOTS_OPTIONS),
        Verb("snapshot rm", "SNAPSHOT…", "remove snapshots; what was made from them goes on", "snapshots:rm",
             (), (1, None)),
        Verb(
            "volume create", "[NAME]", "make a volume, and print its name", "volumes:create",
            (Option("--size", VALUE, "how much may be in it (default: 10g)", "SIZE"),
             Option("--label", LIST, "whatever helps you to find it", "NAME[=VALUE]"), JSON), (0, 1),
        ),
        Verb("volume ls", "", "list volumes", "volumes:ls", (Option("-q --quiet", FLAG, "only names"), JSON)),
        Verb("volume inspect", "VOLUME…", "everything known of them, as JSON", "volumes:inspect", (JSON,), (1, None)),
        Verb(
            "volume rm", "VOLUME…", "remove volumes with all that is in them", "volumes:rm",
            (Option(_FORCE, FLAG, "what is not there is fine"),), (1, None),
        ),
        Verb("volume prune", "", "remove the volumes that nobody uses", "volumes:prune", (_YES, JSON)),
        Verb("doctor", "", "what this machine allows, by trying", "system:doctor", (JSON,)),
        Verb(
            "setup", "", "install what is missing", "system:setup",
            (Option("-y --yes", FLAG, "do not ask"),),
        ),
        Verb(
            "cp", "ENV:PATH TARGET | SOURCE ENV:PATH", "copy files out of it, or into it (- : an archive)", "files:cp",
            (Option("-a --archive", FLAG, "keep owners (default: root inside, you outside)"),
             Option("-L --follow-link", FLAG, "what a link leads to, instead of the link"),
             Option("-q --quiet", FLAG, "say nothing but what fails")), (2, 2),
        ),
        Verb(
            "export", "ENV", "its whole root file system as an archive", "files:export",
            (Option("-o --output", VALUE, "where to (default: standard output)", "FILE"),
             Option("-q --quiet", FLAG, "say nothing but what fails")), (1, 1),
        ),
        Verb("diff", "ENV", "what it has changed of its image", "changes:diff", (JSON,), (1, 1)),
        Verb(
            "commit", "ENV [NAME…]", "keep it as a new image", "changes:commit",
            (Option("-m --message", VALUE, "what stands in the history", "TEXT"),
             Option("-a --author", VALUE, "who made it", "NAME"),
             Option("-c --change", LIST, "change a default: 'CMD [\"sh\"]', 'ENV A=b'", "INSTRUCTION"),
             Option("-p --pause", VALUE, "everything inside stands still meanwhile (default: true)", "true|false"),
             Option("-q --quiet", FLAG, "only the id"), JSON), (1, None),
        ),
        Verb(
            "pull", "IMAGE", "fetch an image from a registry", "transfer:pull",
            (Option("--platform", VALUE, "of an image for several (default: this machine's)", "OS/ARCH[/VARIANT]"),
             _TLS_VERIFY, Option("-q --quiet", FLAG, "only the id"), JSON), (1, 1),
        ),
        Verb("push", "IMAGE [TARGET]", "send an image to a registry", "transfer:push",
             (_TLS_VERIFY, Option("-q --quiet", FLAG, "no progress"), JSON), (1, 2)),
        Verb(
            "login", "REGISTRY", "keep credentials for a registry", "transfer:login",
            (Option("-u --username", VALUE, "who", "NAME"), Option("-p --password", VALUE, "better asked for", "WORD"),
             Option("--password-stdin", FLAG, "read the password from standard input"), _TLS_VERIFY), (1, 1),
        ),
        Verb("logout", "REGISTRY", "forget them", "transfer:logout", (), (1, 1)),
        Verb("image prune", "", "remove images that nothing stands on", "upkeep:prune_images",
             (_PRUNE_ALL, _YES, JSON)),
        Verb("system df", "", "what is stored, and what of it can go", "upkeep:df", (JSON,)),
        Verb("system prune", "", "remove what nobody needs: what has ended, old images, caches", "upkeep:prune",
             (_PRUNE_ALL, Option("--volumes", FLAG, "also the volumes that nobody uses"), _YES, JSON)),
        Verb(
            "system check", "", "look whether everything stored is as it should be", "upkeep:check",
            (Option("--deep", FLAG, "also make each image's file system again, and compare"), JSON),
        ),
        Verb(
            "system reset", "", "remove every environment, image, volume and trace", "system:reset",
            (Option("-y --yes -f --force", FLAG, "do not ask", dest="yes"),),
        ),
        Verb("system shutdown", "", "end the daemon; environments go on", "system:shutdown"),
        Verb("version", "", "show the versions of command and daemon", "system:version", (JSON,)),
    )
}  # fmt: skip


def _below(group: str, verb: Verb) -> Verb:
    words = (verb.least, verb.most)
    return Verb(f"{group} {verb.name}", verb.usage, verb.summary, verb.target, verb.options, words, verb.stop)


# Docker has these verbs twice, and so do we.
_TWICE = [
    _below("image", VERBS[name]) for name in ("build", "history", "import", "load", "pull", "push", "save", "tag")
]
SECOND = {verb.name for verb in _TWICE}
VERBS |= {verb.name: verb for verb in _TWICE}
GROUPS = {name.split()[0] for name in VERBS if " " in name}
