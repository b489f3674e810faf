"""The documents speak of what is there: links lead somewhere, commands and options exist, tables are current."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .sources import ROOT, project_files

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
CODE = re.compile(r"```[^\n]*\n(.*?)```|`([^`\n]+)`", re.DOTALL)
COMMAND = re.compile(r"(?:^|[\s$(])(?<!from )kvmigrate ([a-z][a-z-]*)([^\n|]*)")
TARGET = re.compile(r"(?:^|[\s$(])make ([a-z-]+)")
PATH = re.compile(r"^(?:kvmigrate|tests|examples|docs)/[\w./-]+$")


def documents() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".md"]


def code_of(text: str) -> list[str]:
    """Every piece of code in a document, blocks and inline."""
    return [block or inline for block, inline in CODE.findall(text)]


def anchors(path: Path) -> set[str]:
    """The anchors that a document's headings make on a code host."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """The relative links of one document that lead nowhere."""
    found = []
    for link in LINK.findall(CODE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(f"{path.name}: {link}")
    return found


def test_relative_links_resolve() -> None:
    assert [link for path in documents() for link in broken_links(path)] == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One Two\n[a](page.md#one-two) [b](#three) [c](missing.md) [d](mailto:x)\n")
    assert broken_links(page) == ["page.md: #three", "page.md: missing.md"]


def test_every_decision_and_page_is_linked() -> None:
    pages = {path for path in documents() if path.parent == ROOT / "docs"} - {ROOT / "docs" / "index.md"}
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall((ROOT / "docs" / "index.md").read_text())}
    assert pages - linked == set()


def used_commands() -> dict[str, set[str]]:
    """Verb to the options with which the documents use it."""
    found: dict[str, set[str]] = {}
    for path in documents():
        for code in code_of(path.read_text()):
            for verb, rest in COMMAND.findall(code.replace("\\\n", " ")):
                options = re.findall(r"(?<!\S)--[a-z-]+", rest.partition("#")[0])
                found.setdefault(verb, set()).update(options)
    return found


@pytest.mark.parametrize("verb", sorted(used_commands()))
def test_documented_commands_exist_with_their_options(verb: str) -> None:
    command = [sys.executable, "-m", "kvmigrate", verb, "--help"]
    shown = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert shown.returncode == 0, f"there is no verb {verb}: {shown.stderr}"
    missing = {option for option in used_commands()[verb] if not re.search(rf"{option}\b", shown.stdout)}
    assert missing == set()


def test_the_readme_shows_the_whole_life_of_a_guest() -> None:
    assert {"run", "receive", "send", "snapshot", "restore", "inspect", "verify", "doctor"} <= used_commands().keys()


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {name for path in documents() for code in code_of(path.read_text()) for name in TARGET.findall(code)}
    assert {"demo", "test"} <= used
    assert used - targets == set()


def test_files_named_in_documents_exist() -> None:
    named = {code for path in documents() for code in code_of(path.read_text()) if PATH.match(code)}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert named


def test_the_command_table_of_qmp_is_current() -> None:
    command = [sys.executable, "-m", "kvmigrate.control.commands"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert table and table in (ROOT / "docs" / "qmp.md").read_text(), "take what make docs prints"
