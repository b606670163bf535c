"""A prompt that engines die of takes a few of them with it, never the fleet."""

import asyncio
from typing import Any

import pytest

from router.fakes import Bed, Behaviour, FakeEngine, Out, Seen, run
from router.test_failover import fleet, generate, issue, quiet, seen_by

POISON = "poison"
MOST = 4  # the first try and three more


def mortal(engine: FakeEngine, behave: Behaviour) -> Behaviour:
    """Serve, but die of one prompt: the process is gone, and nothing listens any more."""

    async def serve(seen: Seen, out: Out) -> None:
        if POISON in str(seen.body["prompt"]):
            await asyncio.wait([asyncio.ensure_future(engine.stop())])  # it ends this task, too
        else:
            await behave(seen, out)

    return serve


async def warm(bed: Bed) -> None:
    """Let the router have a kept connection to every engine."""
    for _ in range(max(len(bed.prefills), len(bed.decodes))):
        assert (await bed.complete()).status == 200


def dead(engines: list[FakeEngine]) -> int:
    return sum(any(POISON in str(seen.body["prompt"]) for seen in one.seen) for one in engines)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("role", "fields"),
    [
        ("prefill", {}),
        ("decode", {}),
        ("decode", {"stream": True}),
        ("decode", {"n": 2}),
        ("decode", {"n": 2, "stream": True}),
    ],
)
def test_one_prompt_kills_no_more_engines_than_a_request_has_tries(
    role: str, fields: dict[str, Any], kept: bool
) -> None:
    async def main() -> None:
        async with fleet(8, 8) as bed:
            if kept:
                await warm(bed)
            victims = bed.prefills if role == "prefill" else bed.decodes
            for one in victims:
                one.behave = mortal(one, issue() if role == "prefill" else generate())
            told = await bed.complete(POISON, **fields)
            assert told.status == 502
            assert 1 <= dead(victims) <= MOST
            assert (await bed.complete("sound")).status == 200
            await quiet(bed)

    run(main)


@pytest.mark.parametrize("at_once", [0, 3])
def test_one_prompt_kills_no_more_engines_where_prefill_is_hedged(at_once: int) -> None:
    async def main() -> None:
        async with fleet(8, 2, hedge_prefill_secs=0.05) as bed:
            await warm(bed)
            died = 0

            def slowly(engine: FakeEngine) -> Behaviour:
                die = mortal(engine, issue())

                async def serve(seen: Seen, out: Out) -> None:
                    nonlocal died
                    died += 1
                    await asyncio.sleep(0 if died <= at_once else 0.2)
                    await die(seen, out)

                return serve

            for one in bed.prefills:
                one.behave = slowly(one)
            assert (await bed.complete(POISON)).status == 502
            assert 1 <= dead(bed.prefills) <= MOST
            await quiet(bed)

    run(main)


def test_a_kept_connection_that_had_gone_stale_costs_no_try() -> None:
    async def main() -> None:
        async with fleet(1, 1) as bed:
            await warm(bed)
            bed.prefill.hang_up()
            await asyncio.gather(*(bed.complete() for _ in range(4)))
            assert bed.router.desk.retries.spent == 0
            assert len(seen_by(bed.prefills)) == 5

    run(main)
