"""The command line by Typer: the verbs as declared, with help, completion and a word on every mistake."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from .options import Argument, Option
from .verbs import VERBS


def run(words: list[str]) -> int:
    """Do what ``words`` say. Raises what a verb raises, and Typer's own errors for what is no command line."""
    try:
        return application()(words, prog_name="kvmigrate", standalone_mode=False) or 0
    except typer.Abort:
        raise KeyboardInterrupt from None


def application() -> typer.Typer:
    """The verbs, and what is beside them, as Typer takes them."""
    app = typer.Typer(
        name="kvmigrate",
        help="Run a guest on KVM, and migrate, snapshot and restore it while it runs.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, verb in VERBS.items():
        app.command(name)(_for_typer(verb))
    return app


def _for_typer(verb: Callable[..., int]) -> Callable[..., int]:
    """``verb``, declared in Typer's words."""
    copy = FunctionType(verb.__code__, verb.__globals__, verb.__name__, verb.__defaults__)
    copy.__doc__ = verb.__doc__
    copy.__annotations__ = {name: _declared(hint) for name, hint in get_type_hints(verb, include_extras=True).items()}
    return copy


def _declared(hint: Any) -> Any:
    kind, *declared = get_args(hint) or (hint,)
    match declared:
        case [Option(flags=flags, help=text, metavar=metavar)]:
            return Annotated[kind, typer.Option(*flags, help=text, metavar=metavar)]
        case [Argument(help=text, metavar=metavar, complete=complete)]:
            return Annotated[kind, typer.Argument(help=text, metavar=metavar, autocompletion=complete)]
    return hint


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvmigrate {version('kvmigrate')}")
        raise typer.Exit(0)


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Run a guest on KVM, and migrate, snapshot and restore it while it runs."""
