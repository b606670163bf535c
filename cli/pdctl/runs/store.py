"""All runs: `$XDG_DATA_HOME/pdctl/runs`."""

import re
import shutil
import time
from pathlib import Path

import platformdirs

from pdctl.errors import ExitCode, PdctlError
from pdctl.runs.run import Run

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


class Store:
    """The folder of all runs."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(platformdirs.user_data_dir("pdctl")) / "runs"

    def new(self, kind: str, label: str | None) -> Run:
        """Make the folder of a new run: its time, and its label or kind.

        Raises:
            PdctlError: the label is none.
        """
        if label is not None and not LABEL.fullmatch(label):
            raise PdctlError(
                f"{label!r} cannot be a label", "use letters, digits, dots, dashes, underscores", ExitCode.USAGE
            )
        base = f"{time.strftime('%Y%m%d-%H%M%S')}-{label or kind}"
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            try:
                (self.folder / f"{base}{suffix}").mkdir(parents=True)
            except FileExistsError:
                continue
            return Run(self.folder / f"{base}{suffix}")
        raise PdctlError(f"a thousand runs are named {base}", "choose another --label")

    def all(self) -> list[Run]:
        """Give every run, the oldest first."""
        return [Run(path.parent) for path in sorted(self.folder.glob("*/run.json"))]

    def find(self, name: str) -> Run:
        """Find a run by its name, the beginning or the label of it, `last`, or a folder; `RUN/POINT` is a point of it.

        Raises:
            PdctlError: there is none, or there are several.
        """
        path = Path(name)
        if path.is_dir() and (path / "run.json").exists():
            return Run(path)
        head, _, point = name.partition("/")
        runs = self.all()
        if head == "last":
            found = runs[-1:]
        else:
            found = (
                [run for run in runs if run.name == head]
                or [run for run in runs if run.name.startswith(head)]
                or [run for run in runs if run.name[16:] == head][-1:]
            )
        if not found:
            raise PdctlError(f"there is no run {head!r}", "see pdctl runs ls", ExitCode.USAGE)
        if len(found) > 1:
            raise PdctlError(
                f"{head!r} may be {', '.join(run.name for run in found[:5])}", "write more of it", ExitCode.USAGE
            )
        if not point:
            return found[0]
        below = Run(found[0].folder / "points" / point)
        if not below.exists:
            names = [one.name for one in found[0].points]
            raise PdctlError(
                f"{found[0].name} has no point {point!r}", f"its points are {', '.join(names) or 'none'}",
                ExitCode.USAGE,
            )  # fmt: skip
        return below

    def remove(self, run: Run) -> None:
        """Remove a run's folder.

        Raises:
            PdctlError: it goes on.
        """
        if run.state == "running":
            raise PdctlError(f"{run.name} goes on", "end it by Ctrl-C first")
        if run.state == "detached":
            raise PdctlError(f"{run.name} goes on in {run.about['pod']}", f"end it by pdctl runs stop {run.name} first")
        shutil.rmtree(run.folder)
