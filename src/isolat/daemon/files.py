"""The daemon's verbs on the files of environments (docs/api.md).

Each answers with a ``stream``, to and from the program that copies. What the daemon has to keep for it is kept until
the caller is through: it says so by closing its side of the connection, and waits for the ``ok``.
"""

from __future__ import annotations

import socket
import time
from contextlib import AbstractContextManager

from isolat.daemon.call import Answer, Call
from isolat.engine.environment import Environment
from isolat.engine.files import In, Out

_LOOK_S = 0.02


def copy_in(call: Call) -> Answer:
    args = call.args
    wanted = In(
        path=args.text("path"),
        name=args.text("name", ""),
        archive=args.flag("archive"),
        contents=args.flag("contents"),
        owners=args.flag("owners"),
    )
    env = call.engine.find(args.text("env"))
    return _introduced(call, env, call.engine.files.copy_in(env, wanted))


def copy_out(call: Call) -> Answer:
    args = call.args
    wanted = Out(args.text("path"), args.text("name"), follow=args.flag("follow"))
    env = call.engine.find(args.text("env"))
    return _introduced(call, env, call.engine.files.copy_out(env, wanted))


def export(call: Call) -> Answer:
    env = call.engine.find(call.args.text("env"))
    return _introduced(call, env, call.engine.files.copy_out(env, Out("/", ".", whole=True)))


def _introduced(call: Call, env: Environment, moving: AbstractContextManager[socket.socket]) -> Answer:
    with moving as ours:
        call.send({"stream": {"id": env.id, "name": env.name, "tty": False}}, [ours.fileno()])
        ours.close()  # whose other end is the caller's alone now
        while not call.gone():
            time.sleep(_LOOK_S)
    return {"id": env.id, "name": env.name}
