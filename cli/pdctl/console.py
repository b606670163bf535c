"""Where output goes: data to stdout, progress and errors to stderr."""

import sys

import orjson
from rich.console import Console
from rich.text import Text

from pdctl.errors import PdctlError

WIDE = 200  # columns where there is no terminal that tells: nothing is cut off in a pipe or a file

out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDE)


def print_json(data: object) -> None:
    """Print data as JSON on stdout."""
    print(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


def print_error(error: PdctlError) -> None:
    """Show an error: cause, evidence, next step."""
    err.print(Text.assemble(("error: ", "bold red"), error.cause))
    for line in error.evidence:
        err.print(Text("  | " + line, style="dim"))
    err.print(Text.assemble(("next:  ", "bold"), error.next_step))


def bytes_text(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
