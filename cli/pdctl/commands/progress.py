"""Progress on the terminal; one line where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pdctl.bench.measure import Progress as OnProgress
from pdctl.console import err


@contextmanager
def counted(what: str, total: int, line: str) -> Iterator[OnProgress]:
    """Show how many of a number are done and failed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, refresh_per_second=4) as progress:
        task = progress.add_task(what, total=total, failed="")
        if not err.is_terminal:
            err.print(f"{what}: {line}", soft_wrap=True)

        def on_progress(done: int, failed: int) -> None:
            progress.update(task, completed=done, failed=f"{failed} failed" if failed else "")

        yield on_progress
