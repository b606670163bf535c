"""A run as others read it: one JSON a repeat and the `summary.json` that `vllm bench sweep plot` looks for."""

import shutil
from pathlib import Path
from typing import Any

import orjson

from pdctl.runs.run import Run


def export(run: Run, to: Path) -> list[Path]:
    """Write a run and its points below a folder; give the files.

    Each folder with figures gets `run=N.json` a repeat and `summary.json`, the list of them with the point's settings
    as further keys, which `vllm bench sweep plot` and `plot_pareto` read; beside them what is kept of each request.
    """
    written = []
    for one, folder in [(run, to / run.name), *((point, to / run.name / point.name) for point in run.points)]:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "requests.jsonl", "watch.jsonl", "scores.json"):
            if (one.folder / name).exists():
                written.append(Path(shutil.copy(one.folder / name, folder / name)))
        told = [_flat(one, result, number) for number, result in enumerate(one.whole_results())] if one.measures else []
        for number, result in enumerate(told):
            written.append(_json(folder / f"run={number}.json", result))
        if told:
            written.append(_json(folder / "summary.json", told))
    return written


def _flat(run: Run, result: dict[str, Any], number: int) -> dict[str, Any]:
    settings = {key: value for key, value in run.about["fleet"].items() if isinstance(value, str | int | float)}
    kept = {key: value for key, value in result.items() if key != "pdctl"}
    return settings | kept | {"run_number": number, "point": run.name}


def _json(path: Path, told: object) -> Path:
    path.write_bytes(orjson.dumps(told))
    return path
