"""`pdctl report`: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from pdctl.commands.runs import Named
from pdctl.errors import writing
from pdctl.report.write import write
from pdctl.runs import Store


def report(
    name: Named = "last",
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; .md is Markdown, else HTML.", show_default="RUN.html here"),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown.")] = False,
) -> None:
    """Write a run's report: one HTML file that needs no network, or Markdown."""
    run = Store().find(name)
    path = output or Path(f"{run.name}.{'md' if markdown else 'html'}")
    with writing(path, "--output"):
        write(run, path)
    print(path)
