"""An engine that failed requests and is well again has its share of the work again, whatever the policy goes by."""

import asyncio

import pytest

from pdrouter.fleet import breaker
from pdrouter.fleet import fleet as fleets
from pdrouter.fleet.engine import Engine, Role
from router.fakes import Bed, Out, Seen, run, until
from router.generation import answer
from router.test_failover import fail, fleet, generate

BY_LOAD = ["pd_cost", "power_of_two", "cache_aware", "kv_aware"]


def known(bed: Bed, number: int) -> Engine:
    """A decode engine as the router knows it."""
    return bed.router.fleet.engines[Role.DECODE][number]


async def shares(bed: Bed, requests: int, at_once: int) -> list[int]:
    """Send requests; give how many each decode engine was asked."""
    before = [len(one.seen) for one in bed.decodes]
    left = iter(range(requests))

    async def client() -> None:
        for number in left:
            assert (await bed.complete(f"prompt {number}", stream=True)).status == 200

    await asyncio.gather(*(client() for _ in range(at_once)))
    return [len(one.seen) - count for one, count in zip(bed.decodes, before, strict=True)]


@pytest.mark.parametrize("policy", BY_LOAD)
def test_an_engine_that_stopped_with_many_requests_in_hand_is_asked_as_soon_as_it_is_back(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.3)

    async def main() -> None:
        async with fleet(1, 2, policy=policy, health_interval_secs=0.1) as bed:
            never = asyncio.Event()

            async def begin(seen: Seen, out: Out) -> None:
                await out.events()
                await out.chunk(b"".join(answer(seen.target, seen.body, "r1")[:2]))
                await never.wait()

            bed.decodes[0].behave = bed.decodes[1].behave = begin
            streams = [asyncio.ensure_future(bed.complete(str(number), stream=True)) for number in range(60)]
            await until(lambda: sum(len(one.seen) for one in bed.decodes) == 60, "all are at a decode engine")
            bed.decodes[0].behave = bed.decodes[1].behave = generate()
            await bed.decodes[0].stop()
            await until(lambda: not known(bed, 0).healthy, "its end is seen")
            await bed.decodes[0].start_again()
            await until(
                lambda: known(bed, 0).healthy and not bed.router.fleet.tripped(known(bed, 0)), "it may be asked", 3
            )
            never.set()
            for one in streams:
                one.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            await until(lambda: all(one.own_in_flight == 0 for one in bed.router.fleet), "nothing is under way")
            assert (await shares(bed, 120, 10))[0] >= 30

    run(main)


@pytest.mark.parametrize("policy", BY_LOAD)
def test_an_engine_that_was_left_alone_is_tried_when_its_pause_is_over(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.3)

    async def main() -> None:
        async with fleet(1, 2, policy=policy) as bed:
            bed.decodes[0].behave = fail
            await shares(bed, 60, 12)
            assert bed.router.fleet.tripped(known(bed, 0))
            bed.decodes[0].behave = generate()
            await until(lambda: not bed.router.fleet.tripped(known(bed, 0)), "the pause is over")
            assert (await shares(bed, 60, 6))[0] >= 15

    run(main)


@pytest.mark.parametrize("policy", BY_LOAD)
def test_failures_too_few_for_a_pause_are_load_for_a_while_only(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "BLAMED_SECONDS", 0.4)

    async def main() -> None:
        async with fleet(1, 2, policy=policy) as bed:
            for _ in range(4):
                bed.router.fleet.failed(known(bed, 0), "test")
            assert known(bed, 0).in_flight == 4
            told = [one["in_flight"] for one in await bed.workers()]
            assert told == [0, 0, 0], "an administrator sees requests"
            await until(lambda: known(bed, 0).in_flight == 0, "it is blamed no longer", 2)
            assert known(bed, 0).failures == 4, "which are still in a row"
            assert (await shares(bed, 40, 4))[0] >= 5

    run(main)


def test_an_engine_that_came_back_and_answers_is_on_trial_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.05)

    async def main() -> None:
        async with fleet(1, 2) as bed:
            engine, engines = known(bed, 0), bed.router.fleet

            async def tripped_and_back() -> None:
                for _ in range(5):
                    engines.failed(engine, "test")
                assert engines.tripped(engine)
                engines.mark(engine, False, "test")
                engines.mark(engine, True, "test")
                assert engine.failures == 0
                await until(lambda: not engines.tripped(engine), "it is tried")

            await tripped_and_back()
            engines.failed(engine, "test")
            assert engines.tripped(engine), "the first failure on trial is one too many"
            await until(lambda: not engines.tripped(engine), "it is tried again")
            await tripped_and_back()
            engines.succeeded(engine)
            engines.failed(engine, "test")
            assert not engines.tripped(engine)

    run(main)


def test_where_every_engine_fails_none_closes_its_ways_after_its_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.1)

    async def main() -> None:
        async with fleet(1, 1) as bed:
            bed.decode.behave = fail
            for _ in range(2):
                for _ in range(2):
                    assert (await bed.complete()).status == 500
                await until(lambda: not bed.router.fleet.tripped(known(bed, 0)), "it is tried again")
            assert not bed.router.desk.edges.any_closed

    run(main)
