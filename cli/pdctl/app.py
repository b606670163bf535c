"""The command line: wiring only."""

import importlib
import sys

import typer
from typer.core import TyperGroup

from pdctl import configuration
from pdctl.console import print_error
from pdctl.errors import ExitCode, PdctlError, of_files
from pdctl.interrupt import interruptible

EPILOG = (
    "Exit status: 0 done, 1 failed, 2 wrong usage, 3 something needed is missing or taken, 4 timed out, 130 Ctrl-C."
)
COMMANDS = {
    "deploy": "deploy:deploy", "status": "status:status", "top": "top:top", "logs": "logs:logs",
    "metrics": "metrics:metrics", "routing": "routing:routing", "doctor": "doctor:doctor", "bench": "bench:bench",
    "compare": "compare:compare", "sweep": "sweep:sweep", "report": "report:report", "record": "record:record",
    "replay": "replay:replay", "plan": "plan:plan", "tune": "tune:tune", "calibrate": "calibrate:calibrate",
    "port-forward": "port_forward:port_forward", "scale": "change:scale", "rollout": "change:rollout",
    "render": "render:render", "diff": "diff:diff", "cleanup": "cleanup:cleanup", "eval": "eval:eval_",
    "runs": "runs:runs", "router": "router:router",
}  # fmt: skip
"""Where each is below pdctl.commands, and its name there."""


def configured(context: typer.Context) -> None:
    """Take defaults from the configuration file."""
    group = context.command
    assert isinstance(group, TyperGroup)
    context.default_map = configuration.defaults(group, configuration.path())


def wired(*names: str) -> typer.Typer:
    """Give the command line with these commands; only what they need is imported."""
    app = typer.Typer(
        help="Serve Llama-3.1-8B with prefill and decode on separate engines: deploy, look, measure, clean up.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(configured)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(f"pdctl.commands.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, epilog=EPILOG)
        else:
            app.command(name, epilog=EPILOG)(command)
    return app


def main() -> None:
    """Run a command; errors become one screen and an exit status."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        # All of them take a second to import. Whoever asks for help, or has a configuration file, needs them all.
        alone = asked in COMMANDS and not configuration.path().exists()
        with interruptible():  # so that temporary files go and locks are given back
            wired(*([asked] if alone else COMMANDS))()
    except PdctlError as error:
        print_error(error)
        sys.exit(error.code)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(ExitCode.INTERRUPTED)
    except OSError as error:
        told = of_files(error)
        if told is None:
            raise
        print_error(told)
        sys.exit(told.code)
