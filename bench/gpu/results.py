"""The file of results: written anew after each measurement, so that a run that is cut off loses nothing."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from routers import version

from engine import Engine

PACKAGES = ("vllm", "nixl", "nixl-cu13", "vllm-router", "torch")


def _told(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def provenance(prefill: Engine, decode: Engine) -> dict[str, Any]:
    """Say where figures come from: GPUs, machine, versions, engines."""
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")]  # fmt: skip
    gpus = _told("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "gpus": gpus,
        "links": [line for line in _told("nvidia-smi", "topo", "-m") if line.startswith(("GPU", "\tGPU"))],
        "engines_are": "real" if gpus else "simulated, or real without a GPU: no speed of theirs counts",
        "cpu": cpu[0] if cpu else "unknown",
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "engine_version": decode.get("/version").get("version"),
        "model": decode.model,
        "kv_cache": {one.role: one.cache() for one in (prefill, decode)},
    }


class Results:
    """All that was measured so far."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier run left, if there is any."""
        self.path = path
        self.told: dict[str, Any] = {"provenance": {}, "commands": [], "points": {}, "failures": []}
        if path.exists():
            self.told |= json.loads(path.read_text())
        self.told["commands"].append(" ".join(["python", *sys.argv]))

    def has(self, section: str, key: str) -> bool:
        """Whether something is measured already."""
        return key in self.told.get(section, {})

    def put(self, section: str, key: str, value: Any) -> None:
        """Keep a measurement."""
        self.told.setdefault(section, {})[key] = value
        self.write()

    def fail(self, what: str, why: str) -> None:
        """Keep that something could not be measured."""
        self.told["failures"].append({"what": what, "why": why, "at": time.strftime("%H:%M:%S")})
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.told, indent=1) + "\n")
        os.replace(new, self.path)
