"""A sweep as a plan: its points, their order, and what the measured curve says."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from pdctl.bench.repeats import headlines
from pdctl.bench.workload import Workload
from pdctl.runs.run import Run

Over = Literal["concurrency", "rate"]
GROWTH = 0.05  # throughput that grows by less from one level to the next has stopped growing
SERVED = 0.95  # share of the rate that is served by a fleet that keeps up


@dataclass(frozen=True, slots=True)
class Setting:
    """How the fleet is set up.

    Args:
        prefill: prefill engines; nothing: as deployed.
        decode: decode engines.
        policy: the router's policy.
    """

    prefill: int | None = None
    decode: int | None = None
    policy: str | None = None

    @property
    def name(self) -> str:
        """Its name, part of its points'."""
        parts = [f"{self.prefill}p{self.decode}d"] if self.prefill else []
        return "-".join([*parts, *([self.policy] if self.policy else [])])

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.name or "as deployed"


@dataclass(frozen=True, slots=True)
class Point:
    """One level of load on one setting."""

    setting: Setting
    over: Over
    at: float

    @property
    def name(self) -> str:
        """Its run's name."""
        level = f"{'c' if self.over == 'concurrency' else 'r'}{self.at:g}"
        return f"{self.setting.name}-{level}" if self.setting.name else level

    def workload(self, common: Workload) -> Workload:
        """Give what is sent at this point."""
        if self.over == "concurrency":
            return replace(common, concurrency=int(self.at), rate=None)
        return replace(common, rate=self.at, concurrency=None)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep measures.

    Args:
        over: what is varied.
        levels: its values, ascending.
        settings: fleets and policies.
        repeats: how often each point is measured.
    """

    over: Over
    levels: tuple[float, ...]
    settings: tuple[Setting, ...]
    repeats: int

    @property
    def points(self) -> list[Point]:
        """Every point."""
        return [Point(setting, self.over, level) for setting, level in product(self.settings, self.levels)]

    def left(self, finished: dict[str, set[int]]) -> list[tuple[int, Setting, list[Point]]]:
        """Give what is not measured yet: repeat by repeat, so that what disturbs the machine disturbs all points."""
        order = []
        for repeat, setting in product(range(self.repeats), self.settings):
            points = [Point(setting, self.over, level) for level in self.levels]
            if missing := [point for point in points if repeat not in finished.get(point.name, ())]:
                order.append((repeat, setting, missing))
        return order

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Plan":
        """Read what `told` gave."""
        settings = tuple(Setting(**one) for one in told["settings"])
        return cls(told["over"], tuple(told["levels"]), settings, told["repeats"])


@dataclass(frozen=True, slots=True)
class Findings:
    """What a setting's curve says.

    Args:
        setting: which one.
        saturation: the first level from which on throughput does not grow any more, or the rate is not served any more;
            nothing: not reached.
        best: point with the most goodput a GPU (without objectives: throughput a GPU).
        best_per_gpu: that figure.
        unit: of it.
    """

    setting: str
    saturation: float | None
    best: str
    best_per_gpu: float
    unit: str


def findings(plan: Plan, points: Sequence[Run]) -> list[Findings]:
    """Read a sweep's curves."""
    by_name = {point.name: point for point in points}
    found = []
    for setting in plan.settings:
        curve = []
        for level in plan.levels:
            run = by_name.get(Point(setting, plan.over, level).name)
            if run is not None and (told := run.whole_results()):
                figures = headlines(told)
                goodput = figures.get("request_goodput")
                gpus = run.about["fleet"]["gpus"] or 1
                curve.append((level, run, figures, (goodput or figures["output_throughput"]).mean / gpus, goodput))
        if not curve:
            continue
        best = max(curve, key=lambda one: one[3])
        unit = "output tok/s a GPU" if best[4] is None else "requests/s within the objectives, a GPU"
        if plan.over == "rate":
            saturation = rate_not_served(
                [(level, figures["request_throughput"].mean) for level, _, figures, _, _ in curve]
            )
        else:
            saturation = stops_growing(
                [(level, figures["output_throughput"].mean) for level, _, figures, _, _ in curve]
            )
        found.append(Findings(setting.title, saturation, best[1].name, best[3], unit))
    return found


def stops_growing(curve: Sequence[tuple[float, float]]) -> float | None:
    """Give the first level after which throughput never grows by more than 5 %; nothing when it grows to the end."""
    for number, (level, speed) in enumerate(curve[:-1]):
        if max(later for _, later in curve[number + 1 :]) < speed * (1 + GROWTH):
            return level
    return None


def rate_not_served(curve: Sequence[tuple[float, float]]) -> float | None:
    """Give the first rate of which less than 95 % is served; nothing when all are."""
    return next((rate for rate, served in curve if served < rate * SERVED), None)
