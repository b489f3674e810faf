"""The project's own files, as git knows them, and what their syntax trees say."""

from __future__ import annotations

import ast
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kvmigrate"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Every file that is committed or would be, in order."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return tuple(path for name in sorted(set(names)) if name and (path := ROOT / name).is_file())


def with_suffix(*suffixes: str) -> list[Path]:
    """The project's files that end in one of ``suffixes``."""
    return [path for path in project_files() if path.suffix in suffixes]


def relative(path: Path) -> str:
    """``path`` as a person names it."""
    return str(path.relative_to(ROOT))


@functools.cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of one Python file."""
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
def package_modules() -> dict[str, Path]:
    """Dotted name to file, of every module of the package."""
    modules = {}
    for path in with_suffix(".py"):
        if path.is_relative_to(ROOT / PACKAGE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@dataclass(frozen=True)
class Import:
    """One import of ``target``, a module of the package, by another one."""

    module: str
    target: str
    where: str


def imports_of(module: str, path: Path) -> list[Import]:
    """What ``module`` imports of the package, at the top or inside a function, by absolute or relative name."""
    found = []
    for node in ast.walk(parse(path)):
        for target in _targets(node, module, is_package=path.name == "__init__.py"):
            found.append(Import(module, target, f"{relative(path)}:{getattr(node, 'lineno', 0)}"))
    return found


def _targets(node: ast.AST, module: str, *, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names if name.name.split(".")[0] == PACKAGE]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = _absolute(node, module, is_package=is_package)
    if base.split(".")[0] != PACKAGE:
        return []
    return [_module_of(base, name.name) for name in node.names]


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parents = parts[: len(parts) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _module_of(base: str, name: str) -> str:
    full = f"{base}.{name}"
    return full if full in package_modules() or name == "_core" else base


def functions(tree: ast.Module) -> list[Function]:
    """Every function and method, also nested ones."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines from ``def`` to the end, the docstring not counted."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines
