"""Imports go one way: a module imports only what stands above it in the table, and nothing in a circle."""

from __future__ import annotations

from .sources import Import, imports_of, package_modules

EVERYTHING = None
# Part of the package → its row, and what it may import of the parts above (EVERYTHING: all of them). Every part may
# import errors, config, record and threads. docs/architecture.md explains the rows.
ROWS: dict[str, tuple[int, set[str] | None]] = {
    "errors": (0, set()),
    "config": (0, set()),
    "record": (0, set()),
    "threads": (0, set()),
    "_core": (1, set()),
    "_build": (1, set()),
    "state": (1, set()),
    "guests": (1, set()),
    "kvm": (2, {"_core", "state"}),
    "memory": (3, {"_core", "kvm"}),
    "devices": (4, {"_core", "memory", "state"}),
    "boot": (5, {"kvm", "memory"}),
    "contract": (5, {"memory", "state"}),
    "machine": (6, {"kvm", "memory", "devices", "boot", "contract", "state"}),
    "precopy": (6, {"_core", "memory", "state", "contract"}),
    "migration": (7, {"_core", "memory", "state", "contract", "precopy"}),
    "snapshot": (7, {"_core", "memory", "state", "contract", "precopy"}),
    "control": (8, EVERYTHING),
    "cli": (9, EVERYTHING),
    "api": (9, EVERYTHING),
    "__init__": (9, EVERYTHING),
    "__main__": (9, {"cli"}),
}
SAME_ROW = {("config", "errors"), ("config", "record"), ("__init__", "api"), ("__main__", "cli")}


def part_of(module: str) -> str:
    """``kvmigrate.kvm.vm`` belongs to ``kvm``; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def all_imports() -> list[Import]:
    return [found for module, path in package_modules().items() for found in imports_of(module, path)]


def complaint(found: Import) -> str | None:
    """What is wrong with one import, or None."""
    part, target = part_of(found.module), part_of(found.target)
    if part == target or (part, target) in SAME_ROW:
        return None
    (row, allowed), (target_row, _) = ROWS[part], ROWS[target]
    says = f"{found.where}: {found.module} (row {row}) imports {found.target} (row {target_row})"
    if target_row >= row:
        return f"{says}, which is not above it"
    if target in ("errors", "config", "record", "threads") or allowed is EVERYTHING or target in allowed:
        return None
    return f"{says}, but {part} may import only {', '.join(sorted(allowed)) or 'errors, config, record and threads'}"


def test_every_part_of_the_package_has_a_row() -> None:
    unknown = {part_of(module) for module in package_modules()} - ROWS.keys()
    assert not unknown, f"give these a row in ROWS and in docs/architecture.md: {sorted(unknown)}"


def test_imports_go_only_upwards() -> None:
    complaints = [text for found in all_imports() if (text := complaint(found))]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_check_sees_relative_and_nested_imports() -> None:
    assert complaint(Import("kvmigrate.memory.region", "kvmigrate.machine", "x:1")) is not None
    assert complaint(Import("kvmigrate.migration.source", "kvmigrate.kvm.vm", "x:1")) is not None
    assert complaint(Import("kvmigrate.kvm.vm", "kvmigrate", "x:1")) is not None
    assert complaint(Import("kvmigrate.kvm.vm", "kvmigrate.errors", "x:1")) is None
    seen = {(found.module, found.target) for found in all_imports()}
    assert ("kvmigrate.config", "kvmigrate.errors") in seen
    assert ("kvmigrate.state.frame", "kvmigrate.errors") in seen


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, in order, or nothing."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        found = next((cycle for target in sorted(graph.get(module, ())) if (cycle := visit(target))), [])
        path.pop()
        done.add(module)
        return found

    return next((cycle for module in sorted(graph) if (cycle := visit(module))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        # A package's __init__ runs first for every module inside: only what it imports itself counts for a circle.
        if found.target != found.module:
            graph.setdefault(found.module, set()).add(found.target)
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in(graph) == []
