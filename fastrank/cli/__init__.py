"""The `fastrank` command. Every subcommand takes --json; wrong input ends with one sentence and exit code 2."""

from __future__ import annotations

import io
import sys

from rich.console import Console

# Each module registers its commands with the application when it is imported.
from fastrank.cli import _bench, _compress, _evaluate, _export, _info, _plan, _report  # noqa: F401
from fastrank.cli._common import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # × and ÷ in a terminal that cannot show them are no error
    try:
        app()
    except (ValueError, TypeError, ImportError, OSError) as error:
        message = (
            str(error)
            if not isinstance(error, OSError) or error.filename is None
            else f"{error.strerror}: {error.filename}"
        )
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"fastrank: {message}", markup=False)
        sys.exit(2)
    except RuntimeError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"fastrank: {error}", markup=False)
        sys.exit(1)
