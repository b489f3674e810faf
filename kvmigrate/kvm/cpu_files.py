"""The files in which hosts tell what their CPUs can do, and the CPU that ``--cpu`` chooses. All of them are hostile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadField, ConfigError
from .baseline import baseline_cpuid
from .cpuid import compare_cpuid, parse_cpuid
from .host import CpuidEntry

FORMAT = 1
MAX_FILE_BYTES = 4 << 20
HOST, BASELINE = "host", "baseline"


def read_cpu_file(path: Path) -> list[CpuidEntry]:
    """The CPUID in a file that ``kvmigrate doctor --json`` or ``kvmigrate cpu-baseline`` wrote. Raises
    :class:`ConfigError`, naming the file and what is wrong in it."""
    value = _read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT or "cpuid" not in value:
        raise ConfigError(f"{path} tells no CPU: make it with kvmigrate doctor --json or kvmigrate cpu-baseline")
    try:
        table, _ = parse_cpuid(value["cpuid"], [], "cpuid")
    except BadField as error:
        raise ConfigError(f"{path}: {error}") from error
    return table


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has over {MAX_FILE_BYTES >> 20} MiB: it tells no CPU")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): make it with kvmigrate doctor --json") from error


def choose_cpu(choice: str, supported: Sequence[CpuidEntry]) -> Sequence[CpuidEntry]:
    """What a new guest's CPU is made from: all that is ``supported`` here (``host``), the least that most hosts have
    (``baseline``), or what a file says. Raises :class:`ConfigError`, naming what this host lacks."""
    if choice == HOST:
        return supported
    if choice == BASELINE:
        return baseline_cpuid(supported)
    wanted = read_cpu_file(Path(choice))
    lacks = [item.name.removeprefix("cpuid.") for item in compare_cpuid(wanted, supported) if item.verdict == "refused"]
    if lacks:
        raise ConfigError(f"this host lacks {', '.join(lacks)} of {choice}: make a baseline with this host too")
    return wanted
