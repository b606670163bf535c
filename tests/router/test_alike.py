"""Workers and replicas that never speak to each other about keys choose the same engines for the same key.

The keys, and what vllm-router 0.1.17 chose for them, are those of the recorded decisions; the engines listen on the
addresses that were recorded, for a place on the ring is a hash of the URL.
"""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from pdrouter.openai.features import Prompt
from pdrouter.policies import POLICIES
from router.fakes import read_answer, run, wire
from router.served import Placed, Served, eventually, named
from router.test_decisions import AGREEING, DECISIONS, Candidate, Fleet, ours
from support.processes import new_address

Engines = tuple[str, str]
FLEETS = list(dict.fromkeys(fleet for fleet, _ in DECISIONS))
LARGE, UNEVEN = FLEETS[0], FLEETS[5]


def lines_of(fleet: Fleet, every: int) -> list[dict[str, Any]]:
    return [line for one, line in DECISIONS if one is fleet][::every]


def recorded(fleet: Fleet, line: dict[str, Any]) -> Engines:
    return fleet.urls[0][line["prefill"]], fleet.urls[1][line["decode"]]


async def start(engine: Placed) -> None:
    """Start an engine at its address, which another run of these tests may have for a moment."""

    async def started() -> bool:
        try:
            await engine.start()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True

    await eventually(started, f"{engine.url} is free", 20)


@asynccontextmanager
async def replicas(fleet: Fleet, *flags: str) -> AsyncIterator[list[Served]]:
    """Start the engines of a fleet and two routers of two workers, which are told of the engines in opposite orders."""
    async with AsyncExitStack() as stack:
        prefills, decodes = ([Placed(url) for url in urls] for urls in fleet.urls)
        for engine in prefills + decodes:
            await start(engine)
            stack.push_async_callback(engine.stop)
        routers = []
        for told in (named(prefills, decodes), named(prefills[::-1], decodes[::-1])):
            routers.append(Served([*told, "--workers", "2", *flags], new_address()))
            stack.push_async_callback(routers[-1].stop)
        for router in routers:
            await router.ready(2, len(prefills) + len(decodes))
        yield routers


async def chosen(router: Served, lines: list[dict[str, Any]]) -> list[list[Engines]]:
    """Send all requests to each worker, one after another; give for each worker the engines that served them."""
    answers = []
    for pid in router.workers():
        connection = await router.connect(pid)
        served = []
        for line in lines:
            connection.writer.write(wire("POST", line["path"], line["body"].encode(), line["headers"]))
            answer = await read_answer(connection.reader)
            assert answer.status == 200, answer.body
            prefill, decode = answer.json["served"]
            served.append((prefill, decode))
        answers.append(served)

        async def idle() -> bool:
            return await router.total("pd_router_in_flight") == 0

        await eventually(idle, "nothing is in flight any more")
    return answers


@pytest.mark.parametrize(
    ("policy", "fleet"),
    [("consistent_hash", LARGE), ("consistent_hash", UNEVEN), ("chwbl", UNEVEN), ("rendezvous_hash", LARGE)],
    ids=["consistent_hash-8+8", "consistent_hash-3+13", "chwbl-3+13", "rendezvous_hash-8+8"],
)  # fmt: skip
def test_all_workers_of_all_replicas_choose_the_engines_that_were_recorded(policy, fleet):
    lines = lines_of(fleet, 1)

    async def main() -> None:
        async with replicas(fleet, "--policy", policy) as routers:
            told = await asyncio.gather(*(chosen(router, lines) for router in routers))
        first, *others = [answers for router in told for answers in router]
        assert len(others) == 3
        for other in others:
            assert other == first
        assert len({prefill for prefill, _ in first}) == len(fleet.urls[0])
        assert len({decode for _, decode in first}) == len(fleet.urls[1])
        if policy == "rendezvous_hash":  # recorded was consistent_hash
            expected = [_by_rendezvous(fleet, line) for line in lines]
            assert first == expected
            return
        agreeing = [number for number, line in enumerate(lines) if line["kind"] in AGREEING]
        assert len(agreeing) > 150
        assert [first[number] for number in agreeing] == [recorded(fleet, lines[number]) for number in agreeing]

    run(main)


def _by_rendezvous(fleet: Fleet, line: dict[str, Any]) -> Engines:
    names = []
    for role, urls in (("prefill", fleet.urls[0]), ("decode", fleet.urls[1])):
        candidates = [Candidate(url) for url in sorted(urls)]
        names.append(POLICIES["rendezvous_hash"](role).choose(Prompt(ours(line), {}), candidates).name)
    return names[0], names[1]


@pytest.mark.parametrize("policy", ["consistent_hash", "rendezvous_hash", "chwbl"])
@pytest.mark.parametrize(
    "order", [reversed, sorted, lambda urls: urls[1:] + urls[:1]], ids=["reversed", "sorted", "turned"]
)
def test_the_order_in_which_engines_are_told_changes_no_recorded_decision(policy, order):
    for fleet in FLEETS:
        lines = [line for line in lines_of(fleet, 1) if line["kind"] in AGREEING]
        assert lines
        for number, role in enumerate(("prefill", "decode")):
            urls = fleet.urls[number]
            listed = tuple(map(Candidate, urls))
            turned = tuple(map(Candidate, order(urls)))
            one, other = POLICIES[policy](role), POLICIES[policy](role)
            for line in lines:
                asked = Prompt(ours(line), {})
                name = other.choose(asked, turned).name
                assert name == one.choose(asked, listed).name
                if policy != "rendezvous_hash":
                    assert name == recorded(fleet, line)[number]


def test_replicas_agree_while_an_engine_is_gone_and_after_it_came_back():
    lines = lines_of(UNEVEN, 8)

    async def main() -> None:
        async with replicas(UNEVEN) as routers:
            gone = UNEVEN.urls[1][0]
            assert all([(await router.change("remove", url=gone)).status == 200 for router in routers])
            await eventually(lambda: _all(routers, gone, False), "the engine is gone")
            without = await asyncio.gather(*(chosen(router, lines) for router in routers))
            first, *others = [answers for router in without for answers in router]
            assert all(other == first for other in others)
            for line, served in zip(lines, first, strict=True):
                if line["kind"] in AGREEING:
                    before = recorded(UNEVEN, line)
                    assert served == before or (before[1] == gone and served[0] == before[0])
            assert gone not in {decode for _, decode in first}
            assert all([(await router.change("add", url=gone, role="decode")).status == 200 for router in routers])
            await eventually(lambda: _all(routers, gone, True), "the engine is back")
            for router in routers:
                await router.ready(2, 16)
            back = await asyncio.gather(*(chosen(router, lines) for router in routers))
            for answers in (one for router in back for one in router):
                for line, served in zip(lines, answers, strict=True):
                    if line["kind"] in AGREEING:
                        assert served == recorded(UNEVEN, line)

    run(main)


async def _all(routers: list[Served], url: str, there: bool) -> bool:
    """Whether (very likely) all workers have an engine, or none has it."""
    return all([(url in await router.listed()) is there for router in routers for _ in range(10)])
