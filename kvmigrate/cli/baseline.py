"""The verb cpu-baseline: the CPU that several hosts have in common, from what kvmigrate doctor said on each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, HostError
from ..kvm.baseline import common_cpuid, lost_features
from ..kvm.cpu_files import FORMAT, read_cpu_file
from . import show


def cpu_baseline(paths: Sequence[Path], output: Path | None, *, as_json: bool) -> int:
    """Write the common CPU to ``output``, or with none to standard output; what each host loses to a table."""
    hosts = {str(path): read_cpu_file(path) for path in paths}
    if len(hosts) < len(paths):
        raise ConfigError("a file comes twice: name the file of each host once")
    common = common_cpuid(hosts)
    lost = {name: lost_features(table, common) for name, table in hosts.items()}
    found = {"format": FORMAT, "hosts": list(hosts), "lost": lost, "cpuid": common}
    if output is not None:
        _write(output, found)
    if as_json or output is None:
        show.print_json(found)
    if not as_json:
        rows = [[name, str(len(names)), " ".join(names) or "–"] for name, names in lost.items()]
        show.table("", ["host", "features lost", "which"], rows, stderr=output is None)
        if output is not None:
            print(f"written to {output}: kvmigrate run --cpu {output}")
    return 0


def _write(path: Path, value: object) -> None:
    try:
        path.write_text(json.dumps(value) + "\n")
    except OSError as error:
        raise HostError(str(path), error.errno or 0) from error
