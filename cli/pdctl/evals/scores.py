"""Scores as lm_eval tells them."""

from dataclasses import dataclass
from typing import Any

import orjson
from rich.table import Table

from pdctl.runs.run import Run


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task.

    Args:
        task: its name; a group of tasks has scores of its own.
        metric: such as `acc`.
        filter: how the answer was taken out of the text.
        value: the score.
        stderr: its standard error, where lm_eval gives one.
        samples: how many it is the mean of.
        group: whether the task is a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int | None
    group: bool = False


def read(results: dict[str, Any]) -> list[Score]:
    """Read lm_eval's results file."""
    found = []
    groups = set(results.get("groups", ()))
    samples = results.get("n-samples", {})
    for task, told in results["results"].items():
        for key, value in told.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = told.get(f"{metric}_stderr,{filtered}")
            count = samples.get(task, {}).get("effective")
            found.append(
                Score(task, metric, filtered, float(value), stderr if isinstance(stderr, int | float) else None,
                      count, task in groups)
            )  # fmt: skip
    return found


def scores_of(run: Run) -> list[Score]:
    """Read a run's scores; none where it has none yet."""
    path = run.folder / "scores.json"
    return read(orjson.loads(path.read_bytes())) if path.exists() else []


def scores_table(run: Run) -> Table:
    """Make the table of a run's scores."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("TASK", "METRIC", "FILTER"):
        table.add_column(title)
    for title in ("SCORE", "± STDERR", "SAMPLES"):
        table.add_column(title, justify="right")
    for one in scores_of(run):
        name = f"[bold]{one.task}[/]" if one.group else one.task
        stderr = "" if one.stderr is None else f"{one.stderr:.4f}"
        table.add_row(name, one.metric, one.filter, f"{one.value:.4f}", stderr, str(one.samples or ""))
    return table
