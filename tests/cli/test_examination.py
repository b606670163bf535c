"""What doctor says of a deployment, and top's figures."""

from collections.abc import Mapping
from typing import Any

from pdctl.check import Check, Mark
from pdctl.commands.doctor import ways
from pdctl.examination import Facts, examine
from pdctl.rates import engine_row, pinned_by_url, router_row
from pdctl.targets.pages import Page, read_pairs
from pdctl.targets.target import Health, Routing

URLS = {"prefill-a": "http://10.0.0.1:8000", "decode-b": "http://10.0.0.2:8200"}


def part(name: str, state: str = "ready", restarts: int = 0) -> Health:
    return Health(name, name.partition("-")[0], URLS.get(name, ""), None, state, 60.0, restarts=restarts)


def facts(**changed: Any) -> Facts:
    known: dict[str, Any] = {
        "flags": " --namespace x",
        "health": [part("prefill-a"), part("decode-b"), part("router-c")],
        "routing": Routing({("prefill-a", "decode-b"): 30}, {("prefill-a", "decode-b"): (30, 10**9)}, {}, [], []),
        "versions": {"prefill-a": "0.33.0", "decode-b": "0.33.0"},
        "pages": {"decode-b": Page("")},
        "workers": [{url: {"healthy": True} for url in URLS.values()}],
        "edges": [edge()],
        "lines": {"decode-b": ["INFO NIXL is available"]},
    }
    return Facts(**(known | changed))


def edge(**changed: Any) -> dict[str, Any]:
    known = {
        "prefill": "prefill-a",
        "decode": "decode-b",
        "closed": False,
        "handoffs": 30,
        "failures": 0,
        "seconds": 0.1,
    }
    return known | changed


def check(name: str, **changed: Any) -> Check:
    [found] = [one for one in examine(facts(**changed)) if one.name == name]
    return found


def page(**samples: float) -> Page:
    return Page("\n".join(f"vllm:{name} {value}" for name, value in samples.items()) + "\n")


def test_a_deployment_that_is_well_has_no_failed_check() -> None:
    assert {one.mark for one in examine(facts())} <= {Mark.OK, Mark.UNKNOWN}


def test_engines_of_different_versions_are_named() -> None:
    found = check("versions", versions={"prefill-a": "0.33.0", "decode-b": "0.32.0"})
    assert found.mark is Mark.FAIL
    assert "0.32.0: decode-b" in found.told
    assert "pdctl rollout --namespace x --image" in found.fix


def test_prompts_without_transfers_mean_that_decode_computes_all_again() -> None:
    found = check("KV moves", routing=Routing({("prefill-a", "decode-b"): 30}, {}, {}, [], []))
    assert found.mark is Mark.FAIL
    assert "5600" in found.fix
    alone = check("KV moves", routing=Routing({("none", "decode-b"): 30}, {}, {}, [], []))
    assert alone.mark is Mark.UNKNOWN, "nothing was handed over, so nothing could move"


def test_engines_that_the_router_does_not_find_or_reach_are_named() -> None:
    half = {URLS["prefill-a"]: {"healthy": False}}
    found = check("router → engines", workers=[half])
    assert found.mark is Mark.FAIL
    assert found.told == "prefill-a does not answer it, decode-b is not known to it"
    assert check("router → engines", workers=[]).mark is Mark.UNKNOWN
    other = {url: {"healthy": True} for url in URLS.values()}
    assert check("router → engines", workers=[other, other]).mark is Mark.OK
    told = "prefill-a does not answer 1 of 2 routers, decode-b is not known to 1 of 2 routers"
    assert check("router → engines", workers=[other, half]).told == told
    two = [part("prefill-a"), part("decode-b"), part("router-c"), part("router-d")]
    silent = check("router → engines", workers=[other], health=two)
    assert (silent.mark, silent.told) == (Mark.WARN, "1 of 2 routers do not answer on their admin port")


def test_a_way_counts_as_its_worst_and_tells_the_error_of_the_router_that_closed_it() -> None:
    told = [
        {"edges": [edge(failures=1, seconds=0.2, last_error="long ago")]},
        {"edges": [edge(closed=True, failures=2, last_error="slow: 4.0 s"), edge(decode="decode-z")]},
    ]
    way, other = ways(told, {"prefill-a": "prefill-1"}, None)
    assert (way["closed"], way["handoffs"], way["failures"], way["seconds"]) == (True, 60, 2, 0.2)
    assert (way["prefill"], way["last_error"]) == ("prefill-1", "slow: 4.0 s")
    assert not other["closed"]


def test_a_closed_way_tells_its_last_error() -> None:
    found = check("ways", edges=[edge(closed=True, last_error="the ticket was refused")])
    assert found.mark is Mark.FAIL
    assert "prefill-a → decode-b: the ticket was refused" in found.told


