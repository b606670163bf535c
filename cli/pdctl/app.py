"""The command line: wiring only."""

import sys

import typer
from typer.core import TyperGroup

from pdctl import configuration
from pdctl.commands.bench import bench
from pdctl.commands.calibrate import calibrate
from pdctl.commands.change import rollout, scale
from pdctl.commands.cleanup import cleanup
from pdctl.commands.compare import compare
from pdctl.commands.deploy import deploy
from pdctl.commands.diff import diff
from pdctl.commands.doctor import doctor
from pdctl.commands.eval import eval_
from pdctl.commands.logs import logs
from pdctl.commands.metrics import metrics
from pdctl.commands.plan import plan
from pdctl.commands.port_forward import port_forward
from pdctl.commands.record import record
from pdctl.commands.render import render
from pdctl.commands.replay import replay
from pdctl.commands.report import report
from pdctl.commands.router import router
from pdctl.commands.routing import routing
from pdctl.commands.runs import runs
from pdctl.commands.status import status
from pdctl.commands.sweep import sweep
from pdctl.commands.top import top
from pdctl.commands.tune import tune
from pdctl.console import print_error
from pdctl.errors import ExitCode, PdctlError

EPILOG = (
    "Exit status: 0 done, 1 failed, 2 wrong usage, 3 something needed is missing or taken, 4 timed out, 130 Ctrl-C."
)
COMMANDS = (
    deploy, status, top, logs, metrics, routing, doctor, bench, compare, sweep, report, record, replay, plan,
    tune, calibrate, port_forward, scale, rollout, render, diff, cleanup,
)  # fmt: skip

app = typer.Typer(
    help="Serve Llama-3.1-8B with prefill and decode on separate engines: deploy, look, measure, clean up.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def configured(context: typer.Context) -> None:
    """Take defaults from the configuration file."""
    group = context.command
    assert isinstance(group, TyperGroup)
    context.default_map = configuration.defaults(group, configuration.path())


for command in COMMANDS:
    app.command(epilog=EPILOG)(command)
app.command("eval", epilog=EPILOG)(eval_)
app.add_typer(runs, name="runs", epilog=EPILOG)
app.add_typer(router, name="router", epilog=EPILOG)


def main() -> None:
    """Run a command; errors become one screen and an exit status."""
    try:
        app()
    except PdctlError as error:
        print_error(error)
        sys.exit(error.code)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(ExitCode.INTERRUPTED)
