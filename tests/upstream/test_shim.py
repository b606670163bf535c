"""What vllm-router's tests start is our router, and what they tell is compared with what is known."""

import sys
from pathlib import Path

import httpx
import pytest

from support.processes import Process, engine, new_address, start_all
from upstream.run import Expected, expected, surprises

SHIM = Path(__file__).parent / "vllm_router" / "launch_router.py"
ASKED = {"model": "tiny", "prompt": "What is a shim?", "max_tokens": 8, "temperature": 0}


@pytest.fixture(autouse=True)
def _our_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PD_ROUTER", str(Path(sys.executable).with_name("pd-router")))


def shim(*flags: str) -> Process:
    """Make what RouterManager starts, on an address of its own."""
    host = new_address()
    command = [sys.executable, str(SHIM), "--host", host, "--port", "30000", "--policy", "round_robin"]
    command += ["--prometheus-port", "29000", "--prometheus-host", host, "--worker-startup-check-interval", "1"]
    return Process([*command, *flags], f"http://{host}:30000")


def test_their_flags_for_prefill_and_decode_start_a_pair_whose_tickets_stay_as_they_are() -> None:
    prefill, decode, plain = engine("prefill"), engine("decode"), engine("both")
    engines = [prefill, decode, plain]
    start_all(engines)
    try:
        with shim("--pd-disaggregation", "--prefill", prefill.url, "none", "--decode", decode.url) as router:
            text = router.post("/v1/completions", ASKED).json()["choices"][0]["text"]
            assert text == plain.post("/v1/completions", ASKED).json()["choices"][0]["text"]
            assert decode.get("/sim/state")["transfers"][0]["transfers"] == 1
            assert decode.url in router.get("/list_workers")["urls"]
        assert [one.get("/sim/violations") for one in engines] == [[], [], []]
    finally:
        for one in engines:
            one.stop()


def test_workers_that_their_tests_add_on_the_public_port_serve_alone() -> None:
    with engine("both") as worker, shim() as router:
        added = httpx.post(f"{router.url}/add_worker", params={"url": worker.url}, timeout=30)
        assert added.status_code == 200
        assert router.get("/list_workers")["urls"] == [worker.url]
        assert router.post("/v1/completions", ASKED).status_code == 200
        assert httpx.post(f"{router.url}/remove_worker", params={"url": worker.url}, timeout=30).status_code == 200
        assert router.get("/list_workers")["urls"] == []


def test_a_flag_that_our_router_does_not_have_ends_it_with_the_routers_own_words() -> None:
    one = shim("--prefill-data-parallel-size", "4").start()
    one.process.wait(30)
    assert "unknown flag --prefill-data-parallel-size" in one.output()
    assert one.stop() != 0


def test_only_what_is_not_as_known_is_a_surprise() -> None:
    known = Expected({"a": "", "b": ""}, {"c": "why", "d": "why"}, {})
    told = {"a": "", "b": "failure: 500", "c": "failure: 408", "d": "", "e": ""}
    assert [one.partition(":")[0] for one in surprises(told, known)] == ["b", "d", "e"]


def test_no_test_of_theirs_is_listed_with_two_outcomes() -> None:
    known = expected()
    listed = [*known.passes, *known.does_not_apply, *known.not_run]
    assert len(listed) == len(set(listed))
    assert all(known.does_not_apply.values())
    assert all(known.not_run.values())
