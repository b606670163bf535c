"""Programs: those beside this Python, and tools of others in environments of their own, made when first needed."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from pdctl.errors import ExitCode, PdctlError

_ERROR_LINES = 8


_PACKAGES = {"pd-engine-sim": "pd-simulator", "pd-router": "pd-router"}


def beside(name: str) -> str:
    """Find a program of ours beside this Python or on PATH.

    Raises:
        PdctlError: it is not installed.
    """
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        raise PdctlError(
            f"the program {name} is not installed",
            f"run: {sys.executable} -m pip install {_PACKAGES[name]}",
            ExitCode.PREFLIGHT,
        )
    return found


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages of exact versions in an environment that nothing else uses.

    Args:
        name: folder's name; it has the version in it, so that another version is another environment.
        packages: what is installed, as pip reads it.
    """

    name: str
    packages: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is: below the user's cache, for it can be made again."""
        return Path(platformdirs.user_cache_dir("pdctl")) / "environments" / self.name

    def program(self, name: str, on_make: Callable[[str], None]) -> str:
        """Give the path of one of its programs; the environment is made first if need be.

        Raises:
            PdctlError: it cannot be made.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        done = self.folder / "complete"
        with (self.folder.parent / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once make it once
            if not done.exists():
                on_make(f"installing {' '.join(self.packages)} into an environment of its own (once)")
                self._make()
                done.touch()
        return str(self.folder / "bin" / name)

    def _make(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        beside = Path(sys.executable).parent / "uv"
        uv = str(beside) if beside.exists() else shutil.which("uv")
        python = str(self.folder / "bin" / "python")
        if uv:
            self._call([uv, "venv", "--quiet", "--python", sys.executable, str(self.folder)])
            self._call([uv, "pip", "install", "--quiet", "--python", python, *self.packages])
        else:
            self._call([sys.executable, "-m", "venv", str(self.folder)])
            self._call([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.packages])

    def _call(self, command: list[str]) -> None:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise PdctlError(
                f"{' '.join(self.packages)} cannot be installed into {self.folder}",
                "check that the package index is reached from here, then run the command again",
                ExitCode.PREFLIGHT,
                (answer.stderr or answer.stdout).splitlines()[-_ERROR_LINES:],
            )
