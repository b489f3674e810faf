"""A command line that is read without Typer means what Typer says it does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import pytest
import typer
import typer.core
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.cli import full, plain
from kvmigrate.cli.verbs import VERBS

Call = tuple[str, dict[str, Any]]

PLAIN = (
    "run kernel --memory 64M --cpus=2 --append a=b --disk a=1,ro --disk b=2 --paused --initrd init --console=null",
    "restore --clone snap --name web --clock host --serial= --net lan=tap:t0 --no-reboot --verbose",
    "receive tcp://[::1]:4444 --prefault 1G --memory-backend memfd",
    "send web unix:///s --max-rounds 7 --connections 2 --json",
    "balloon web",
    "balloon web 512M",
    "stop web",
    "list",
)
NOT_PLAIN = (
    "",
    "--version",
    "--help",
    "frobnicate",
    "stop",
    "stop a b",
    "stop --help",
    "query web -v",
    "query web --json=yes",
    "query -- web",
    "restore snap --nam web",
    "restore snap --name",
    "restore snap --clock soon",
    "send web unix:///s --max-rounds many",
    "cpu-baseline one two",
)


SEEN: list[Call] = []


@functools.cache
def noting() -> typer.Typer:
    """The application, whose verbs only note in SEEN what they are called with."""

    def noted(name: str, verb: Callable[..., int]) -> Callable[..., None]:
        return functools.wraps(verb)(lambda **values: SEEN.append((name, values)))

    app = full.application()
    for command in app.registered_commands:
        assert command.name is not None and command.callback is not None
        command.callback = noted(command.name, command.callback)
    return app


def by_typer(words: list[str]) -> Call | None:
    """The verb that Typer would call and every parameter; None when it would call none."""
    SEEN.clear()
    try:
        noting()(words, prog_name="kvmigrate", standalone_mode=False)
    except Exception as error:
        assert hasattr(error, "format_message"), error
    return SEEN[0] if SEEN else None


def without_typer(words: list[str]) -> Call | None:
    """The same by :mod:`kvmigrate.cli.plain`."""
    call = plain.understand(words)
    if call is None:
        return None
    assert isinstance(call, partial)
    bound = signature(call.func).bind(**call.keywords)
    bound.apply_defaults()
    return words[0], dict(bound.arguments)


@pytest.mark.parametrize("line", PLAIN)
def test_a_plain_line_is_read_without_typer_to_the_same_end(line: str) -> None:
    assert without_typer(line.split()) == by_typer(line.split()) is not None


@pytest.mark.parametrize("line", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_typer(line: str) -> None:
    assert plain.understand(line.split()) is None


def test_the_shell_that_completes_a_plain_line_gets_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_KVMIGRATE_COMPLETE", "complete_bash")
    assert plain.understand(["stop", "web"]) is None


def flags_of(name: str) -> list[str]:
    """The flags that Typer knows for the verb ``name``."""
    group = typer.main.get_command(noting())
    assert isinstance(group, typer.core.TyperGroup)
    return [flag for parameter in group.commands[name].params for flag in parameter.opts if flag.startswith("-")]


VALUES = st.sampled_from(["web", "snap", "3", "-1", "", "host", "memfd", "a=b", "x", "--", "-v", "-", "--name=", "é"])


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A verb, its flags and values in any order, with mistakes."""
    name = draw(st.sampled_from(sorted(VERBS)))
    flags = st.sampled_from([*flags_of(name), "--none"])
    word = VALUES | flags | st.builds("{}={}".format, flags, VALUES)
    return [name, *draw(st.lists(word, max_size=6))]


@given(lines())
def test_whatever_is_read_without_typer_means_what_typer_says(words: list[str]) -> None:
    call = without_typer(words)
    assert call is None or call == by_typer(words)
