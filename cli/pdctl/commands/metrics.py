"""`pdctl metrics`: the metrics pages of the router and of each engine, in one go."""

import re
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.text import Text

from pdctl.commands.options import Context, Format, Name, Namespace, Output
from pdctl.console import out, print_data
from pdctl.errors import ExitCode, PdctlError
from pdctl.targets import find


def metrics(
    member: Annotated[
        str | None, typer.Argument(help="prefill, decode, router, or one process or pod.", show_default="all")
    ] = None,
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    grep: Annotated[str | None, typer.Option(help="Only metrics in whose name this regular expression occurs.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Show the metrics pages of the router and of each engine; as JSON or YAML every sample with its labels."""
    try:
        wanted = re.compile(grep or "")
    except re.error as error:
        raise PdctlError(f"{grep!r} is no regular expression: {error}", "correct --grep", ExitCode.USAGE) from None
    target = find(name, namespace, context)
    told: dict[str, list[dict[str, object]]] = {}
    try:
        for whose, _, told_page in target.pages("/metrics", member):
            page = f"# {whose} does not answer\n" if told_page is None else told_page
            if output is Format.TABLE:
                out.print(Text(f"== {whose}", "bold"))
                for line in page.splitlines():
                    if not grep or (
                        not line.startswith("#") and wanted.search(line.partition("{")[0].partition(" ")[0])
                    ):
                        print(line)
                continue
            told[whose] = [
                {"name": sample.name, "labels": sample.labels, "value": sample.value}
                for family in text_string_to_metric_families(page)
                for sample in family.samples
                if wanted.search(sample.name)
            ]
    finally:
        target.close()
    if output is not Format.TABLE:
        print_data(told, output.value)
