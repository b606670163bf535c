"""One run as it is kept: what was asked for, on what, and everything that was measured."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import psutil

from pdctl.bench.client import Record
from pdctl.bench.result import Outcome, result
from pdctl.bench.slo import Slo
from pdctl.bench.workload import Workload
from pdctl.deployment import is_running
from pdctl.errors import PdctlError

_ALWAYS = {"kind", "model", "simulated", "state"}  # what every run.json tells


@dataclass(frozen=True)
class Run:
    """A folder.

    `run.json` tells what was asked for and where; `results/N.json` has a repeat's figures under vLLM's names;
    `requests.jsonl` a line a request; `watch.jsonl` what the engines told meanwhile. Runs of several points keep
    one a point below `points/`.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Its name; a point's is its folder's."""
        return self.folder.name

    @cached_property
    def about(self) -> dict[str, Any]:
        """What `run.json` tells.

        Raises:
            PdctlError: it is no such file.
        """
        path = self.folder / "run.json"
        told = parsed(path, path.read_bytes())
        if not isinstance(told, dict) or _ALWAYS - told.keys():
            raise unreadable(path, f"it lacks {', '.join(sorted(_ALWAYS))}")
        return told

    def begin(self, about: dict[str, Any]) -> None:
        """Write down what begins, and that this process does it."""
        (self.folder / "results").mkdir(parents=True, exist_ok=True)
        self._save(about | {"state": "running", "created": time.time()} | _ourselves())

    def resume(self) -> None:
        """Write down that this process goes on with it."""
        self._save(self.about | {"state": "running"} | _ourselves())

    def end(self, state: str, **more: Any) -> None:
        """Write down how it ended: `done`, `partial` or `failed`."""
        self._save(self.about | {"state": state, "ended": time.time()} | more)

    def note(self, **more: Any) -> None:
        """Write down more about it."""
        self._save(self.about | more)

    def _save(self, about: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        put(self.folder / "run.json", orjson.dumps(about, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        self.__dict__.pop("about", None)

    @property
    def kind(self) -> str:
        """`bench`, `compare`, `sweep` or `eval`."""
        return str(self.about["kind"])

    @property
    def measures(self) -> bool:
        """Whether it has figures of its own; a comparison or sweep has them in its points."""
        return self.kind == "bench"

    @property
    def state(self) -> str:
        """`running`, `done`, `partial`, `failed`; `killed` or `detached` when the process that ran it is gone.

        A detached run goes on in the cluster. `unreadable`: nobody can tell.
        """
        try:
            told = str(self.about["state"])
        except PdctlError:
            return "unreadable"
        if told == "running" and not is_running(self.about["pid"], self.about["pid_created"]):
            return "detached" if self.away else "killed"
        return told

    @property
    def away(self) -> bool:
        """Whether it is made in a pod of the cluster, where it goes on by itself."""
        return "pod" in self.about

    @property
    def simulated(self) -> bool:
        """Whether its engines were simulated."""
        return bool(self.about["simulated"])

    @cached_property
    def workload(self) -> Workload:
        """What was sent."""
        try:
            return Workload.read(self.about["workload"])
        except (ValueError, TypeError, KeyError) as error:  # of another version of pdctl
            raise unreadable(self.folder / "run.json", error) from None

    @property
    def slos(self) -> list[Slo]:
        """Its objectives."""
        return [Slo(metric, limit) for metric, limit in self.about.get("slos", {}).items()]

    @property
    def points(self) -> list["Run"]:
        """Its points, in the order they were asked for."""
        return [point for name in self.about.get("points", ()) if (point := Run(self.folder / "points" / name)).exists]

    @property
    def exists(self) -> bool:
        """Whether it is there."""
        return (self.folder / "run.json").exists()

    def records(self, repeat: int | None = None) -> list[Record]:
        """Read the requests of one repeat or of all."""
        return [Record.read(line) for line in self.lines("requests.jsonl") if repeat in (None, line["repeat"])]

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Read a file of JSON lines; a last line that was cut short is left out."""
        path = self.folder / name
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield parsed(path, line)

    def result_path(self, repeat: int) -> Path:
        """Where a repeat's figures are."""
        return self.folder / "results" / f"{repeat}.json"

    def keep(self, repeat: int, told: dict[str, Any]) -> None:
        """Write a repeat's figures."""
        put(self.result_path(repeat), orjson.dumps(told))

    @property
    def finished(self) -> set[int]:
        """The repeats that are whole."""
        whole = set()
        for path in (self.folder / "results").glob("*.json"):
            if not parsed(path, path.read_bytes())["pdctl"].get("partial"):
                whole.add(int(path.stem))
        return whole

    def results(self) -> list[dict[str, Any]]:
        """Give the figures of every repeat; of one that was killed, those of the requests that had ended."""
        paths = (self.folder / "results").glob("*.json")
        found = {int(path.stem): parsed(path, path.read_bytes()) for path in paths}
        begun = {line["repeat"] for line in self.lines("requests.jsonl")} - found.keys()
        found |= {repeat: self.partial_result(repeat) for repeat in begun}
        return [found[repeat] for repeat in sorted(found)]

    def whole_results(self) -> list[dict[str, Any]]:
        """Give the figures of the repeats that are whole, or of all where none is."""
        told = self.results()
        return [one for one in told if not one["pdctl"].get("partial")] or told

    def partial_result(self, repeat: int, **extra: Any) -> dict[str, Any]:
        """Give the figures of the requests that ended before a repeat was cut short."""
        records = self.records(repeat)
        duration = max((record.start + record.latency for record in records), default=0.0)
        return result(
            self.workload, Outcome(records, duration), model=self.about["model"], simulated=self.simulated,
            slos=self.slos, gpus=self.about["fleet"]["gpus"], extra={"partial": True, "repeat": repeat} | extra,
        )  # fmt: skip


def parsed(path: Path, content: bytes) -> Any:
    """Read JSON of a file, or of a line of it.

    Raises:
        PdctlError: it is none.
    """
    try:
        return orjson.loads(content)
    except ValueError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, why: object) -> PdctlError:
    """Say which file of a run cannot be read."""
    return PdctlError(
        f"{path} cannot be read: {why}",
        "look at it; pdctl runs rm RUN removes a run that is of no use",
    )


def put(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old or the new one, never half of it."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)


def _ourselves() -> dict[str, Any]:
    return {"pid": os.getpid(), "pid_created": psutil.Process().create_time()}
