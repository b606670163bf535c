"""Write the generated pages; `--check` says whether they are up to date.

docs/reference.md from the programs' own `--help`, docs/metrics.md from the router's own table, and the list of cases in
docs/referee.md from the referee's cases.
"""

import json
import os
import pathlib
import subprocess
import sys

from typer.core import TyperGroup
from typer.main import get_command

from pdctl.app import COMMANDS, wired
from pdrouter.observe import described
from pdsim.referee.app import cases_markdown

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PROGRAMS = {"pdctl": "pdctl", "pdrouter": "pd-router", "pdsim.engine": "pd-engine-sim", "pdsim.referee": "pd-referee"}


ASK = """
import contextlib, io, json, runpy, sys
pages = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    pages.append(page.getvalue())
print(json.dumps(pages))
"""
"""One process for all: each would take a second to import what it shares with the others."""


def calls() -> list[list[str]]:
    """Name every program and command that has a --help, by module and arguments."""
    group = get_command(wired(*COMMANDS))
    assert isinstance(group, TyperGroup)
    found = [["pdctl"]]
    for name in COMMANDS:
        found.append(["pdctl", name])
        command = group.commands[name]
        if isinstance(command, TyperGroup):
            found += [["pdctl", name, verb] for verb in command.commands]
    return [*found, ["pdrouter"], ["pdsim.engine"], ["pdsim.referee"]]


def shown(listed: list[list[str]]) -> list[str]:
    """Give what `python -m` and each of these says with --help in a terminal of 100 columns without colours."""
    plain = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    environment = os.environ | plain | {"_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    environment.pop("FORCE_COLOR", None)
    environment.pop("GITHUB_ACTIONS", None)
    call = [sys.executable, "-c", ASK, json.dumps(listed)]
    answer = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    pages = ["\n".join(line.rstrip() for line in page.strip("\n").splitlines()) for page in json.loads(answer.stdout)]
    return [page.replace("python -m pdctl", "pdctl").replace("python -m pdsim.referee", "pd-referee") for page in pages]


def reference() -> str:
    """Give the page of all commands."""
    parts = ["# Reference\n\nGenerated from the programs' own `--help` by `make docs`; do not edit.\n"]
    listed = calls()
    for (module, *arguments), page in zip(listed, shown(listed), strict=True):
        title = " ".join([PROGRAMS[module], *arguments])
        parts.append(f"## {title}\n\n```text\n{page}\n```\n")
    return "\n".join(parts)


def _told(metric: described.Described) -> str:
    return f"{metric.name}_total" if metric.kind == "counter" else metric.name


def metrics() -> str:
    """Give the page of the router's metrics."""
    lines = [
        "# Metrics of the router", "",
        "Generated from `pdrouter/observe/described.py` by `make docs`; do not edit.",
        "The page is `/metrics` on port 29000.",
        "With several workers any of them answers for all: numbers are added up.", "",
        "| Metric | Kind | Labels | Meaning |", "|---|---|---|---|",
    ]  # fmt: skip
    for metric in described.ALL:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
        lines.append(f"| `{_told(metric)}` | {metric.kind} | {labels} | {metric.text} |")
    lines += ["", "## Coming from vllm-router", "", "| vllm-router 0.1.17 | here |", "|---|---|"]
    counterparts = {like: metric for metric in described.ALL for like in metric.like}
    for like, metric in sorted(counterparts.items()):
        lines.append(f"| `{like}` | `{_told(metric)}` |")
    return "\n".join(lines) + "\n"


def referee() -> str:
    """Give the referee's page with the list of its cases as it is."""
    page = (DOCS / "referee.md").read_text()
    before, _, rest = page.partition("<!-- cases -->\n")
    return (
        before
        + "<!-- cases -->\n"
        + cases_markdown()
        + "<!-- end of cases -->"
        + rest.partition("<!-- end of cases -->")[2]
    )


def main() -> int:
    """Write or check."""
    pages = {DOCS / "reference.md": reference(), DOCS / "metrics.md": metrics(), DOCS / "referee.md": referee()}
    if "--check" in sys.argv:
        return int(any(not path.exists() or path.read_text() != told for path, told in pages.items()))
    for path, told in pages.items():
        path.write_text(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
