"""What happens by itself: applications end, keepers die, time runs out, removals are tried again."""

from __future__ import annotations

import contextlib
import signal as signals
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from isolat.deadline import Deadline
from isolat.engine import entering
from isolat.engine.carrying import in_all
from isolat.engine.endings import Endings, recorded_exit
from isolat.engine.environment import Environment
from isolat.engine.journal import log
from isolat.engine.recovery import Recovery
from isolat.engine.table import Table, row
from isolat.engine.workers import Timers, Workers
from isolat.errors import IsolatError
from isolat.layers.base import State
from isolat.places.base import Exit, Facts
from isolat.places.link import Link

OPERATION_WAIT_S = 30.0
_AGAIN_S = 5.0
_RETRY_MOST_S = 60.0


class Supervisor:
    """Watches every environment that runs. ``stop`` is the engine's verb, for those whose time is over."""

    def __init__(
        self, table: Table, endings: Endings, facts: Facts, stop: Callable[[str, float | None], object]
    ) -> None:
        self.workers = Workers()
        self.timers = Timers()
        self._table = table
        self._endings = endings
        self._facts = facts
        self._stop = stop

    def close(self) -> None:
        self.timers.close()
        self.workers.close()

    def rejoin(self, env: Environment, recovery: Recovery) -> None:
        """Watch what was found to run. A keeper that lives but does not answer yet is asked again and again."""
        if env.link is not None:
            if env.handle.around is None:
                self.watch(env)
            self.rearm(env)
            self._catch_up(env, env.link)
            return

        def again() -> None:
            with env.operation("being found again", Deadline(OPERATION_WAIT_S)):
                if env.link is not None or not env.state.alive:
                    return
                if not recovery.recover(env):
                    self._table.leave(env)
                elif env.state.alive:
                    self.rejoin(env, recovery)

        self.timers.after(_AGAIN_S, lambda: self.workers.submit(again))

    def watch(self, env: Environment) -> None:
        """Hear what its keeper tells, of it and of all that is in it."""
        assert env.link is not None
        link = env.link

        def exited(name: str, exit: Exit) -> None:
            self.workers.submit(lambda: self._told(env, name, exit))

        def closed() -> None:
            self.workers.submit(lambda: self._keeper_gone(env, link))

        link.on_exited, link.on_closed = exited, closed

    def _told(self, env: Environment, name: str, exit: Exit) -> None:
        """The process of this name has ended, at the keeper of ``env``."""
        for inner in self._table.inside(env):
            first = inner.handle.first_name
            if name == first or name.startswith(f"{first}/"):
                self._told(inner, name, exit)
                return
        if name == env.handle.main_name:
            self._ended(env, exit)
        else:
            self._forget(env, name)

    def _catch_up(self, env: Environment, link: Link) -> None:
        """What happened between finding a keeper and watching it."""
        exit = link.exit_of(env.handle.main_name)
        if exit is not None:
            self.workers.submit(lambda: self._ended(env, exit))
        elif link.closed:
            self.workers.submit(lambda: self._keeper_gone(env, link))
        else:
            self.workers.submit(lambda: self._forget_ended(env))

    def _forget_ended(self, env: Environment) -> None:
        """Execs that ended while no daemon lived: nobody will ask for them any more."""
        with contextlib.suppress(IsolatError):
            inside = entering.innermost(env, self._facts)
            for proc in inside.procs("exec-", Deadline(10)):
                if proc.exit is not None:
                    inside.forget(proc.key, Deadline(10))

    def _forget(self, env: Environment, name: str) -> None:
        with contextlib.suppress(IsolatError):
            to_main, _, _ = env.handle.main_name.rpartition("/")
            key = name.removeprefix(f"{to_main}/") if to_main else name
            entering.innermost(env, self._facts).forget(key, Deadline(10))

    def _ended(self, env: Environment, exit: Exit) -> None:
        """The application has ended: settle, and remove where that was asked for."""
        with env.operation("settling", Deadline(OPERATION_WAIT_S)):
            if env.state != State.RUNNING:
                return
            carried = self._endings.carry_back(env)
            if env.handle.remove and not carried.kept:
                exit = replace(exit, forced=env.forced, oom=exit.oom or self._endings.oom(env))
                reason = in_all(env.stop_reason or self._endings.death(env, exit), env.remark, carried.said)
                env.handle = env.handle.with_(exit=exit, reason=reason)
                self._table.publish("die", env, code=exit.code, signal=exit.signal)
                self._destroy_or_retry(env)
                return
            self._endings.settle(env, exit, carried=carried)
        self.end_inside(env)
        self._tell_end(env)

    def end_inside(self, outer: Environment) -> None:
        """It has ended, and what was in it did so with it. One that is just being started undoes itself."""
        for env in self._table.inside(outer):
            if env.state != State.RUNNING:
                continue
            try:
                exit = recorded_exit(env)
                if exit is not None:
                    self._ended(env, exit)
                else:
                    self._lost(env)
            except (IsolatError, OSError) as error:
                log(f"{env.name}: it ended with {outer.name}, and could not be settled: {error}")

    def _keeper_gone(self, env: Environment, link: Link) -> None:
        """Its keeper died. With an exit record the application had ended; else nobody knows, and that is said."""
        with env.operation("settling", Deadline(OPERATION_WAIT_S)):
            if env.link is not link or env.state != State.RUNNING:
                return
            exit = link.exit_of(env.handle.main_name)
            reason = "" if exit else "its keeper was killed, so it is not known how the application ended"
            self._endings.settle(env, exit, reason)
        self.end_inside(env)
        self._finish_end(env)

    def _lost(self, env: Environment) -> None:
        """Nobody has recorded how it ended."""
        with env.operation("settling", Deadline(OPERATION_WAIT_S)):
            if env.state != State.RUNNING:
                return
            self._endings.settle(env, None)
        self.end_inside(env)
        self._finish_end(env)

    def _finish_end(self, env: Environment) -> None:
        self._tell_end(env)
        if env.handle.remove:
            self.remove(env)

    def _tell_end(self, env: Environment) -> None:
        exit = env.handle.exit
        self._table.index.put(row(env))
        if exit is None:
            self._table.publish("lost", env, reason=env.handle.reason)
        else:
            if exit.oom:
                self._table.publish("oom", env)
            self._table.publish("die", env, code=exit.code, signal=exit.signal)
        env.ended.set()

    def destroy(self, env: Environment) -> None:
        try:
            self._endings.destroy(env)
        finally:
            self.end_inside(env)
        self._table.leave(env)
        self._table.publish("destroy", env)

    def _destroy_or_retry(self, env: Environment, wait_s: float = 1.0) -> None:
        """Destroy what nobody will ask for again; what stands in the way may go, so that is tried until it works."""
        try:
            self.destroy(env)
        except (IsolatError, OSError) as error:
            log(f"{env.name}: removing it failed, again in {wait_s:g} s: {error}")
            env.handle = env.handle.with_(state=State.REMOVING)
            with contextlib.suppress(OSError):
                env.save()
            env.ended.set()
            later = min(2 * wait_s, _RETRY_MOST_S)
            self.timers.after(wait_s, lambda: self.workers.submit(lambda: self.remove(env, later)))

    def remove(self, env: Environment, wait_s: float = 1.0) -> None:
        with env.operation("removing", Deadline(OPERATION_WAIT_S)):
            if not env.gone.is_set():
                self._destroy_or_retry(env, wait_s)

    def rearm(self, env: Environment) -> None:
        """The clock of --timeout, which goes on over restarts of the daemon."""
        timeout_s = env.spec.timeout_s
        if timeout_s is None:
            return
        left_s = timeout_s - (time.time_ns() - env.handle.started_ns) / 1e9

        def out_of_time() -> None:
            if env.state == State.RUNNING:
                env.stop_reason = f"stopped after {timeout_s:g} s (--timeout)"
                self._table.publish("timeout", env)
                threading.Thread(target=self._stop_quietly, args=(env,), daemon=True).start()

        self.timers.after(max(0.0, left_s), out_of_time)

    def _stop_quietly(self, env: Environment) -> None:
        try:
            self._stop(env.id, None)
        except IsolatError:
            self.kill_whole(env)  # somebody else is stopping it, more patiently than its time allows

    def kill_whole(self, env: Environment) -> None:
        """SIGKILL to all of it, whoever holds the environment: whoever waits for its end then goes on."""
        frame = env.handle.frames[0]
        key = frame.guest_key if frame.has_guest else frame.main_key
        env.forced = True
        with contextlib.suppress(IsolatError):
            place = entering.outermost(env, self._facts)
            place.signal(key, signals.SIGKILL, Deadline(5), everything=not frame.has_guest)
