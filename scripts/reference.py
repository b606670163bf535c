"""Write docs/reference.md out of the programs' own `--help`; `--check` says whether it is up to date."""

import os
import pathlib
import subprocess
import sys

PATH = pathlib.Path(__file__).parent.parent / "docs/reference.md"
COMMANDS = ("deploy", "status", "logs", "routing", "bench", "cleanup")
CALLS = [
    ["pdctl"], *(["pdctl", command] for command in COMMANDS), ["pdrouter"], ["pdsim.engine"],
]  # fmt: skip
PROGRAMS = {"pdctl": "pdctl", "pdrouter": "pd-router", "pdsim.engine": "pd-engine-sim"}


def shown(module: str, *arguments: str) -> str:
    """Give a program's help as a terminal of 100 columns without colours shows it."""
    plain = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    environment = os.environ | plain | {"_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    environment.pop("FORCE_COLOR", None)
    environment.pop("GITHUB_ACTIONS", None)
    call = [sys.executable, "-m", module, *arguments, "--help"]
    answer = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    lines = [line.rstrip() for line in answer.stdout.strip("\n").splitlines()]
    return "\n".join(lines).replace("python -m pdctl", "pdctl")


def page() -> str:
    """Give the whole page."""
    parts = ["# Reference\n\nGenerated from the programs' own `--help` by `make docs`; do not edit.\n"]
    for module, *arguments in CALLS:
        title = " ".join([PROGRAMS[module], *arguments])
        parts.append(f"## {title}\n\n```text\n{shown(module, *arguments)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check."""
    told = page()
    if "--check" in sys.argv:
        return 0 if PATH.exists() and PATH.read_text() == told else 1
    PATH.write_text(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
