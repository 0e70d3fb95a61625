"""The daemon is killed at random moments under load: no stream is cut, no code, log or environment lost."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolat.errors import IsolatError, NotFound
from tests.support import traces
from tests.support.images import IMAGE
from tests.support.logs import read_log
from tests.support.roots import Root
from tests.support.wires import Cut, Stream

pytestmark = [pytest.mark.root, pytest.mark.timeout(1200)]

GONE = (Cut, ConnectionError, FileNotFoundError)
LINES = 60


def _counting(code: int, pause: str = "0.005") -> dict[str, Any]:
    script = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); sleep {pause}; done; exit {code}"
    return {"image": IMAGE, "command": ["sh", "-c", script]}


WANTED = [f"line {n}" for n in range(LINES)]


class Load:
    """What several users do at once, and what must be true of it whatever happens to the daemon."""

    def __init__(self, root: Root, seed: int) -> None:
        self.root = root
        self.over = threading.Event()
        self.failures: list[str] = []
        self.detached: dict[str, int] = {}
        self.removed: set[str] = set()
        self.counts = dict.fromkeys(("run", "exec", "detached", "removed"), 0)
        self._random = random.Random(seed)
        self._box = root.run_detached({"image": IMAGE, "command": ["sleep", "3600"]})

    def threads(self) -> list[threading.Thread]:
        jobs: list[Callable[[], None]] = [self.run, self.exec, self.detach, self.remove]
        return [threading.Thread(target=self._repeat, args=(job,), daemon=True) for job in jobs]

    def _repeat(self, job: Callable[[], None]) -> None:
        while not self.over.is_set():
            try:
                job()
            except GONE:
                time.sleep(0.02)  # killed: the next one is coming
            except (IsolatError, AssertionError, TimeoutError) as error:
                self.failures.append(f"{job.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.05)

    def _whole(self, what: str, stream: Stream, code: int) -> None:
        """A stream that was introduced is never cut: all lines, then the true code."""
        try:
            found = stream.ended(60)
        except (Cut, AssertionError) as error:
            self.failures.append(f"{what}: {error}")
            return
        finally:
            stream.close()
        lines = stream.out.decode().splitlines()
        if found != code or lines != WANTED:
            self.failures.append(f"{what}: code {found} instead of {code}, {len(lines)} lines")
        self.counts[what] += 1

    def run(self) -> None:
        code = self._random.randrange(1, 100)
        conversation, stream, _ = self.root.run({**_counting(code), "x-remove": True})
        self._whole("run", stream, code)
        conversation.close()

    def exec(self) -> None:
        code = self._random.randrange(1, 100)
        self._whole("exec", self.root.exec(self._box, _counting(code)["command"]), code)

    def detach(self) -> None:
        code = self._random.randrange(1, 100)
        self.detached[self.root.run_detached(_counting(code))] = code
        self.counts["detached"] += 1
        time.sleep(0.1)

    def remove(self) -> None:
        id = self.root.run_detached({"image": IMAGE, "command": ["sleep", "3600"], "stop_grace_period": "1s"})
        if self._random.random() < 0.5:
            self._until_answered("stop", {"env": id, "grace_s": 0.2})
        self._until_answered("rm", {"env": id, "force": True})
        self.removed.add(id)
        self.counts["removed"] += 1

    def _until_answered(self, verb: str, args: dict[str, Any]) -> None:
        while True:
            try:
                self.root.ask(verb, args)
                return
            except NotFound:
                if verb == "rm":
                    return
                raise
            except GONE:
                time.sleep(0.02)


def _killed_at_random(root: Root, kills: int, seed: int) -> dict[str, int]:
    """The load under so many kills. Asserts everything that must be true then, and tells how much was done."""
    root.ensure_daemon()
    load, chance = Load(root, seed), random.Random(seed)
    threads = load.threads()
    for thread in threads:
        thread.start()
    for _ in range(kills):
        time.sleep(chance.random() * 0.7)
        root.kill_daemon()
        root.start_daemon()
    load.over.set()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    assert load.failures == [], "\n".join(load.failures)
    _all_there(root, load)
    return load.counts


def _all_there(root: Root, load: Load) -> None:
    known = {env["id"] for env in root.environments()}
    assert set(load.detached) <= known
    assert not load.removed & known
    for id, code in load.detached.items():
        assert root.ask("wait", {"env": id})["code"] == code, id
        text = read_log(root.path / "envs" / id / "log", 1).decode()
        assert text.splitlines() == WANTED, id
    root.remove_all()
    assert traces.none_of_environments(root.path) == []


def test_kills_at_random_moments_lose_nothing(fresh_root: Root) -> None:
    counts = _killed_at_random(fresh_root, 15, 20260101)
    assert min(counts.values()) >= 1


@pytest.mark.soak
def test_two_hundred_kills_at_random_moments_lose_nothing(fresh_root: Root) -> None:
    counts = _killed_at_random(fresh_root, 200, random.randrange(1 << 30))
    print(counts)


def test_a_hundred_megabytes_survive_kills_of_the_daemon(fresh_root: Root, tmp_path: Path) -> None:
    fresh_root.start_daemon()
    source = tmp_path / "in"
    block = os.urandom(1 << 20)
    with source.open("wb") as file:
        for n in range(100):
            file.write(n.to_bytes(4, "little") + block)
    wanted = hashlib.sha256(source.read_bytes()).hexdigest()
    with (tmp_path / "out").open("wb") as target:
        slow = subprocess.Popen(["sh", "-c", f"(head -c 50000000; sleep 2; cat) < {source}"], stdout=subprocess.PIPE)
        process = fresh_root.popen("run", "-i", "--rm", IMAGE, "cat", stdin=slow.stdout, stdout=target)
        assert slow.stdout
        slow.stdout.close()
        killed = 0
        time.sleep(0.3)
        while process.poll() is None and killed < 8:
            killed += fresh_root.kill_daemon() is not None
            fresh_root.start_daemon()
            time.sleep(0.1)
        assert process.wait(60) == 0
        assert slow.wait(10) == 0
    assert killed >= 3
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == wanted
