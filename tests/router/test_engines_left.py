"""Nothing is kept of an engine that left, although what it had in hand ends later."""

import asyncio
import json

import pytest

from pdrouter.fleet.engine import Role
from router.fakes import Bed, Behaviour, FakeEngine, Out, Seen, run, until
from router.test_failover import fail, fleet, generate, issue, once, quiet


async def ends_after_leaving(bed: Bed, engine: FakeEngine, behave: Behaviour) -> None:
    """Remove an engine while it holds a request, with which it then goes on."""
    held, go_on = asyncio.Event(), asyncio.Event()

    async def hold(seen: Seen, out: Out) -> None:
        held.set()
        await go_on.wait()
        await behave(seen, out)

    engine.behave = hold
    asked = [asyncio.ensure_future(bed.complete(stream=True))]
    while not held.is_set():  # the other one was asked
        asked.append(asyncio.ensure_future(bed.complete(stream=True)))
        await asyncio.sleep(0.05)
    assert (await bed.admin("POST", "/remove_worker", json.dumps({"url": engine.url}).encode())).status == 200
    go_on.set()
    told = await asyncio.gather(*asked)
    assert [one.status for one in told] == [200] * len(told)
    await quiet(bed)


async def named_as_a_way(bed: Bed, engine: FakeEngine) -> bool:
    lines = [line for line in (await bed.metrics()).splitlines() if line.startswith("pd_router_edge_")]
    shown = (await bed.admin("GET", "/debug/edges")).body.decode()
    return any(engine.url in line for line in [*lines, shown])


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("fails", [False, True])
def test_no_way_is_noted_of_an_engine_that_left_before_its_handoff_ended(role: Role, fails: bool) -> None:
    async def main() -> None:
        async with fleet(2, 2) as bed:
            for _ in range(4):
                assert (await bed.complete(stream=True)).status == 200
            decode = once(fail, generate()) if fails else generate()
            gone, stays = bed.prefills if role is Role.PREFILL else bed.decodes
            assert await named_as_a_way(bed, gone)
            if role is Role.PREFILL:
                bed.decodes[0].behave = bed.decodes[1].behave = decode
            await ends_after_leaving(bed, gone, issue() if role is Role.PREFILL else decode)
            assert not await named_as_a_way(bed, gone)
            assert await named_as_a_way(bed, stays)
            assert set(bed.router.desk.ledger._lives) <= set(bed.router.fleet)

    run(main)


def test_a_difference_that_canaries_saw_is_not_told_of_engines_that_left() -> None:
    async def main() -> None:
        async with fleet(1, 2, canary_interval_secs=0.05) as bed:

            async def probe(seen: Seen, out: Out) -> None:
                likely = {"a": -9.0, "b": -0.1} if "kv_transfer_params" in seen.body else {"a": -0.1, "b": -9.0}
                await out.json({"model": "tiny", "choices": [{"text": "a", "logprobs": {"top_logprobs": [likely]}}]})

            bed.prefill.probe = issue()
            for one in bed.decodes:
                one.probe = probe
            canary, urls = bed.router._canary, {one.url for one in bed.decodes}
            await until(lambda: {decode for _, decode in canary.differing()} == urls, "both are seen")
            body = json.dumps({"url": bed.decodes[0].url}).encode()
            assert (await bed.admin("POST", "/remove_worker", body)).status == 200
            rows = [line for line in (await bed.metrics()).splitlines() if line.startswith("pd_router_canary_differs{")]
            assert len(rows) == 1
            assert bed.decodes[1].url in rows[0]

    run(main)
