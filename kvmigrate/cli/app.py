"""The ``kvmigrate`` command: the one place where an error becomes a line and a status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

from ..errors import KvmigrateError
from . import plain


def main() -> None:
    """The console script: run a verb, and turn whatever it raises into one line and an exit status."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """The exit status of ``kvmigrate ARGUMENTS``. Errors are told in one line on standard error."""
    try:
        return _understood(arguments)()
    except KvmigrateError as error:
        return _fail(error, str(error), 2)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130)
    except BrokenPipeError:
        # Nobody reads standard output any more; keep the interpreter from saying so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:  # a mistake in the options, of Typer's own class
            print(f"kvmigrate: {' '.join(usage().split())} (see kvmigrate --help)", file=sys.stderr)
            return 2
        return _fail(error, f"unexpected {type(error).__name__}: {error} (KVMIGRATE_TRACEBACK=1 shows where)", 2)


def _understood(arguments: list[str]) -> Callable[[], int]:
    if verb := plain.understand(arguments):
        return verb
    from . import full

    return partial(full.run, arguments or ["--help"])


def _fail(error: BaseException, text: str, status: int) -> int:
    if os.environ.get("KVMIGRATE_TRACEBACK"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print("kvmigrate: " + " ".join(text.split()), file=sys.stderr)
    return status
