"""Where output goes: data to stdout, progress and errors to stderr."""

import signal
import sys
from typing import Any

import orjson
import typer
import yaml
from rich.console import Console
from rich.text import Text

from pdctl.errors import ExitCode, PdctlError

WIDE = 200  # columns where there is no terminal that tells: nothing is cut off in a pipe or a file

out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDE)


def print_json(data: object) -> None:
    """Print data as JSON on stdout."""
    print(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, told: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", told, style="|" if "\n" in told else None)


_Dumper.add_representer(str, _text)


def yaml_text(*documents: Any) -> str:
    """Write data as YAML, a document each."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=WIDE, allow_unicode=True)


def print_data(data: Any, wanted: str) -> None:
    """Print data on stdout as `json` or `yaml`."""
    if wanted == "json":
        print_json(data)
    else:
        print(yaml_text(orjson.loads(orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS))), end="")


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


def confirmed(question: str, *, default: bool) -> bool:
    """Ask at the terminal, before anything is changed.

    Raises:
        PdctlError: a Ctrl-C or the end of the input came instead of an answer.
    """
    # asyncio.run takes a Ctrl-C for its main task, which is in the middle of asking and would never hear of it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return typer.confirm(question, default=default, err=True)
    except typer.Abort:
        raise PdctlError(
            "interrupted; nothing was changed", "run the command again when you are ready", ExitCode.INTERRUPTED
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)


def bytes_text(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
