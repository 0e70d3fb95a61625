"""The documentation leads where it says: relative links resolve, and commands in it are ones that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.cli import options, verbs
from isolat.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(isolat [a-z][^`\n]*)`")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def pages() -> list[Path]:
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md"), *ROOT.glob("contrib/**/*.md")]
    return sorted(found)


def links(text: str) -> Iterator[str]:
    """Targets of links to this repository; what stands in code is no link."""
    for target in LINK.findall(CODE.sub("", FENCED.sub("", text))):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield target


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        n = 0
        while (name := f"{slug}-{n}" if n else slug) in found:
            n += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    problems = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            problems.append(f"{link}: there is no such file")
        elif ROOT not in (resolved := target.resolve(), *resolved.parents):
            problems.append(f"{link}: leads out of the repository")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            problems.append(f"{link}: there is no such heading")
    assert not problems, f"{page.relative_to(ROOT)}:\n" + "\n".join(problems)


def test_links_in_code_are_none() -> None:
    assert list(links("[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n[g](https://h.example) [i](#j)\n")) == ["b.md", "#j"]


def test_anchors_are_githubs() -> None:
    assert anchors("# A `b`: C!\n## Same\n## Same\n```\n# no\n```\n") == {"a-b-c", "same", "same-1"}


def commands(line: str) -> Iterator[list[str]]:
    """The words after each ``isolat`` that begins a command of a shell's line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, ";"):
        if word.strip("|;&"):
            words.append(word)
            continue
        while words and words[0] in ("sudo", "time"):
            del words[0]
        if len(words) > 1 and words[0] == "isolat" and re.match("[a-z-]", words[1]):
            yield words[1:]
        words = []


def objection(words: list[str], whole: bool) -> str:
    """What the command line's own parser says against a command; ``whole``: with all the words it needs."""
    try:
        if whole:
            options.parse(words)
        else:
            _check_options(words)
    except UsageError as error:
        return f"isolat {' '.join(words)}: {error.message}"
    return ""


def _check_options(words: list[str]) -> None:
    """For a command that is only mentioned: its verb and its options, whatever words are left out."""
    name = " ".join(words[:2]) if words[0] in verbs.GROUPS else words[0]
    verb = verbs.VERBS.get(name)
    if verb is not None:
        options.read(words[len(name.split()) :], (*verb.options, *options.COMMON), f"isolat {name}", verb.stop)
    elif name not in {*verbs.GROUPS, "help", "VERB"}:
        raise UsageError(f"unknown verb: {name}")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines() if re.search(r"\bisolat ", line)]
    problems = [objection(words, True) for line in lines for words in commands(line)]
    mentioned = INLINE.findall(FENCED.sub("", text))
    problems += [objection(words, False) for line in mentioned for words in commands(line)]
    assert not any(problems), f"{page.relative_to(ROOT)}:\n" + "\n".join(filter(None, problems))


def test_the_readme_has_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sum(1 for block in BLOCK.findall(text) for line in block.splitlines() for _ in commands(line)) > 10


def test_commands_are_found_in_a_shells_lines() -> None:
    line = "echo 'isolat no' | sudo isolat run -i x cat; isolat ps && ls  # isolat no"
    assert list(commands(line)) == [["run", "-i", "x", "cat"], ["ps"]]
    assert objection(["run", "--nosuch", "x"], True)
    assert objection(["nosuch"], False)
    assert not objection(["image", "bootstrap", "debian"], True)
