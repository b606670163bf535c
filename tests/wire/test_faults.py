"""Faults that hold for one pair of engines, and what an engine keeps of the requests it got."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from support.processes import Process, engine, start_all, until
from support.requests import CHAT, COMPLETIONS, WANT_TICKET, completion, prompt
from wire.test_violations import fresh, text_of

SIDE_PORT = 5600


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Process]]:
    fast = ("--speed", "20", "--kv-lease-duration", "600")
    made = {
        "near": engine("prefill", *fast), "far": engine("prefill", *fast), "plain": engine("both", *fast),
        "strict": engine("decode", *fast, "--kv-load-failure-policy", "fail"),
        "other": engine("decode", *fast, "--kv-load-failure-policy", "fail"), "lenient": engine("decode", *fast),
    }  # fmt: skip
    start_all(list(made.values()))
    yield made
    for one in made.values():
        one.stop()


def host(one: Process) -> str:
    return one.url.removeprefix("http://").partition(":")[0]


def handed(engines: dict[str, Process], prefill: str, decode: str) -> tuple[httpx.Response, str]:
    """Take a fresh prompt through a pair; give decode's answer and the right text."""
    text = fresh()
    first = engines[prefill].post(COMPLETIONS, completion(text, max_tokens=1, kv_transfer_params=WANT_TICKET))
    ticket = first.json()["kv_transfer_params"]
    answer = engines[decode].post(COMPLETIONS, completion(text, kv_transfer_params=ticket))
    return answer, text_of(engines["plain"].post(COMPLETIONS, completion(text)))


def counted(one: Process, metric: str) -> float:
    page = httpx.get(one.url + "/metrics").text
    (row,) = [row for row in page.splitlines() if row.startswith(f"vllm:nixl_{metric}{{")]
    return float(row.split()[-1])


def failed_transfers(one: Process) -> float:
    return counted(one, "num_failed_transfers_total")


def test_a_broken_edge_fails_only_the_pair_that_it_joins(engines: dict[str, Process]) -> None:
    strict = engines["strict"]
    strict.post("/sim/fault", {"kind": "edge", "host": host(engines["far"]), "port": SIDE_PORT})
    before = failed_transfers(strict)
    assert handed(engines, "far", "strict")[0].status_code == 500
    assert failed_transfers(strict) == before + 1
    for prefill, decode in (("near", "strict"), ("far", "other")):
        answer, right = handed(engines, prefill, decode)
        assert text_of(answer) == right, f"{prefill} and {decode} reach each other"
    strict.post("/sim/fault", {"kind": "none"})
    answer, right = handed(engines, "far", "strict")
    assert text_of(answer) == right


def test_behind_a_broken_edge_the_prompt_is_computed_again_and_the_ticket_stays_pinned(
    engines: dict[str, Process],
) -> None:
    far, lenient = engines["far"], engines["lenient"]
    far.post("/sim/fault", {"kind": "expire_leases"})
    lenient.post("/sim/fault", {"kind": "edge", "host": host(far)})
    answer, right = handed(engines, "far", "lenient")
    assert text_of(answer) == right
    assert far.get("/sim/state")["tickets"] == 1
    lenient.post("/sim/fault", {"kind": "none"})


def test_a_slow_link_shows_in_the_time_of_transfers_and_harms_no_text(engines: dict[str, Process]) -> None:
    def lasted() -> float:
        before = counted(engines["other"], "xfer_time_seconds_sum")
        answer, right = handed(engines, "near", "other")
        assert text_of(answer) == right
        return counted(engines["other"], "xfer_time_seconds_sum") - before

    usual = lasted()
    engines["other"].post("/sim/fault", {"kind": "link", "factor": 40})
    slow = lasted()
    engines["other"].post("/sim/fault", {"kind": "none"})
    assert 30 < slow / usual < 50
    assert lasted() < 2 * usual


