"""What others call says what it does."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .sources import Function, length, package_modules, parse, relative

OBVIOUS_METHOD_LINES = 6
"""A method this short, in a class that has a docstring, may speak for itself."""


def undocumented(tree: ast.Module, where: str) -> Iterator[str]:
    """Modules, classes, functions and longer methods that are public and say nothing."""
    if tree.body and ast.get_docstring(tree) is None:
        yield f"{where}: the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{where}:{node.lineno}: {node.name}"
            if isinstance(node, ast.ClassDef):
                yield from _methods(node, where)


def _methods(owner: ast.ClassDef, where: str) -> Iterator[str]:
    for node in owner.body:
        if (
            isinstance(node, Function)
            and not node.name.startswith("_")
            and length(node) > OBVIOUS_METHOD_LINES
            and ast.get_docstring(node) is None
        ):
            yield f"{where}:{node.lineno}: {owner.name}.{node.name}"


def test_everything_public_has_a_docstring() -> None:
    found = [item for path in package_modules().values() for item in undocumented(parse(path), relative(path))]
    assert not found, "\n" + "\n".join(found)


def test_a_missing_docstring_is_seen() -> None:
    tree = ast.parse('"""Doc."""\ndef f(): pass\ndef _g(): pass\nclass C:\n    """Doc."""\n')
    assert list(undocumented(tree, "x")) == ["x:2: f"]
