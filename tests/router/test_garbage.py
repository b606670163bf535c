import asyncio
import gc
import json
from collections import Counter

import pytest

from router.fakes import Bed, routed, run, wire


async def leave_early(bed: Bed) -> None:
    """Ask for a stream and close the connection once it has begun."""
    reader, writer = await bed.connect()
    writer.write(wire("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()))
    await reader.readuntil(b"\r\n")
    writer.transport.abort()


KINDS = {
    "whole": lambda bed: bed.complete(),
    "stream": lambda bed: bed.complete(stream=True),
    "chat": lambda bed: bed.post("/v1/chat/completions", {"model": "tiny", "messages": []}),
    "batch": lambda bed: bed.complete(["a", "b", "c"]),
    "refused": lambda bed: bed.post("/v1/completions", b"{"),
    "client leaves": leave_early,
}


@pytest.mark.parametrize("settings", [{}, {"policy": "pd_cost"}, {"hedge_prefill_secs": 5.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_leaves_nothing_to_the_garbage_collector(kind, settings):
    """Its pauses hold up every other request; what has no cycles goes when it ends."""

    async def main():
        async with routed(2, 2, **settings) as bed:
            await KINDS[kind](bed)
            await asyncio.sleep(0)
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                for _ in range(5):
                    await KINDS[kind](bed)
                await asyncio.sleep(0.05)  # what loops forget in their next turns
                gc.collect()
                left = Counter(type(one).__name__ for one in gc.garbage if type(one).__module__.startswith("pdrouter"))
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
            assert not left

    run(main)
