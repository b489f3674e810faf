"""Files and functions stay short enough to be read in one go."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from .sources import PACKAGE, ROOT, functions, length, parse, relative, with_suffix

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_LINES = 15
_C_FUNCTION = re.compile(r"^[A-Za-z_][^;={}]*\)\s*\n?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


def c_functions(text: str) -> Iterator[tuple[int, int]]:
    """The line and the length of every function of a C file."""
    for match in _C_FUNCTION.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[0].count("\n") + 1


def function_lengths(path: Path) -> Iterator[tuple[str, int]]:
    """Where each function of a Python or C file is, and its length in lines."""
    if path.suffix == ".py":
        for function in functions(parse(path)):
            yield f"{relative(path)}:{function.lineno} {function.name}", length(function)
    else:
        for line, lines in c_functions(path.read_text()):
            yield f"{relative(path)}:{line}", lines


def test_no_file_is_over_400_lines() -> None:
    lengths = {path: path.read_bytes().count(b"\n") for path in with_suffix(".py", ".pyi", ".c", ".h", ".S", ".sh")}
    too_long = [f"{relative(path)} has {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert not too_long, "\n" + "\n".join(too_long)


def test_no_function_is_over_60_lines() -> None:
    found = [item for path in with_suffix(".py", ".c") for item in function_lengths(path)]
    too_long = [f"{where} has {lines} lines" for where, lines in found if lines > MAX_FUNCTION_LINES]
    assert not too_long, "\n" + "\n".join(too_long)


def test_the_median_function_has_at_most_15_lines() -> None:
    package = [path for path in with_suffix(".py", ".c") if path.is_relative_to(ROOT / PACKAGE)]
    lengths = [lines for path in package for _, lines in function_lengths(path)]
    assert lengths and statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_c_functions_are_found_with_their_length() -> None:
    text = "int a;\n\nstatic int f(int x)\n{\n    return x;\n}\n\nvoid g(\n    void) {\n}\nstruct s {\n    int a;\n};\n"
    assert list(c_functions(text)) == [(3, 4), (8, 3)]
