"""The test that `helm test` runs, as it runs there, against real processes."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from support.processes import Process, engine, router, start_all

from .conftest import ROOT

SCRIPT = ROOT / "charts/pd-router/files/kv_moves.py"


def run(url: str, metrics: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ROUTER": url, "METRICS": metrics, "SECONDS": "20", "MODEL": "", **variables}
    return subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def fleet() -> Iterator[tuple[list[Process], list[Process], Process]]:
    prefills, decodes = [engine("prefill", "--speed", "50")], [engine("decode", "--speed", "50") for _ in range(2)]
    front = router(prefills, decodes)
    everything = [*prefills, *decodes, front]
    start_all(everything)
    yield prefills, decodes, front
    for one in everything:
        one.stop()


def metrics_of(front: Process) -> str:
    return front.url.replace(":10001", ":29000")


def test_it_passes_where_kv_moves(fleet: tuple[list[Process], list[Process], Process]) -> None:
    _, decodes, front = fleet
    done = run(front.url, metrics_of(front))
    assert done.returncode == 0, done.stderr
    assert "1 prefill and 2 decode engines are healthy" in done.stdout
    assert any(f"{one.url} fetched " in done.stdout for one in decodes)
    assert done.stdout.endswith("KV moves from prefill to decode\n")


def test_it_fails_where_the_answer_is_right_but_no_kv_moved(
    fleet: tuple[list[Process], list[Process], Process],
) -> None:
    _, decodes, front = fleet
    # Decode engines that are asked without a ticket, as a router would that hands nothing over.
    done = run(decodes[0].url, metrics_of(front), SECONDS="4")
    assert done.returncode == 1
    assert "FAILED: the answer came, but no KV moved" in done.stderr


def test_it_says_which_model_there_is_not(fleet: tuple[list[Process], list[Process], Process]) -> None:
    _, _, front = fleet
    done = run(front.url, metrics_of(front), MODEL="no-such-model")
    assert done.returncode == 1
    assert "FAILED: no-such-model answers 404" in done.stderr


def test_it_says_what_is_missing_where_no_engine_answers() -> None:
    prefill, decode = engine("prefill"), engine("decode")
    front = router([prefill], [decode])
    front.health = "/health"
    with front:
        done = run(front.url, metrics_of(front), SECONDS="2")
    assert done.returncode == 1
    assert "FAILED: the router has no healthy engine of each role (0 prefill, 0 decode)" in done.stderr


def test_it_sends_the_key_that_the_router_wants(tmp_path: os.PathLike[str]) -> None:
    key = os.path.join(tmp_path, "key")
    with open(key, "w", encoding="utf-8") as file:
        file.write("a key\n")
    prefills, decodes = [engine("prefill", "--speed", "50")], [engine("decode", "--speed", "50")]
    front = router(prefills, decodes, "--api-key-file", key)
    everything = [*prefills, *decodes, front]
    start_all(everything)
    try:
        assert "401" in run(front.url, metrics_of(front)).stderr
        done = run(front.url, metrics_of(front), KEY_FILE=key)
    finally:
        for one in everything:
            one.stop()
    assert done.returncode == 0, done.stderr