def test_a_restarted_prefill_engine_is_stale_only_when_transfers_fail() -> None:
    health = [part("prefill-a", restarts=1), part("decode-b")]
    assert check("stale agents", health=health).mark is Mark.OK
    found = check("stale agents", health=health, pages={"decode-b": page(nixl_num_failed_transfers_total=3)})
    assert found.mark is Mark.FAIL
    assert "rollout --namespace x --restart decode" in found.fix
    assert check("transfers", pages={"decode-b": page(nixl_num_failed_transfers_total=3)}).mark is Mark.WARN


def test_transfers_as_slow_as_tcp_are_told_where_rdma_is_asked_for() -> None:
    slow = page(nixl_xfer_time_seconds_count=40, nixl_xfer_time_seconds_sum=10, nixl_bytes_transferred_sum=20e9)
    small = page(nixl_xfer_time_seconds_count=40, nixl_xfer_time_seconds_sum=0.2, nixl_bytes_transferred_sum=40e6)
    found = check("speed of KV", pages={"decode-b": slow}, rdma="rdma/ib")
    assert found.mark is Mark.WARN
    assert "2.0 GB/s" in found.told
    assert check("speed of KV", pages={"decode-b": slow}, rdma="").mark is Mark.OK
    assert check("speed of KV", rdma="").mark is Mark.UNKNOWN
    found = check("speed of KV", pages={"decode-b": small}, rdma="rdma/ib")
    assert (found.mark, found.told) == (Mark.UNKNOWN, "transfers of 1.0 MB on average are too small to tell")


def test_lines_about_nixl_are_found_in_logs() -> None:
    for line in (
        "ERROR nixl_connector: NIXL handshake failed: remote agent not found",
        "WARNING Got invalid KVTransferParams: {}",
        "UCX ERROR no active messages transport",
        "KV transfer failed for request 1",
    ):
        found = check("logs", lines={"decode-b": ["INFO ready", line]})
        assert found.mark is Mark.WARN, line
        assert line[:100] in found.told
    assert check("logs").mark is Mark.OK


def test_parts_that_are_not_ready_and_breaches_are_failures() -> None:
    assert "decode-b: crashing" in check("parts", health=[part("decode-b", "crashing")]).told
    broken = Routing({}, {}, {}, [{"engine": "decode-b", "rule": "ticket_reused"}], [])
    assert check("protocol", routing=broken).mark is Mark.FAIL


def test_figures_of_two_looks_are_rates_and_a_counter_that_began_anew_is_no_loss() -> None:
    def engine(tokens: float, count: float, total: float) -> Page:
        return page(
            num_requests_running=3, num_requests_waiting=1, kv_cache_usage_perc=0.25, generation_tokens_total=tokens,
            inter_token_latency_seconds_count=count, inter_token_latency_seconds_sum=total,
        )  # fmt: skip

    row = engine_row(engine(100, 10, 1.0), engine(300, 30, 1.4), 2.0, 512)
    assert (row.running, row.waiting, row.kv, row.pinned, row.output_rate) == (3, 1, 0.25, 512, 100)
    assert row.itl == (1.4 - 1.0) / 20
    assert row.ttft is None
    assert engine_row(engine(300, 0, 0), engine(50, 0, 0), 2.0, 0).output_rate == 25

    def router(requests: float) -> Page:
        return Page(f'pd_router_requests_total{{path="/v1/completions",status="200"}} {requests}\n')

    assert router_row(router(10), router(30), 4.0).requests == 5


def test_several_routers_are_added_up() -> None:
    def told(prompts: int, seconds: float, closed: int) -> str:
        pair = '{prefill="http://p",decode="http://d"}'
        return (
            f"pd_router_pairs_total{pair} {prompts}\npd_router_edge_handoffs_total{pair} {prompts}\n"
            f"pd_router_edge_seconds{pair} {seconds}\npd_router_edge_closed{pair} {closed}\n"
            f'pd_router_pinned_kv_tokens{{engine="http://p"}} {prompts}\n'
        )

    names: Mapping[str, str] = {"http://p": "prefill-a", "http://d": "decode-b"}
    pairs, edges = read_pairs([told(1, 0.1, 0), told(3, 0.5, 1)], names)
    assert pairs == {("prefill-a", "decode-b"): 4}
    known = edges["prefill-a", "decode-b"]
    assert (known.handoffs, round(known.seconds, 3), known.closed) == (4, 0.4, True)
    assert pinned_by_url({"a": Page(told(1, 0, 0)), "b": Page(told(3, 0, 0))}) == {"http://p": 4}
