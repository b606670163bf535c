"""A comparison as a value: what tables, JSON and reports show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pdctl.bench.repeats import HEADLINES, Interval, headlines
from pdctl.compare.difference import Difference, differences
from pdctl.runs.run import Run


@dataclass(frozen=True, slots=True)
class Effect:
    """What one change does when nothing else changes.

    Args:
        title: what changes.
        base: name of the run without it.
        other: name of the run with it.
        differences: by metric.
    """

    title: str
    base: str
    other: str
    differences: list[Difference]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side; the first one is what the others are compared with.

    Args:
        runs: the runs.
        figures: headline figures of each.
        others: differences of each but the first.
        effects: router and policy told apart, where runs differ in one of them only.
    """

    runs: list[Run]
    figures: list[dict[str, Interval]]
    others: list[list[Difference]]
    effects: list[Effect]

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {
            "simulated": [run.simulated for run in self.runs],
            "base": self.runs[0].name,
            "runs": [
                {"name": run.name, "fleet": run.about["fleet"], "figures": {k: asdict(v) for k, v in figures.items()}}
                for run, figures in zip(self.runs, self.figures, strict=True)
            ],
            "differences": {
                run.name: [asdict(one) for one in found] for run, found in zip(self.runs[1:], self.others, strict=True)
            },
            "effects": [
                {"title": one.title, "base": one.base, "other": one.other,
                 "differences": [asdict(found) for found in one.differences]}
                for one in self.effects
            ],
        }  # fmt: skip


def comparison(runs: Sequence[Run], paired: bool = False) -> Comparison:
    """Compare runs with the first of them."""
    return Comparison(
        list(runs),
        [headlines(run.whole_results()) for run in runs],
        [differences(runs[0], other, paired) for other in runs[1:]],
        _effects(runs, paired),
    )


def _effects(runs: Sequence[Run], paired: bool) -> list[Effect]:
    found = []
    for number, base in enumerate(runs):
        for other in runs[number + 1 :]:
            fleets = base.about["fleet"], other.about["fleet"]
            changed = [key for key in ("router", "policy") if fleets[0].get(key) != fleets[1].get(key)]
            if len(changed) == 1:
                key, same = changed[0], "policy" if changed[0] == "router" else "router"
                now, then = fleets[1].get(key), fleets[0].get(key)
                title = f"{key}: {now} instead of {then} ({same} {fleets[0].get(same)} in both)"
                found.append(Effect(title, base.name, other.name, differences(base, other, paired)))
    return found


def title(metric: str) -> str:
    """Give a metric's title."""
    return HEADLINES[metric]
