"""pdctl at a command line, with state and data folders of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from support.terminal import at_terminal

PDCTL = [sys.executable, "-m", "pdctl"]


class Shell:
    """Runs pdctl with a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.environment = os.environ | {
            "XDG_STATE_HOME": str(state), "XDG_DATA_HOME": str(state / "data"), "NO_COLOR": "1"
        }  # fmt: skip
        self.environment.pop("PYTHONPATH", None)
        self.state = state / "pdctl"

    def run(self, *arguments: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = self.environment | options.pop("environment", {})
        return subprocess.run(
            [*PDCTL, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False,
            cwd=self.state.parent, stdin=subprocess.DEVNULL, **options,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*PDCTL, *arguments], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=self.state.parent, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def in_terminal(self, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
        """Start a command in a terminal of its own; give it, and the descriptor that closes the terminal."""
        return at_terminal([*PDCTL, *arguments], self.environment, self.state.parent)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for deployments of this shell."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("XDG_STATE_HOME") == str(self.state.parent):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return [process for process in found if process.pid != os.getpid()]

    def told(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)
