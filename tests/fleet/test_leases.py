"""What waits in decode's queue for longer than its lease gets the right text, also where heartbeats come too late."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from support.answers import told
from support.processes import Process, engine, router, start_all, until
from support.requests import COMPLETIONS, completion, prompt

LEASE = "2"  # seconds; decode's own is 30, so that it sends a heartbeat every 5


@dataclass
class Fleet:
    prefill: Process
    decodes: list[Process]
    plain: Process
    router: Process


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    prefill = engine("prefill", "--kv-lease-duration", LEASE)
    decodes = [engine("decode", "--max-num-seqs", "1") for _ in range(2)]
    plain = engine("both", "--speed", "20")
    start_all([prefill, *decodes, plain])
    with router([prefill], decodes, "--kv-lease-seconds", LEASE) as started:
        yield Fleet(prefill, decodes, plain, started)
    for one in [prefill, *decodes, plain]:
        one.stop()


def test_a_request_whose_lease_ends_behind_others_is_served_elsewhere_before_it_reads_foreign_kv(fleet: Fleet) -> None:
    long = completion(prompt(1, 20), max_tokens=1200, ignore_eos=True, user="one", stream=True)
    short = completion(prompt(2, 200), max_tokens=20, user="one")
    with ThreadPoolExecutor(2) as pool:
        sitting = pool.submit(fleet.router.post, COMPLETIONS, long)
        until(lambda: any(one.get("/sim/state")["running"] for one in fleet.decodes), 20, "the only seat is taken")
        answer = pool.submit(fleet.router.post, COMPLETIONS, short).result()
        assert not sitting.done(), "the seat was free before the lease could end"
    assert told(answer) == told(fleet.plain.post(COMPLETIONS, short))
    assert [entry["rule"] for one in fleet.decodes for entry in one.get("/sim/violations")] == []
    assert [entry["rule"] for entry in fleet.prefill.get("/sim/violations")] == ["ticket_never_collected"]
