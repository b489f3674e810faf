"""Reads plain command lines without Typer, whose import takes as long as restoring a guest.

Plain is what names a verb, its options in full, and each value after ``=`` or as the next word. All else (help, short
flags, completion, any mistake) is left to Typer, which reads a plain command line just the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .options import Option
from .verbs import VERBS

COMPLETION = "_KVMIGRATE_COMPLETE"
"""What the shell sets to ask what could come next, by the name that Typer gives it."""


def understand(words: list[str]) -> Callable[[], int] | None:
    """The verb that ``words`` name, ready to be called with what they say; None when they are not plain."""
    verb = VERBS.get(words[0]) if words else None
    if verb is None or COMPLETION in os.environ:
        return None
    try:
        return partial(verb, **_values(verb, words[1:]))
    except (LookupError, ValueError):  # a flag or an argument that the verb does not have, a value of another type
        return None


def _values(verb: Callable[..., int], words: list[str]) -> dict[str, Any]:
    """The parameters of ``verb`` that ``words`` give a value."""
    arguments, options = _parameters(verb)
    values: dict[str, Any] = {}
    left = words[::-1]
    while left:
        word = left.pop()
        if not word.startswith("-"):
            name, kind = arguments.pop(0)
            values[name] = kind(word)
            continue
        flag, equals, text = word.partition("=")
        name, kind = options[flag]
        if kind is bool:
            if equals:
                raise ValueError(f"{flag} takes no value")
            values[name] = True
        elif kind == list[str]:
            values.setdefault(name, []).append(text if equals else left.pop())
        else:
            values[name] = kind(text if equals else left.pop())
    required = verb.__code__.co_varnames[: verb.__code__.co_argcount - len(verb.__defaults__ or ())]
    if not values.keys() >= set(required):
        raise LookupError("an argument is missing")
    return values


def _parameters(verb: Callable[..., int]) -> tuple[list[tuple[str, Any]], dict[str, tuple[str, Any]]]:
    """Name and type of each argument of ``verb`` in order, and of each option by its flag."""
    arguments, options = [], {}
    for name, hint in get_type_hints(verb, include_extras=True).items():
        if name == "return":
            continue
        kind, declared = get_args(hint)
        if isinstance(kind, UnionType):  # with None, which no word can be
            kind = get_args(kind)[0]
        if isinstance(declared, Option):
            options[declared.flags[0] if declared.flags else "--" + name.replace("_", "-")] = name, kind
        elif get_origin(kind) is list:
            raise ValueError("any number of arguments")
        else:
            arguments.append((name, kind))
    return arguments, options
