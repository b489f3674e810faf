"""Nothing of the machine on which something was written gets into the project, and nothing is left for later."""

from __future__ import annotations

import re

from .sources import ROOT, project_files, relative

# Directories that are nobody's own, though a checkout may lie in them.
SHARED_PLACES = {"/", "/tmp", "/var", "/var/tmp", "/usr", "/opt", "/srv", "/run", "/mnt", "/home", "/root", "/data"}
SHARED_PLACES |= {"/app", "/build", "/builds", "/code", "/dist", "/src", "/kvmigrate", "/workspace"}
# Written in pieces, so that this file does not hold what it looks for.
HOSTS = ["py" + "pi.org", "pythonhosted" + ".org", "deb." + "debian.org", "archive." + "ubuntu.com", "docker" + ".io"]
HOMES = [r"/" + r"home/[a-z]", r"/" + r"Users/[A-Za-z]", r"(?<![\w/])/" + r"root/"]
LEFTOVERS = [r"\b" + "TO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b"]
UNCHECKED = {"LICENSE"}


def forbidden() -> re.Pattern[str]:
    """What may stand in no file: homes, this checkout's own place, registry hosts, notes for later."""
    own = [re.escape(str(path)) + r"\b" for path in (ROOT, *ROOT.parents) if str(path) not in SHARED_PLACES]
    return re.compile("|".join([*map(re.escape, HOSTS), *HOMES, *LEFTOVERS, *(rf"(?<![\w.]){path}" for path in own)]))


def test_no_file_names_a_machine_a_registry_or_a_leftover() -> None:
    pattern = forbidden()
    found = []
    for path in project_files():
        if path.name in UNCHECKED or b"\0" in (data := path.read_bytes()):
            continue
        for number, line in enumerate(data.decode().splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{relative(path)}:{number}: {match[0]}")
    assert not found, "\n" + "\n".join(found)


def test_the_check_knows_what_it_looks_for() -> None:
    for text in [*HOSTS, "see /" + "home/me/src", "in /" + "root/x", "# TO" + "DO: later"]:
        assert forbidden().search(text), text
    assert not forbidden().search("kvmigrate run guest.elf --memory 1G")
