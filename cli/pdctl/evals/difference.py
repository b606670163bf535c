"""How the scores of two evaluations differ, task by task, and whether that is more than chance."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson

from pdctl.compare.difference import Verdict
from pdctl.errors import ExitCode, PdctlError
from pdctl.evals.scores import Score, scores_of
from pdctl.runs.run import Run

_OF_THE_ITEMS = ("task", "limit", "num_fewshot", "seed")  # what decides which documents are asked, and how
_Z = 1.959963984540054  # of a two-sided interval of 95 %
_By = dict[tuple[str, str, str], dict[int, float]]


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one task in two evaluations.

    Args:
        task: its name.
        metric: such as `acc`.
        filter: how the answer was taken out of the text.
        base: score of the evaluation that is compared with.
        other: score of the other one.
        change: other - base.
        stderr: of the change; nothing where lm_eval gives no standard error.
        samples: how many documents both scored one by one; nothing where that is not known.
        changed: for how many of these the score is another one.
        verdict: of the other one; `within noise` when the change's 95 % interval has 0 in it.
    """

    task: str
    metric: str
    filter: str
    base: float
    other: float
    change: float
    stderr: float | None
    samples: int | None
    changed: int | None
    verdict: Verdict | None

    def told(self) -> str:
        """Write the change with its standard error."""
        return f"{self.change:+.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse evaluations of other documents; the model may be another one.

    Raises:
        PdctlError: they asked other things, or one has no scores.
    """
    for run in runs:
        if not scores_of(run):
            raise PdctlError(f"{run.name} has no scores", f"go on with pdctl eval --resume {run.name}", ExitCode.USAGE)
    base = runs[0].about["wish"]
    for other in runs[1:]:
        wish = other.about["wish"]
        if found := [f"{key}: {base[key]} and {wish[key]}" for key in _OF_THE_ITEMS if base[key] != wish[key]]:
            raise PdctlError(
                f"{runs[0].name} and {other.name} asked other things; their scores cannot be compared",
                "evaluate both with the same task, limit and examples", ExitCode.USAGE, found,
            )  # fmt: skip


def changes(base: Run, other: Run) -> list[Change]:
    """Compare the scores of two evaluations.

    The documents are the same, so what counts is how their scores changed one by one: the standard error of the mean of
    these differences (paired). Where single scores are not known (groups, metrics of whole texts) it is
    sqrt(a² + b²) of both standard errors, as for independent samples, which is larger.
    """
    known = [by_document(run.lines("samples.jsonl")) for run in (base, other)]
    better = _higher_is_better(base)
    theirs = {(one.task, one.metric, one.filter): one for one in scores_of(other)}
    found = []
    for one in scores_of(base):
        key = (one.task, one.metric, one.filter)
        if key in theirs:
            paired = [some.get(key, {}) for some in known]
            found.append(_change(one, theirs[key], paired, better.get((one.task, one.metric), True)))
    return found


def _change(base: Score, other: Score, paired: list[dict[int, float]], more_is_better: bool) -> Change:
    both = sorted(paired[0].keys() & paired[1].keys())
    stderr, samples, changed = None, None, None
    if len(both) > 1:
        gaps = np.array([paired[1][number] - paired[0][number] for number in both])
        stderr, samples, changed = float(gaps.std(ddof=1) / math.sqrt(len(gaps))), len(both), int((gaps != 0).sum())
    elif base.stderr is not None and other.stderr is not None:
        stderr = math.hypot(base.stderr, other.stderr)
    change = other.value - base.value
    verdict: Verdict | None = None
    if stderr is not None:
        verdict = "within noise"
        if abs(change) > _Z * stderr:
            verdict = "better" if (change > 0) == more_is_better else "worse"
    return Change(
        base.task, base.metric, base.filter, base.value, other.value, change, stderr, samples, changed, verdict
    )


def by_document(samples: Iterable[dict[str, Any]]) -> _By:
    """Give the scores of single documents by task, metric and filter."""
    found: _By = {}
    for one in samples:
        for metric in one.get("metrics", ()):
            value = one.get(metric)
            if isinstance(value, int | float):
                found.setdefault((one["task"], metric, one["filter"]), {})[one["doc_id"]] = float(value)
    return found


def _higher_is_better(run: Run) -> dict[tuple[str, str], bool]:
    told = orjson.loads((run.folder / "scores.json").read_bytes()).get("higher_is_better", {})
    return {(task, metric): bool(up) for task, some in told.items() for metric, up in some.items() if up is not None}


def told(base: Run, other: Run, found: list[Change]) -> dict[str, Any]:
    """Give a comparison as JSON."""
    return {
        "base": base.name,
        "other": other.name,
        "simulated": [base.simulated, other.simulated],
        "models": [base.about["model"], other.about["model"]],
        "changes": [asdict(one) for one in found],
    }
