"""Engines from DNS, asked of a real server."""

import asyncio
import logging
import math
import time
from contextlib import asynccontextmanager

import dns.rcode

from pdrouter.discovery.attempts import Attempts
from pdrouter.discovery.dns import DnsSource
from pdrouter.discovery.found import Found
from pdrouter.discovery.records import Service, from_services, kept_for
from pdrouter.fleet.engine import Role
from router.discovery.dns_server import DnsServer, dns_server
from router.discovery.inbox import Inbox
from router.fakes import run

HOST = "prefill.example"
SRV = "_http._tcp.prefill.example"


@asynccontextmanager
async def source(server: DnsServer, inbox: Inbox, host: str = HOST, port: int | None = 8000, longest: float = 0.05):
    one = DnsSource(inbox, host, Role.PREFILL, port, Attempts("dns", 0.02, longest), server.resolver)
    one.start()
    try:
        yield one
    finally:
        await one.stop()


def urls(*addresses: str) -> list[str]:
    return [f"http://{address}:8000" for address in addresses]


def test_each_address_of_a_name_is_an_engine_named_by_address_and_port():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "A", 30, "10.0.0.2", "10.0.0.1")
            async with source(server, inbox) as one:
                assert one.age == math.inf
                await inbox.until_urls(*urls("10.0.0.1", "10.0.0.2"))
                assert inbox.last[0] == Found("http://10.0.0.1:8000", "10.0.0.1:8000", Role.PREFILL)
                assert inbox.sources == {"dns:prefill:prefill.example:8000"}
                assert one.age < 5

    run(main)


def test_a_name_with_addresses_of_ipv6_only_is_asked_for_these():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "AAAA", 30, "fd00::1")
            async with source(server, inbox):
                await inbox.until_urls("http://[fd00::1]:8000")

    run(main)


def test_an_engine_with_addresses_of_both_families_is_found_once():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "A", 30, "10.0.0.1")
            server.put(HOST, "AAAA", 30, "fd00::1")
            async with source(server, inbox):
                await inbox.until_urls(*urls("10.0.0.1"))
                assert server.times(HOST, "AAAA") == []

    run(main)


def test_a_name_is_asked_for_again_when_its_ttl_has_passed_and_only_changes_are_reported():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "A", 1, "10.0.0.1")
            async with source(server, inbox):
                await inbox.until_urls(*urls("10.0.0.1"))
                await server.until(lambda: len(server.times(HOST, "A")) == 2, "the second question")
                first, second = server.times(HOST, "A")
                assert 0.95 < second - first < 2
                server.put(HOST, "A", 30, "10.0.0.1", "10.0.0.3")
                await inbox.until_urls(*urls("10.0.0.1", "10.0.0.3"))
                assert len(inbox.reports) == 2

    run(main)


def test_a_ttl_of_zero_is_a_second_and_a_ttl_of_an_hour_is_half_a_minute():
    assert kept_for(0) == 1
    assert kept_for(12) == 12
    assert kept_for(3600) == 30
    assert kept_for(math.inf) == 30


def test_no_failure_of_dns_empties_the_fleet_and_the_age_shows_it():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "A", 1, "10.0.0.1")
            async with source(server, inbox) as one:
                await inbox.until_urls(*urls("10.0.0.1"))
                answered = -one.age + time.monotonic()  # or somewhat before
                for failure in (dns.rcode.SERVFAIL, dns.rcode.NXDOMAIN, dns.rcode.REFUSED):
                    server.failure = failure
                    asked = len(server.asked)
                    await server.until(lambda: len(server.asked) >= asked + 3, "more questions")  # noqa: B023
                    assert inbox.urls == urls("10.0.0.1")
                assert time.monotonic() - one.age <= answered + 0.001
                server.failure = None
                server.put(HOST, "A", 30, "10.0.0.9")
                await inbox.until_urls(*urls("10.0.0.9"))
                assert len(inbox.reports) == 2
                assert one.age < 5

    run(main)


def test_a_name_that_loses_all_its_records_keeps_its_engines():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "A", 1, "10.0.0.1")
            async with source(server, inbox):
                await inbox.until_urls(*urls("10.0.0.1"))
                del server.records[HOST, "A"]
                server.put(HOST, "TXT", 30, "still-a-name")
                await server.until(lambda: len(server.times(HOST, "AAAA")) >= 2, "questions without an answer")
                assert len(inbox.reports) == 1

    run(main)


def test_a_silent_server_is_asked_until_it_answers(caplog):
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.silent = True
            server.put(HOST, "A", 30, "10.0.0.1")
            async with source(server, inbox):
                await server.until(lambda: len(server.asked) >= 2, "questions")
                server.silent = False
                await inbox.until_urls(*urls("10.0.0.1"))

    run(main)


