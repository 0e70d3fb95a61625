"""``system df``, ``prune`` and ``check``: they tell what is there, and remove only what nobody needs."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.roots import Root

pytestmark = pytest.mark.root


def _usage(root: Root) -> dict[str, dict[str, int]]:
    return {row["kind"]: row for row in json.loads(root.ok("system", "df", "--json"))}


def test_it_tells_what_environments_and_images_take(fresh_root: Root) -> None:
    root = fresh_root
    before = _usage(root)["environments"]
    assert (before["total"], before["size_bytes"]) == (0, 0)
    root.ok("run", "-d", "--name", "big", "debian", "sh", "-c", "head -c 20000000 /dev/urandom > /big; sync; sleep 600")
    while _usage(root)["environments"]["size_bytes"] < 20_000_000:
        root.ok("exec", "big", "sync")
    found = _usage(root)
    assert (found["environments"]["total"], found["environments"]["active"]) == (1, 1)
    assert found["environments"]["reclaimable_bytes"] == 0
    assert found["images"]["active"] == 1
    assert found["images"]["size_bytes"] >= found["images"]["reclaimable_bytes"] >= 0
    root.ok("kill", "big")
    root.ok("wait", "big")
    assert _usage(root)["environments"]["reclaimable_bytes"] >= 20_000_000


def test_prune_removes_what_has_ended_and_nothing_that_is_in_use(fresh_root: Root) -> None:
    root = fresh_root
    root.ok("run", "--name", "ended", "debian", "true")
    root.ok("run", "-d", "--name", "lives", "debian", "sleep", "600")
    assert root.cli("system", "prune").returncode == 125  # nobody can say yes
    told = json.loads(root.ok("system", "prune", "--all", "--yes", "--json"))
    assert ("environment", "ended") in {(row["kind"], row["name"]) for row in told["removed"]}
    assert root.ok("ps", "-a", "-q").count("\n") == 0
    assert "debian" in root.ok("images")
    assert root.ok("exec", "lives", "echo", "here") == "here"


def test_check_finds_what_is_missing_and_nothing_else(fresh_root: Root) -> None:
    root = fresh_root
    root.ok("run", "-d", "--name", "lives", "debian", "sleep", "600")
    assert root.ok("system", "check", "--deep") == "all is well"
    copy = root.path / "images/copy"
    description = next(path for path in (root.path / "images").glob("*.json") if path.stem != "names")
    shutil.copy(description, copy)
    names = root.path / "images/names.json"
    text = names.read_text()
    names.write_text(json.dumps(json.loads(text) | {"lost:latest": "ab" * 32}))
    done = root.cli("system", "check")
    assert done.returncode == 1
    assert b"lost:latest" in done.stdout
    names.write_text(text)
    assert root.ok("system", "check") == "all is well"
    description.write_text("{}")
    done = root.cli("system", "check", "--json")
    assert done.returncode == 1
    assert any("damaged" in line for line in json.loads(done.stdout))
    shutil.move(copy, description)
    assert root.ok("system", "check") == "all is well"
