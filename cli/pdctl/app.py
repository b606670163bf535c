"""The command line: wiring only."""

import sys

import typer

from pdctl.commands.bench import bench
from pdctl.commands.cleanup import cleanup
from pdctl.commands.compare import compare
from pdctl.commands.deploy import deploy
from pdctl.commands.eval import eval_
from pdctl.commands.logs import logs
from pdctl.commands.report import report
from pdctl.commands.routing import routing
from pdctl.commands.runs import runs
from pdctl.commands.status import status
from pdctl.commands.sweep import sweep
from pdctl.console import print_error
from pdctl.errors import ExitCode, PdctlError

EPILOG = (
    "Exit status: 0 done, 1 failed, 2 wrong usage, 3 something needed is missing or taken, 4 timed out, 130 Ctrl-C."
)

app = typer.Typer(
    help="Serve Llama-3.1-8B with prefill and decode on separate engines: deploy, look, measure, clean up.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (deploy, status, logs, routing, bench, compare, sweep, report, cleanup):
    app.command(epilog=EPILOG)(command)
app.command("eval", epilog=EPILOG)(eval_)
app.add_typer(runs, name="runs", epilog=EPILOG)


def main() -> None:
    """Run a command; errors become one screen and an exit status."""
    try:
        app()
    except PdctlError as error:
        print_error(error)
        sys.exit(error.code)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(ExitCode.INTERRUPTED)
