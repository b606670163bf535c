"""Which engines there are when several sources tell of them."""

import json
from itertools import permutations

import pytest

from pdrouter.discovery.found import Found
from pdrouter.fleet.engine import Role
from router.fakes import Bed, routed, run, until

DNS = "dns:decode:engines"


async def change(bed: Bed, what: str, url: str) -> None:
    body = json.dumps({"url": url, "role": "decode"}).encode()
    assert (await bed.admin("POST", f"/{what}_worker", body)).status == 200


def decodes(bed: Bed) -> list[tuple[str, str]]:
    return [(one.name, one.url) for one in bed.router.fleet.engines[Role.DECODE]]


def test_an_engine_that_sources_name_differently_is_one_engine() -> None:
    async def main() -> None:
        async with routed(1, 1) as bed:
            url = bed.decode.url
            found = [Found(url, url.removeprefix("http://"), Role.DECODE)]
            bed.router.fleet.report(DNS, found)
            assert decodes(bed) == [(found[0].name, url)], "named as it was found"
            await until(bed.router.fleet.ready, "it is checked under its new name")
            for number in range(4):
                assert (await bed.complete(str(number))).status == 200
            bed.router.fleet.report(DNS, [])
            assert decodes(bed) == [(url, url)], "the command line has it still"

    run(main)


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_workers_that_hear_sources_in_another_order_name_an_engine_alike(order: tuple[int, ...]) -> None:
    async def main() -> None:
        async with routed(1, 1) as bed:
            url = "http://127.0.0.1:9"
            names = [(url, False), ("old-pod", True), ("pod", False), ("zone-pod", False)]
            fleet = bed.router.fleet
            for number in order:
                name, terminating = names[number]
                fleet.report(f"source {number}", [Found(url, name, Role.DECODE, terminating)])
            assert [name for name, at in decodes(bed) if at == url] == ["pod"]
            both = Found(url, url, Role.PREFILL)
            fleet.report("another role", [both])
            assert [one.name for one in fleet if one.url == url] == [url, "pod"], "a role is another engine"

    run(main)


def test_an_engine_that_was_removed_and_is_taken_back_goes_when_its_source_finds_it_no_more() -> None:
    async def main() -> None:
        async with routed(1, 1) as bed:
            url, name = "http://127.0.0.1:9", "pod-1"
            first = decodes(bed)
            bed.router.fleet.report(DNS, [Found(url, name, Role.DECODE)])
            await change(bed, "remove", url)
            assert decodes(bed) == first
            await change(bed, "add", url)
            assert decodes(bed) == [*first, (name, url)]
            bed.router.fleet.report(DNS, [])
            assert decodes(bed) == first

    run(main)


def test_an_engine_that_was_added_by_hand_stays_and_is_its_sources_once_that_finds_it() -> None:
    async def main() -> None:
        async with routed(1, 1) as bed:
            url, first = "http://127.0.0.1:9", decodes(bed)
            await change(bed, "add", url)
            bed.router.fleet.report(DNS, [])
            assert decodes(bed) == [*first, (url, url)]
            bed.router.fleet.report(DNS, [Found(url, "pod-1", Role.DECODE)])
            assert decodes(bed) == [*first, ("pod-1", url)]
            bed.router.fleet.report(DNS, [])
            assert decodes(bed) == first

    run(main)
