"""The command ``isolat``: one verb, its exit code, and never a traceback.

``run`` and ``exec`` are the hot path: until their request is sent, nothing is imported that they do not need, and
``argparse``, ``json``, ``re``, ``enum``, ``dataclasses``, ``typing`` are never (tests/unit/cli/test_imports.py).
"""

from __future__ import annotations

import sys

from isolat.cli import options

EXIT_SIGNAL, SIGINT = 128, 2
EXIT_SIGPIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line and return its exit code."""
    parsed = None
    try:
        parsed = options.parse(sys.argv[1:] if argv is None else argv)
        code = _load(parsed.verb.target)(parsed)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return EXIT_SIGNAL + (error.args[0] if error.args else SIGINT)
    except BrokenPipeError:
        _forget_output()
        return EXIT_SIGPIPE
    except Exception as error:
        from isolat.cli import failure

        return failure.tell(error, parsed.verb.name if parsed else "")


def entry() -> None:
    """``main`` for a launcher: ends the process at once, which saves the interpreter's own tidying up."""
    code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    import posix

    posix._exit(code)


def _load(target: str) -> options.Handler:
    module, _, name = target.partition(":")
    # __import__ with a name to fetch returns the submodule itself
    found: options.Handler = getattr(__import__(f"isolat.cli.{module}", fromlist=[name]), name)
    return found


def _forget_output() -> None:
    """Whatever still stands in the buffer has no reader; the interpreter must not complain about that at its end."""
    import posix

    null = posix.open("/dev/null", posix.O_WRONLY)
    posix.dup2(null, 1)
    posix.close(null)


if __name__ == "__main__":
    entry()
