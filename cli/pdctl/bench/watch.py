"""What the engines tell while a load runs: requests running and waiting, KV blocks used and pinned."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from pdctl.errors import PdctlError
from pdctl.targets.target import Health, Target

INTERVAL_SECONDS = 1.0


def sample(parts: list[Health]) -> dict[str, dict[str, float]]:
    """Give what each engine tells of its load, by name."""
    told = {}
    for part in parts:
        if (blocks := part.details.get("blocks")) and part.role != "router":
            told[part.name] = {
                "running": part.details["running"],
                "waiting": part.details["waiting"],
                "kv": round(1 - blocks["free"] / blocks["total"], 4),
                "pinned": blocks["pinned"],
            }
    return told


class Watch:
    """Looks at a deployment now and then, in a thread of its own, and writes a line a look.

    Args:
        target: the deployment; without one nothing is looked at.
        path: where the lines go.
        repeat: the repeat they belong to.
        begin: gives the beginning of the run (perf_counter), from which times count.
    """

    def __init__(self, target: Target | None, path: Path, repeat: int, begin: Callable[[], float]) -> None:
        self._target, self._path, self._repeat, self._begin = target, path, repeat, begin
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        if self._target is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._over.set()
        if self._target is not None:
            self._thread.join(5)

    def _look(self) -> None:
        assert self._target is not None
        with self._path.open("ab") as file:
            while not self._over.wait(INTERVAL_SECONDS):
                at = time.perf_counter() - self._begin()
                with contextlib.suppress(PdctlError):
                    line = {"repeat": self._repeat, "at": round(at, 2), "engines": sample(self._target.health())}
                    file.write(orjson.dumps(line) + b"\n")
                    file.flush()


def stretch(before: list[Health], after: list[Health]) -> float | None:
    """Give real over modelled time of simulated decode steps between two looks; nothing when there were none."""

    def total(parts: list[Health], key: str) -> float:
        return sum(float(part.details["clock"][key]) for part in parts if "clock" in part.details)

    modelled = total(after, "decode_modelled_seconds") - total(before, "decode_modelled_seconds")
    return (total(after, "decode_seconds") - total(before, "decode_seconds")) / modelled if modelled > 0 else None


def transfers(
    before: dict[tuple[str, str], tuple[int, int]], after: dict[tuple[str, str], tuple[int, int]]
) -> list[dict[str, Any]]:
    """Give KV transfers and bytes by pair of engines between two looks."""
    told = []
    for (prefill, decode), (count, moved) in sorted(after.items()):
        earlier = before.get((prefill, decode), (0, 0))
        if count > earlier[0]:
            told.append(
                {"prefill": prefill, "decode": decode, "transfers": count - earlier[0], "bytes": moved - earlier[1]}
            )
    return told


def breaches(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, int]:
    """Give how often each rule of the handoff protocol was broken between two looks."""
    found = Counter(str(one["rule"]) for one in after)
    found.subtract(Counter(str(one["rule"]) for one in before))
    return {rule: count for rule, count in sorted(found.items()) if count > 0}