def test_an_engine_without_a_connector_passes_over_tickets_and_gives_none(engines: dict[str, Process]) -> None:
    text = fresh()
    with engine("both", "--speed", "20", "--no-kv-connector") as alone:
        first = alone.post(COMPLETIONS, completion(text, max_tokens=1, kv_transfer_params=WANT_TICKET))
        assert (first.status_code, first.json()["kv_transfer_params"]) == (200, None)
        ticket = engines["near"].post(COMPLETIONS, completion(text, max_tokens=1, kv_transfer_params=WANT_TICKET))
        told = ticket.json()["kv_transfer_params"]
        right = text_of(engines["plain"].post(COMPLETIONS, completion(text)))
        assert text_of(alone.post(COMPLETIONS, completion(text, kv_transfer_params=told))) == right
        assert counted(alone, "bytes_transferred_count") == 0
        assert engines["near"].get("/sim/state")["tickets"] == 1
    assert text_of(engines["other"].post(COMPLETIONS, completion(text, kv_transfer_params=told))) == right


def test_a_broken_edge_is_nobodys_violation(engines: dict[str, Process]) -> None:
    strict = engines["strict"]
    strict.post("/sim/fault", {"kind": "edge", "host": host(engines["far"])})
    handed(engines, "far", "strict")
    strict.post("/sim/fault", {"kind": "none"})
    assert strict.get("/sim/violations") == []


def test_an_edge_without_its_host_is_refused(engines: dict[str, Process]) -> None:
    answer = engines["strict"].post("/sim/fault", {"kind": "edge"})
    assert answer.status_code == 400
    assert "an edge needs the host" in answer.text


def test_an_engine_shows_the_last_requests_as_they_came_if_it_is_told_to_keep_them(engines: dict[str, Process]) -> None:
    engines["plain"].post(COMPLETIONS, completion("a"))
    assert engines["plain"].get("/sim/requests") == []
    with engine("both", "--keep-requests", "2") as keeping:
        for seed in (b"1", b"9007199254740993"):
            body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "seed": ' + seed + b"}"
            httpx.post(keeping.url + COMPLETIONS, content=body, headers={"x-mine": seed.decode()})
        keeping.post("/elsewhere", {})
        keeping.post("/sim/fault", {"kind": "none"})
        first, second = keeping.get("/sim/requests")
        assert first["body"].endswith('"seed": 9007199254740993}')
        assert ["x-mine", "9007199254740993"] in first["headers"]
        assert (first["path"], second["path"]) == (COMPLETIONS, "/elsewhere")
        httpx.delete(keeping.url + "/sim/requests")
        assert keeping.get("/sim/requests") == []


def test_a_chat_prefill_leg_that_is_limited_by_max_completion_tokens_alone_breaks_no_rule(
    engines: dict[str, Process],
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": prompt(900)}], "kv_transfer_params": WANT_TICKET}
    answer = engines["near"].post(CHAT, body | {"max_completion_tokens": 1})
    assert answer.json()["usage"]["completion_tokens"] == 1
    assert engines["near"].get("/sim/violations") == []
    engines["near"].post("/sim/fault", {"kind": "expire_leases"})
    until(lambda: engines["near"].get("/sim/state")["tickets"] == 0, 10, "the ticket is gone")


def test_a_late_answer_comes_after_the_engine_has_finished_and_nothing_changes_when_its_client_leaves_before(
    engines: dict[str, Process],
) -> None:
    near = engines["near"]
    near.post("/sim/fault", {"kind": "expire_leases"})
    near.post("/sim/fault", {"kind": "late_answer", "seconds": 30})
    body = completion(fresh(), max_tokens=1, kv_transfer_params=WANT_TICKET)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(near.post, COMPLETIONS, body, timeout=3)
        until(lambda: near.get("/sim/state")["tickets"] == 1, 2.5, "prefill is done")
        assert near.get("/sim/state")["running"] == 0
        assert not leaving.done()
        with pytest.raises(httpx.ReadTimeout):
            leaving.result()
    assert near.get("/sim/state")["tickets"] == 1, "nobody has the ticket, and the KV is pinned for it"
    near.post("/sim/fault", {"kind": "none"})
    near.post("/sim/fault", {"kind": "expire_leases"})
    answer, right = handed(engines, "near", "strict")
    assert text_of(answer) == right
