"""A comparison as a value: what tables, JSON and reports show."""

from collections import Counter
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
class Cost:
    """What a router's own processes took, over the measured requests.

    Args:
        requests: measured ones that were answered.
        failed: measured ones that were not.
        violations: breaches of the handoff protocol that simulated engines saw, by rule.
        cpu_ms: processor time a request, by kind of process; of a router of one process it has one entry.
        cpu_us_a_token: processor time a token of answers.
        resident_mb: the highest sum of resident memory after a repeat.
        version: of its programs.
    """

    requests: int
    failed: int
    violations: dict[str, int]
    cpu_ms: dict[str, float]
    cpu_us_a_token: float
    resident_mb: float
    version: str

    def cpu_text(self) -> str:
        """Write the processor time a request, and of what it is made."""
        total = f"{sum(self.cpu_ms.values()):.3f}"
        if len(self.cpu_ms) < 2:
            return total
        return f"{total} ({', '.join(f'{kind} {cost:.3f}' for kind, cost in sorted(self.cpu_ms.items()))})"


def cost(run: Run) -> Cost | None:
    """Give what a run's router cost; nothing where that was not measured."""
    results = [one for one in run.whole_results() if "router" in one["pdctl"]]
    if not results:
        return None
    routers = [one["pdctl"]["router"] for one in results]
    requests = sum(one["completed"] for one in results)
    seconds: Counter[str] = Counter()
    violations: Counter[str] = Counter()
    for one in results:
        violations.update(one["pdctl"].get("violations", {}))
        parts = one["pdctl"]["router"].get("parts") or {"router": one["pdctl"]["router"]}
        for kind, told in parts.items():
            seconds[kind] += told["cpu_seconds"]
    return Cost(
        requests, sum(one["failed"] for one in results), dict(violations),
        {kind: one / max(requests, 1) * 1e3 for kind, one in seconds.items()},
        sum(seconds.values()) / max(sum(one["total_output_tokens"] for one in results), 1) * 1e6,
        max(one["resident_mb"] for one in routers), routers[0]["version"],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side; the first one is what the others are compared with.

    Args:
        runs: the runs.
        figures: headline figures of each.
        others: differences of each but the first.
        effects: router and policy told apart, where runs differ in one of them only.
        costs: what each run's router cost, where that was measured.
    """

    runs: list[Run]
    figures: list[dict[str, Interval]]
    others: list[list[Difference]]
    effects: list[Effect]
    costs: list[Cost | None]

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {
            "simulated": [run.simulated for run in self.runs],
            "base": self.runs[0].name,
            "runs": [
                {"name": run.name, "fleet": run.about["fleet"], "figures": {k: asdict(v) for k, v in figures.items()},
                 "router": cost and asdict(cost)}
                for run, figures, cost in zip(self.runs, self.figures, self.costs, strict=True)
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
        [cost(run) for run in runs],
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
