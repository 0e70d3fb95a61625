"""docs/promises.md promises nothing that no test or bench holds: every name on it must be that of a real one.

The form of the page is the one that this test reads: ``### N. the promise``, then lines ``held by: `FILE::FUNCTION```,
and for figures that a script prints a block between ``<!-- figures: SCRIPT -->`` and ``<!-- end of figures -->``. A
bench is named by the constant with which it compares, and the promise must give that number.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/promises.md"

PROMISE = re.compile(r"### (\d+)\. (\S.*)")
HELD_BY = re.compile(r"held by: (.+)")
TARGET = re.compile(r"`((?:tests|bench)/[\w./-]+\.py)((?:::\w+)*)`")
FIGURES = re.compile(r"<!-- figures: (\S+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
UNKNOWN = "not measured yet"


@dataclass
class Promise:
    number: int
    text: str
    targets: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)


def read(text: str) -> tuple[list[Promise], list[str]]:
    """The promises of a page, and what is wrong with its form."""
    promises: list[Promise] = []
    problems: list[str] = []
    for n, line in enumerate(text.splitlines(), 1):
        if line.startswith("### "):
            found = PROMISE.fullmatch(line)
            if not found:
                problems.append(f"line {n}: a promise is '### NUMBER. TEXT', not {line!r}")
                continue
            promises.append(Promise(int(found[1]), found[2]))
        elif line.startswith("held by"):
            problems += _held_by(line, n, promises)
    return promises, problems


def _held_by(line: str, n: int, promises: list[Promise]) -> list[str]:
    found = HELD_BY.fullmatch(line)
    if not found or not promises:
        return [f"line {n}: {line!r} belongs to no promise, or names nothing"]
    targets = TARGET.findall(found[1])
    promises[-1].targets += [(file, tuple(filter(None, inner.split("::")))) for file, inner in targets]
    rest = TARGET.sub("", found[1]).replace(",", "").strip()
    return [f"line {n}: {rest!r} is not the name of a test or bench"] if rest or not targets else []


def numbering(promises: list[Promise]) -> list[str]:
    numbers = [promise.number for promise in promises]
    if numbers == list(range(1, len(numbers) + 1)):
        return []
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    return [f"the numbers are not 1 to {len(numbers)} in order: {numbers}; twice: {twice}; missing: {missing}"]


def defines(source: str, names: tuple[str, ...]) -> bool:
    """Whether a module defines ``names``: a function, or a class and a function in it."""
    body = ast.parse(source).body
    for name in names:
        found = next((node for node in body if _named(node) == name), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def constant(source: str, name: str) -> float | None:
    """The number that a module gives a name; None where it does not."""
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id == name and isinstance(node, ast.Assign):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            return float(value) if isinstance(value, (int, float)) else None
    return None


def _named(node: ast.stmt) -> str:
    return node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else ""


def missing_targets(promises: list[Promise], root: Path) -> list[str]:
    problems = []
    for promise in promises:
        where = f"promise {promise.number}"
        if not promise.targets:
            problems.append(f"{where} names nothing that holds it")
        for file, names in promise.targets:
            path = root / file
            if not path.is_file():
                problems.append(f"{where}: there is no {file}")
            elif file.startswith("bench/"):
                problems += _bench(promise, path, names, where)
            elif not defines(path.read_text(encoding="utf-8"), names):
                problems.append(f"{where}: {file} defines no {'::'.join(names)}")
            elif not (names and names[-1].startswith("test_")):
                problems.append(f"{where}: {file}::{'::'.join(names)} is no test")
    return problems


def _bench(promise: Promise, path: Path, names: tuple[str, ...], where: str) -> list[str]:
    value = constant(path.read_text(encoding="utf-8"), names[-1]) if len(names) == 1 else None
    if value is None:
        return [f"{where}: {path.name} has no number {'::'.join(names)} that it compares with"]
    if value not in {float(number.replace(",", "")) for number in NUMBER.findall(promise.text)}:
        return [f"{where} does not say {value:g}, which {path.name} has for {names[-1]}"]
    return []


def figures(text: str, root: Path) -> list[str]:
    """What is wrong with the blocks of figures: each is of a script that is there, and holds a table or says so."""
    problems = []
    blocks = FIGURES.findall(text)
    if text.count("<!-- figures:") != len(blocks) or text.count("<!-- end of figures -->") != len(blocks):
        problems.append("a block of figures has no begin or no end")
    for script, block in blocks:
        if not (root / script).is_file():
            problems.append(f"figures of {script}, which is not there")
        if "|" not in block and UNKNOWN not in block:
            problems.append(f"the figures of {script} are neither a table nor {UNKNOWN!r}")
    return problems


def test_every_promise_is_held_by_something_that_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    promises, problems = read(text)
    problems += numbering(promises) + missing_targets(promises, ROOT) + figures(text, ROOT)
    assert promises, "the page promises nothing"
    assert not problems, "docs/promises.md:\n" + "\n".join(problems)


def test_the_reader_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(
        "class TestIt:\n    def test_in(self): ...\ndef test_out(): ...\ndef helper(): ...\n"
    )
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/start.py").write_text("LIMIT = 0.20\nNAME = 'x'\n")
    good = "### 1. One.\nheld by: `tests/test_a.py::test_out`, `tests/test_a.py::TestIt::test_in`\n"
    bad = {
        "names nothing": "### 1. One.\n",
        "belongs to no promise": "held by: `tests/test_a.py::test_out`\n" + good,
        "is not the name of a test": "### 1. One.\nheld by: my word\n",
        "there is no tests/test_b.py": "### 1. One.\nheld by: `tests/test_b.py::test_out`\n",
        "defines no test_in": "### 1. One.\nheld by: `tests/test_a.py::test_in`\n",
        "does not say 0.2,": "### 1. At most 0.3.\nheld by: `bench/start.py::LIMIT`\n",
        "has no number NAME": "### 1. At most 0.2.\nheld by: `bench/start.py::NAME`\n",
        "is no test": "### 1. One.\nheld by: `tests/test_a.py::helper`\n",
        "twice: [1]": good + good,
        "missing: [1]": good.replace("1.", "2."),
        "a promise is": good + "### A promise\n",
        "no end": good + "<!-- figures: tests/test_a.py -->\n",
        "neither a table": good + "<!-- figures: tests/test_a.py -->\nfast\n<!-- end of figures -->\n",
    }
    bench = good + "### 2. At most 0.20 of 1,000.\nheld by: `bench/start.py::LIMIT`\n"
    for expected, text in [("", good), ("", bench), *bad.items()]:
        promises, problems = read(text)
        problems += numbering(promises) + missing_targets(promises, tmp_path) + figures(text, tmp_path)
        if expected:
            assert any(expected in problem for problem in problems), f"{expected!r} was not found: {problems}"
        else:
            assert not problems
