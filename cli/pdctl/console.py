"""Where output goes: data to stdout, progress and errors to stderr."""

import sys
from typing import Any

import orjson
import yaml
from rich.console import Console
from rich.text import Text

from pdctl.errors import PdctlError

WIDE = 200  # columns where there is no terminal that tells: nothing is cut off in a pipe or a file

out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDE)


def print_json(data: object) -> None:
    """Print data as JSON on stdout."""
    print(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


def print_data(data: Any, wanted: str) -> None:
    """Print data on stdout as `json` or `yaml`."""
    if wanted == "json":
        print_json(data)
    else:
        print(yaml.safe_dump(orjson.loads(orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS)), sort_keys=False), end="")


def span(seconds: float) -> str:
    """Write a time for people: `42s`, `3m05s`, `2h10m`."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


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
