"""While an attack goes on, other clients are served and the router's memory stays bounded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "router"
NAMES = [
    "slow heads", "slow bodies", "connections without requests", "slow readers of endless streams",
    "slow readers of 256 KB answers", "requests ahead, answers not taken", "malformed requests",
    "heads of 110 headers, 24 KB", "heads over the limit", "JSON of depth 300,000", "JSON of depth 1,000",
    "JSON of 20 million values", "JSON of 600,000 objects", "bodies in tiny chunks", "bodies over the limit",
    "bodies of 60 MB", "a batch that repeats 1 MB",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All attacks, one after the other, by name; how long ordinary requests took is not judged here."""
    out = tmp_path_factory.mktemp("attacks") / "attacks.json"
    command = [sys.executable, str(BENCH / "attack.py"), "--seconds", "1", "--quiet", "0.2", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert out.exists(), done.stdout + done.stderr
    assert "the router failed" not in done.stdout, done.stdout
    return {one["attack"]: one for one in json.loads(out.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_requests_succeed_and_memory_stays_bounded_during(measured: dict[str, dict[str, Any]], name: str):
    told = measured[name]
    assert told["failures"] == {}
    assert told["requests"] > 0
    assert told["grown"] <= told["allowed"]


def test_every_attack_is_tested(measured: dict[str, dict[str, Any]]):
    assert list(measured) == NAMES
