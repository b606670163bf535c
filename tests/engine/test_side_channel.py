"""How an engine learns that another one is not there."""

import asyncio
import signal

import pytest

from pdsim.engine.side_channel import Remote, RemoteUnreachableError
from support.processes import engine


def test_the_death_of_an_engine_that_it_knew_shows_at_once_a_strangers_silence_takes_time() -> None:
    async def main() -> None:
        prefill = engine("prefill")
        with prefill:
            host = prefill.url.removeprefix("http://").split(":")[0]
            engine_id = prefill.get("/sim/state")["engine_id"]
            known, stranger = Remote(host, 5600), Remote(host, 5600)
            assert not known.knows(engine_id)
            await known.read(engine_id, "any", [1])
            assert known.knows(engine_id)
            prefill.process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(prefill.process.wait)
            for _ in range(1000):
                await asyncio.sleep(0.005)  # the end of its connection has still to be read here
                if not known.knows(engine_id):
                    break
            with pytest.raises(RemoteUnreachableError) as lost:
                await known.read(engine_id, "any", [1])
            with pytest.raises(RemoteUnreachableError) as silent:
                await stranger.read(engine_id, "any", [1])
            assert (lost.value.at_once, silent.value.at_once) == (True, False)

    asyncio.run(main())


def test_another_engine_at_the_address_shows_at_once() -> None:
    async def main() -> None:
        with engine("prefill") as prefill:
            host = prefill.url.removeprefix("http://").split(":")[0]
            remote = Remote(host, 5600)
            with pytest.raises(RemoteUnreachableError) as other:
                await remote.read("of a former life", "any", [1])
            assert other.value.at_once
            assert await remote.hello(prefill.get("/sim/state")["engine_id"])
            remote.close()

    asyncio.run(main())
