"""The Python SDK against a real daemon."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import isolat
from isolat.errors import CommandNotFound, NotFound
from tests.support.roots import Root

pytestmark = pytest.mark.root


@pytest.fixture
def client(root: Root) -> isolat.Client:
    return isolat.Client(root.path, start=False)


def test_a_run_gives_its_output_and_code(client: isolat.Client) -> None:
    result = client.run("debian", ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_a_detached_environment_is_an_object(client: isolat.Client) -> None:
    with client.run("debian", ["sleep", "600"], detach=True) as env:
        assert env.exec(["echo", "inside"]).check().text == "inside\n"
        assert [one.id for one in client.ps()] == [env.id]
        assert env.stop(0).forced
    with pytest.raises(NotFound):
        client.get(env.id)


def test_errors_are_those_of_the_tree(client: isolat.Client) -> None:
    with pytest.raises(CommandNotFound):
        client.run("debian", ["no-such-command"])


def test_one_client_serves_many_threads(client: isolat.Client) -> None:
    with client.run("debian", ["sleep", "600"], detach=True) as env, ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda n: env.exec(["echo", str(n)]).check().text, range(40))
        assert list(found) == [f"{n}\n" for n in range(40)]
