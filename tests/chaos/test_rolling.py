"""Engines and the router are replaced one by one, and no client notices."""

import asyncio
import signal

from chaos.fleet import Fleet, fleet
from support.processes import Process

# A decode engine that fetches while its partner ends cannot be helped: it computes the prompt itself.
UNAVOIDABLE = {"ticket_unreachable"}


async def healthy(bed: Fleet, prefills: int, decodes: int) -> None:
    """Wait until the router finds that many engines well."""
    for _ in range(600):
        told = await asyncio.to_thread(bed.router.get, "/ready")
        if (told["prefill"]["healthy"], told["decode"]["healthy"]) == (prefills, decodes):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the router finds {told}")


async def replace(bed: Fleet, engines: list[Process]) -> None:
    """End engines as a rolling update does, each only when the one before is back."""
    await asyncio.sleep(1)
    for one in engines:
        one.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(one.process.wait)
        one.log.close()
        one.start()
        await healthy(bed, len(bed.prefills), len(bed.decodes))
    await asyncio.sleep(0.5)


def test_a_rolling_update_of_all_engines_costs_no_request_and_changes_no_text() -> None:
    with fleet(2, 3, 1, "--health-interval-secs", "0.3") as bed:

        async def main() -> list[str]:
            # The longest answers outlast the second that an engine gives what it has under way.
            await bed.under_load(replace(bed, [*bed.decodes, *bed.prefills]), clients=12, tokens=(4, 60, 600))
            return await bed.compare()

        different = asyncio.run(main())
        bed.told()
        assert not different, f"{len(different)} of {len(bed.outcomes)}; the first: {different[0]}"
        assert len(bed.outcomes) > 60
        assert bed.total("pd_router_continued_streams_total") >= 1, "streams were cut and went on"
        bed.quiet()
        assert [one for one in bed.violations() if one["rule"] not in UNAVOIDABLE] == []


async def serving(one: Process, workers: int) -> None:
    """Wait until all workers of a router listen and all engines are known to them."""
    for _ in range(600):
        told = one.output()
        if told.count("listening=") == workers and told.count("healthy=true") >= workers * 4:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the second router does not serve:\n{told}")


async def hand_over(bed: Fleet, times: int) -> None:
    """Start another router at the same ports, let the first one drain and end; again and again."""
    await asyncio.sleep(0.5)
    for _ in range(times):
        old, new = bed.router, Process(bed.router.command, bed.router.url, bed.router.health)
        new.start()
        bed.router = new
        try:
            await serving(new, 2)
            await asyncio.sleep(0.3)
        finally:
            status = await asyncio.to_thread(old.stop)
        assert status == 0, "it ended in good order"
    await asyncio.sleep(0.5)


def test_a_router_hands_its_ports_over_to_another_and_costs_no_request() -> None:
    """Clients that open a connection for each request, so that one is always being opened."""
    with fleet(2, 2, 4, "--workers", "2", "--share-ports", "--policy", "round_robin") as bed:
        first = bed.router
        try:

            async def main() -> list[str]:
                await bed.under_load(hand_over(bed, 3), clients=12, tokens=(1, 4, 40), keep=False)
                return await bed.compare()

            different = asyncio.run(main())
            bed.told()
            assert not different, f"{len(different)} of {len(bed.outcomes)}; the first: {different[0]}"
            assert len(bed.outcomes) > 60
            bed.quiet()
            assert bed.violations() == []
        finally:
            if bed.router is not first:
                bed.router.stop()
