"""The configuration file: defaults of options. A flag decides before the environment, that before this file.

Its keys are the options' long names. At the top they hold for every command that has the option, in a table named after
a command for that one.
"""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

import platformdirs
from typer.core import TyperGroup, TyperOption

from pdctl.errors import ExitCode, PdctlError

VARIABLE = "PDCTL_CONFIG"


def path() -> Path:
    """Give where it is, or would be."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(platformdirs.user_config_dir("pdctl")) / "config.toml"


def _options(command: Any) -> dict[str, str]:
    """Give the parameters of a command by the long names of their options."""
    return {
        option.removeprefix("--"): parameter.name or ""
        for parameter in command.params
        if isinstance(parameter, TyperOption)
        for option in parameter.opts
        if option.startswith("--")
    }


def _wrong(file: Path, key: str, known: list[str]) -> PdctlError:
    near = difflib.get_close_matches(key, known, 1)
    return PdctlError(
        f"{file} has {key!r}, which is no option" + (f"; is {near[0]!r} meant?" if near else ""),
        "use the long names of options as pdctl --help shows them, without dashes before", ExitCode.USAGE,
    )  # fmt: skip


def defaults(group: TyperGroup, file: Path) -> dict[str, dict[str, Any]]:
    """Read the file: defaults by command and parameter; nothing when there is no file.

    Raises:
        PdctlError: it is no TOML in UTF-8, or has what no command knows; exit code USAGE.
    """
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PdctlError(f"{file} cannot be used: {error}", "correct it, or move it away", ExitCode.USAGE) from None
    options = {name: _options(command) for name, command in group.commands.items()}
    known = sorted({option for those in options.values() for option in those})
    found: dict[str, dict[str, Any]] = {name: {} for name in options}
    for key, value in told.items():
        if isinstance(value, dict):
            continue
        if key not in known:
            raise _wrong(file, key, known)
        for name, those in options.items():
            if key in those:
                found[name][those[key]] = value
    for name, table in told.items():
        if not isinstance(table, dict):
            continue
        if name not in options:
            raise _wrong(file, name, sorted(options))
        for key, value in table.items():
            if key not in options[name]:
                raise _wrong(file, f"{name}.{key}", [f"{name}.{option}" for option in options[name]])
            found[name][options[name][key]] = value
    return found