def test_one_cause_of_failure_is_told_once_with_what_to_do(caplog):
    caplog.set_level(logging.INFO)

    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(HOST, "TXT", 30, "a-name-without-addresses")
            async with source(server, inbox):
                await server.until(lambda: len(server.times(HOST, "AAAA")) >= 4, "questions")
                server.put(HOST, "A", 30, "10.0.0.1")
                await inbox.until_urls(*urls("10.0.0.1"))

    run(main)
    told = [one.getMessage() for one in caplog.records if one.name.startswith("pdrouter")]
    assert len(told) == 2
    assert "is it headless?" in told[0]
    assert "nothing is known yet" in told[0]
    assert "answers again" in told[1]


def test_the_pause_between_failed_questions_grows():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.failure = dns.rcode.SERVFAIL
            async with source(server, inbox, longest=5.0):
                await server.until(lambda: len(server.times(HOST, "A")) >= 6, "six questions")
        at = server.times(HOST, "A")
        assert at[5] - at[4] > at[1] - at[0]
        assert at[5] - at[4] > 0.1

    run(main)


def test_an_answer_too_large_for_udp_is_read_by_tcp():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            addresses = [f"10.0.1.{number}" for number in range(100, 200)]
            server.put(HOST, "A", 30, *addresses)
            async with source(server, inbox):
                await inbox.until_urls(*urls(*addresses))
                assert server.by_tcp == 1

    run(main)


def test_srv_records_give_ports_and_names_that_stay_when_the_address_changes():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(SRV, "SRV", 1, "0 50 8000 Pod-0.prefill.example.", "0 50 8001 pod-1.prefill.example.")
            server.put("pod-0.prefill.example", "A", 30, "10.0.0.1")
            server.put("pod-1.prefill.example", "AAAA", 30, "fd00::2")
            async with source(server, inbox, SRV, None):
                await inbox.until_urls("http://10.0.0.1:8000", "http://[fd00::2]:8001")
                names = ["pod-0.prefill.example:8000", "pod-1.prefill.example:8001"]
                assert [one.name for one in inbox.last] == names
                server.put("pod-0.prefill.example", "A", 30, "10.0.0.77")
                await inbox.until_urls("http://10.0.0.77:8000", "http://[fd00::2]:8001")
                assert [one.name for one in inbox.last] == names

    run(main)


def test_addresses_that_come_along_with_srv_records_are_not_asked_for():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(SRV, "SRV", 30, "0 50 8000 pod-0.prefill.example.")
            server.beside = [("pod-0.prefill.example", 30, "A", "10.0.0.1")]
            async with source(server, inbox, SRV, None):
                await inbox.until_urls("http://10.0.0.1:8000")
                assert [kind for _, _, kind in server.asked] == ["SRV"]

    run(main)


def test_an_srv_target_that_cannot_be_resolved_stays_where_it_was_and_does_not_hold_up_the_others():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(SRV, "SRV", 1, "0 50 8000 pod-0.prefill.example.")
            server.put("pod-0.prefill.example", "A", 1, "10.0.0.1")
            async with source(server, inbox, SRV, None):
                await inbox.until_urls("http://10.0.0.1:8000")
                del server.records["pod-0.prefill.example", "A"]
                targets = [f"0 50 8000 pod-{number}.prefill.example." for number in range(3)]
                server.put("pod-1.prefill.example", "A", 1, "10.0.0.2")
                server.put(SRV, "SRV", 1, *targets)
                await inbox.until_urls("http://10.0.0.1:8000", "http://10.0.0.2:8000")

    run(main)


def test_an_srv_record_that_says_there_is_no_service_is_no_engine(caplog):
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.put(SRV, "SRV", 1, "0 0 0 .")
            async with source(server, inbox, SRV, None):
                await server.until(lambda: len(server.asked) >= 3, "questions")
                assert inbox.reports == []

    run(main)


def test_nothing_is_reported_after_the_end():
    async def main():
        async with dns_server() as server:
            inbox = Inbox()
            server.silent = True
            server.put(HOST, "A", 30, "10.0.0.1")
            async with source(server, inbox) as one:
                await server.until(lambda: bool(server.asked), "a question")
                await one.stop()
                await one.stop()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert inbox.reports == []

    run(main)


def test_two_engines_on_one_srv_target_have_two_names():
    services = [Service("host", 8000), Service("host", 8001), Service("gone", 8000)]
    found = from_services(services, {"host": ["10.0.0.1"]}, Role.DECODE)
    assert [(one.name, one.url) for one in found] == [
        ("host:8000", "http://10.0.0.1:8000"),
        ("host:8001", "http://10.0.0.1:8001"),
    ]
