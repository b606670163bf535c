"""A killed engine costs its clients time and nothing else."""

import asyncio

import pytest

from chaos.fleet import Fleet, fleet
from support.processes import Process


def busiest(engines: list[Process]) -> Process:
    return max(engines, key=lambda one: one.get("/sim/state")["running"])


async def kill_the_busiest(bed: Fleet, engines: list[Process]) -> None:
    await asyncio.sleep(1.5)
    bed.kill(await asyncio.to_thread(busiest, engines))
    await asyncio.sleep(2.5)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_killing_an_engine_under_load_loses_no_request_and_no_token(role: str) -> None:
    with fleet(2, 4, 1, "--policy", "round_robin") as bed:
        engines = bed.decodes if role == "decode" else bed.prefills

        async def main() -> list[str]:
            await bed.under_load(kill_the_busiest(bed, engines), clients=32, tokens=(60, 150))
            return await bed.compare()

        different = asyncio.run(main())
        bed.told()
        assert not different, f"{len(different)} of {len(bed.outcomes)}; the first: {different[0]}"
        assert len(bed.outcomes) > 60
        if role == "decode":
            assert bed.total("pd_router_continued_streams_total") >= 1, "streams were cut and went on"
        for one in engines:
            if one.process.poll() is not None:
                bed.restart(one)
        bed.quiet()
        # A decode engine that is just fetching from a killed prefill engine cannot be helped: it computes the prompt.
        assert [one for one in bed.violations() if one["rule"] != "ticket_unreachable"] == []
