"""Engines fail; clients notice nothing but time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from pdsim.referee.answers import Answer, difference
from pdsim.referee.bench import Bench, Body
from pdsim.referee.case import FailedError, Group, Plan
from pdsim.referee.engines import Engine, until

failover = Group("failover", alone=True)
CONTINUES = "a router that has broken streams continued from the tokens already sent"
WATCHES = "a router that asks a prefill engine whether leases have ended while their requests wait for decode"
CHECKS = "a router that checks tickets before a decode engine sees them"


@contextlib.asynccontextmanager
async def _load(bench: Bench, at_once: int = 4) -> AsyncIterator[list[str]]:
    """Keep so many clients busy with distinct requests; give the list of what went wrong, its first entry a count."""
    wrong: list[str] = []
    sent = 0
    over = asyncio.Event()

    async def client(number: int) -> None:
        nonlocal sent
        while not over.is_set():
            body = bench.completion(stream=bool(number % 2), max_tokens=8)
            sent += 1
            try:
                await bench.right(body)
            except FailedError as error:
                wrong.append(str(error))
                await asyncio.sleep(0.05)

    clients = [asyncio.ensure_future(client(number)) for number in range(at_once)]
    try:
        yield wrong
        over.set()
        await asyncio.gather(*clients)
    finally:
        for one in clients:
            one.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    if wrong:
        raise FailedError(f"{len(wrong)} of {sent} requests failed: {wrong[0]}")


async def _streams(bench: Bench, bodies: Sequence[Body], broken: asyncio.Event, begun: list[int]) -> list[str]:
    """Run streams; give what is wrong with each. `begun` grows when a stream has three events."""

    async def one(body: Body) -> str:
        expected = await bench.plainly(body)
        try:
            async with bench.stream(body, patience=15) as stream:
                await stream.more(3)
                begun.append(1)
                await broken.wait()
                return difference(await stream.rest(), expected)
        except FailedError as error:
            return str(error)

    return list(await asyncio.gather(*map(one, bodies)))


@failover.case(own_only=CONTINUES)
async def kill_decode_under_streams(bench: Bench) -> str:
    """SIGKILL of one of four decode engines under 12 streams: every stream comes to its end, every text is right."""
    bodies = [
        bench.completion(stream=True, max_tokens=60, ignore_eos=True, stream_options={"include_usage": True})
        for _ in range(12)
    ]
    await bench.slow_decodes()
    broken, begun = asyncio.Event(), list[int]()
    streams = asyncio.ensure_future(_streams(bench, bodies, broken, begun))

    async def all_begun() -> bool:
        return len(begun) == len(bodies) or streams.done()

    await bench.eventually(all_begun, "all streams have begun", 8)
    cut, victim = 0, bench.fleet.decodes[0]
    for engine in bench.fleet.decodes:
        running = (await engine.state())["running"]
        if running > cut:
            cut, victim = running, engine
    victim.kill()
    broken.set()
    wrong = [found for found in await streams if found]
    if wrong:
        raise FailedError(f"{len(wrong)} of {len(bodies)} streams failed ({cut} were on it): {wrong[0]}")
    return f"{cut} of {len(bodies)} streams were on it; all ended, all texts right"


@failover.case()
async def kill_decode(bench: Bench) -> str:
    """After the SIGKILL of one of four decode engines no new request fails."""
    await bench.all_right([bench.completion() for _ in range(4)])
    bench.fleet.decodes[0].kill()
    bodies = [bench.completion(stream=bool(number % 2)) for number in range(40)]
    await bench.all_right(bodies)
    return f"{len(bodies)} of {len(bodies)} requests right"


@failover.case()
async def kill_prefill(bench: Bench) -> str:
    """SIGKILL of one of two prefill engines while it computes: no request fails, none after it either."""
    for engine in bench.fleet.prefills:
        await engine.fault("slow", factor=200)
    bodies = [bench.completion(stream=bool(number % 2)) for number in range(8)]
    asking = asyncio.ensure_future(bench.wrong(bodies, 8))
    found = await bench.eventually(lambda: bench.busy(bench.fleet.prefills), "a prefill engine has requests")
    victim: Engine = found[0]
    victim.kill()
    for engine in bench.fleet.prefills:
        if engine is not victim:
            await engine.fault("none")
    wrong = await asking
    wrong += await bench.wrong([bench.completion() for _ in range(16)])
    if wrong:
        raise FailedError(f"{len(wrong)} of 24 requests failed: {wrong[0]}")
    return "24 of 24 requests right"


@failover.case()
async def decode_error_once(bench: Bench) -> str:
    """A decode engine that answers 503 or 500 once costs no client an error."""
    engine, sent = bench.fleet.decodes[0], 0
    for code in (503, 500):
        await engine.client.delete(engine.url + "/sim/requests")
        await engine.fault("status", code=code, count=1)
        sent += await bench.all_right_until_met(engine)
    return f"{sent} requests right, with one 503 and one 500 among the engine's answers"


@failover.case()
async def prefill_error_once(bench: Bench) -> str:
    """A prefill engine that answers 500 once costs no client an error."""
    engine = bench.fleet.prefills[0]
    await engine.fault("status", code=500, count=1)
    return f"{await bench.all_right_until_met(engine)} requests right, with one 500 among the engine's answers"


@failover.case(own_only=CHECKS)
async def ticket_without_request_id(bench: Bench) -> str:
    """A prefill answer without `remote_request_id` (seen in the field) kills no decode engine and fails no request."""
    for engine in bench.fleet.prefills:
        await engine.fault("drop_remote_request_id", count=1)
    wrong = await bench.wrong([bench.completion() for _ in range(4)], 4, patience=3)

    async def died() -> bool:
        return not all([await engine.answers() for engine in bench.fleet.decodes])

    dead = await until(died, 1)
    if dead:
        raise FailedError("a decode engine died of it" + (f"; {wrong[0]}" if wrong else ""))
    if wrong:
        raise FailedError(f"{len(wrong)} of 4 requests failed: {wrong[0]}")
    return "4 of 4 requests right, all decode engines alive"


async def _a_lease_ended(bench: Bench) -> bool:
    told = [entry for engine in bench.fleet.prefills for entry in await engine.violations()]
    return any(entry["rule"] == "ticket_never_collected" for entry in told)


async def _take_the_free_blocks(bench: Bench) -> None:
    """Compute other prompts on the prefill engines, which overwrites what no ticket holds."""
    for engine in bench.fleet.prefills:
        for _ in range(4):
            await bench.send(bench.completion(bench.prompt(400), max_tokens=1), url=engine.url, patience=1)


async def _no_wrong_text(bench: Bench, body: Body, answer: Answer, expected: Answer) -> str:
    """See that an answer is right or an error, and that no decode engine has cached what it should not.

    Raises:
        FailedError: there is wrong text, now or for the next who sends this prompt.
    """
    found = difference(answer, expected)
    if found and not answer.failure:
        raise FailedError(f"status 200 and {found}")
    for engine in bench.fleet.decodes:
        if (await bench.send(body, url=engine.url)).text != expected.text:
            raise FailedError(f"decode engine {engine.name} took it in: its prefix cache is poisoned")
    return f"no wrong text: {answer.failure}" if answer.failure else "the text is right"


@failover.case(plan=Plan(2, 2, lease_seconds=3.5, prefill_blocks=8), limit=40)
async def expired_lease(bench: Bench) -> str:
    """A ticket whose lease ran out before a decode engine read it becomes no wrong text, now or later."""
    body = bench.completion(bench.prompt(300), stream=True)  # a stream's head comes when the engine has it
    expected = await bench.plainly(body)
    for engine in bench.fleet.decodes:
        engine.pause()
    asking = asyncio.ensure_future(bench.send(body, patience=20))
    await bench.eventually(bench.tickets, "prefill is done")
    await bench.eventually(lambda: _a_lease_ended(bench), "the lease has run out", 8)
    await _take_the_free_blocks(bench)
    for engine in bench.fleet.decodes:
        engine.go_on()
    return await _no_wrong_text(bench, body, await asking, expected)


@failover.case(
    own_only=WATCHES, limit=40,
    plan=Plan(1, 1, lease_seconds=2.0, prefill_blocks=8, decode_lease_seconds=30.0, decode_seats=1),
)  # fmt: skip
async def late_heartbeats(bench: Bench) -> str:
    """A ticket whose lease runs out in a full decode engine's queue becomes no wrong text, now or later.

    The decode engine keeps leases by heartbeats, one for each sixth of its own `kv_lease_duration`: here too seldom.
    """
    before = bench.completion(stream=True, max_tokens=400, ignore_eos=True)
    body = bench.completion(bench.prompt(300), stream=True)
    expected, first = await asyncio.gather(bench.plainly(body), bench.plainly(before))
    await bench.slow_decodes()
    async with bench.stream(before, patience=30) as sitting:
        await sitting.more(3)
        asking = asyncio.ensure_future(bench.send(body, patience=30))
        ended = await until(lambda: _a_lease_ended(bench), 6)  # none of a router that waits for a free seat
        await _take_the_free_blocks(bench)
        for engine in bench.fleet.decodes:
            await engine.fault("none")
        found = difference(await sitting.rest(), first)
        if found:
            raise FailedError(f"the stream before it: {found}")
    told = await _no_wrong_text(bench, body, await asking, expected)
    return f"{told}, {'after a lease ended' if ended else 'no lease ended'}"


@failover.case()
async def decode_returns(bench: Bench) -> str:
    """A decode engine that refuses connections for 1.5 s fails no request, and has requests again 5 s after it."""
    engine = bench.fleet.decodes[0]
    await bench.all_right([bench.completion() for _ in range(4)])
    await engine.fault("refuse", seconds=1.5)
    await bench.all_right([bench.completion() for _ in range(12)])
    await bench.eventually(engine.answers, "it listens again", 4)
    await engine.client.delete(engine.url + "/sim/requests")

    async def met() -> bool:
        await bench.all_right([bench.completion() for _ in range(4)])
        return bool(await engine.requests())

    await bench.eventually(met, "the engine has requests again")
    return "no request failed; it has requests again"


async def _away(bench: Bench, engines: Sequence[Engine], seconds: float) -> None:
    """Let engines refuse all connections for some seconds."""
    await asyncio.gather(*(engine.fault("refuse", seconds=seconds) for engine in engines))

    async def gone() -> bool:
        return not any([await engine.answers() for engine in engines])

    await bench.eventually(gone, "the engines are away", 1)


@failover.case()
async def all_decodes_away(bench: Bench) -> str:
    """All decode engines are away for 2 s: requests wait, none fails."""
    await _away(bench, bench.fleet.decodes, 2.0)
    await bench.all_right([bench.completion(stream=bool(number % 2)) for number in range(4)])
    return "4 of 4 requests right, none before the engines were back"


@failover.case()
async def all_prefills_away(bench: Bench) -> str:
    """All prefill engines are away for 3 s: decode engines compute alone or requests wait; none fails."""
    await _away(bench, bench.fleet.prefills, 3.0)
    await bench.all_right([bench.completion(stream=bool(number % 2)) for number in range(4)])
    return "4 of 4 requests right"


@failover.case(limit=30)
async def decode_hangs(bench: Bench) -> str:
    """A decode engine that takes requests and makes no token keeps no client waiting for more than 10 s."""
    engine = bench.fleet.decodes[0]
    await engine.fault("hang")
    sent = await bench.all_right_until_met(engine)
    return f"{sent} of {sent} requests right"


@failover.case(limit=60)
async def prefill_restarts(bench: Bench) -> str:
    """A prefill engine dies and comes back under a new engine id while requests flow: none fails, it serves again."""
    engine = bench.fleet.prefills[0]
    async with _load(bench):
        await bench.eventually(engine.requests, "the engine has served")
        engine.kill()
        await engine.restart()
        await bench.eventually(engine.requests, "the engine has requests again")
    return "no request failed; the engine has requests again"


@failover.case()
async def prefill_dies_between_legs(bench: Bench) -> str:
    """The prefill engine dies when it is done and before its KV is read: the prompt is computed again elsewhere."""
    body = bench.completion()
    expected = await bench.plainly(body)
    for engine in bench.fleet.decodes:
        engine.pause()
    asking = asyncio.ensure_future(bench.send(body))
    await bench.eventually(bench.tickets, "prefill is done")
    for engine in bench.fleet.prefills:
        if (await engine.state())["tickets"]:
            engine.kill()
            break
    for engine in bench.fleet.decodes:
        engine.go_on()
    found = difference(await asking, expected)
    if found:
        raise FailedError(found)
    return "the text is right"


async def _failed_transfers(engine: Engine) -> float:
    page = (await engine.client.get(engine.url + "/metrics", timeout=5)).text
    rows = [row for row in page.splitlines() if row.startswith("vllm:nixl_num_failed_transfers_total{")]
    return float(rows[0].split()[-1]) if rows else 0.0


async def _over_a_broken_edge(bench: Bench, prefill: Engine, decode: Engine, stream: bool) -> int:
    """Break the edge between two engines and send requests until one has met it; give how many it took."""
    await decode.fault("edge", **(await prefill.state())["side_channel"])
    before = await _failed_transfers(decode)
    for sent in range(0, 60, 6):
        await bench.all_right([bench.completion(stream=stream) for _ in range(6)])
        if await _failed_transfers(decode) > before:
            return sent + 6
    raise FailedError("none of 60 distinct requests met the edge: are all pairs used?")


@failover.case(limit=30)
async def broken_edge(bench: Bench) -> str:
    """A decode engine that cannot reach one prefill engine, both well otherwise, fails no request, streamed or not."""
    fleet = bench.fleet
    sent = await _over_a_broken_edge(bench, fleet.prefills[0], fleet.decodes[0], stream=False)
    sent += await _over_a_broken_edge(bench, fleet.prefills[-1], fleet.decodes[-1], stream=True)
    await bench.all_right([bench.completion() for _ in range(24)])
    return f"{sent + 24} requests right, streamed and whole ones among those that met a broken edge"


@failover.case()
async def black_hole(bench: Bench) -> str:
    """A decode engine that fails at once draws no more requests than before, though it is never busy."""
    bad, total = bench.fleet.decodes[0], 48
    await bad.fault("status", code=500, count=100_000)
    await bench.wrong([bench.completion() for _ in range(total)])
    drawn, fair = len(await bad.requests()), total / len(bench.fleet.decodes)
    if drawn > 2 * fair:
        raise FailedError(f"it drew {drawn} of {total} requests, twice its share would be {2 * fair:g}")
    return f"it drew {drawn} of {total} requests; its share is {fair:g}"


@failover.case()
async def failing_decode(bench: Bench) -> str:
    """While one of four decode engines answers 500 to everything, no request fails."""
    await bench.fleet.decodes[0].fault("status", code=500, count=100_000)
    await bench.all_right([bench.completion(stream=bool(number % 2)) for number in range(36)])
    return "36 of 36 requests right"


async def _cut(bench: Bench, body: Body) -> tuple[Engine, asyncio.Task[str]]:
    """Begin a stream, and cut it on the engine's side after some tokens; give what comes of it."""
    expected = await bench.plainly(body)
    await bench.slow_decodes()
    begun, cut = asyncio.Event(), asyncio.Event()

    async def client() -> str:
        try:
            async with bench.stream(body, patience=12) as stream:
                await stream.more(6)
                begun.set()
                await cut.wait()
                return difference(await stream.rest(), expected)
        except FailedError as error:
            return str(error)
        finally:
            begun.set()

    task = asyncio.ensure_future(client())
    await begun.wait()
    engine = await bench.serving()
    await engine.fault("refuse", seconds=1.0)
    cut.set()
    return engine, task


@failover.case(own_only=CONTINUES)
async def continued_completion(bench: Bench) -> str:
    """A completion whose engine breaks off goes on: no token lost or twice, right usage and finish reason."""
    body = bench.completion(stream=True, max_tokens=50, ignore_eos=True, stream_options={"include_usage": True})
    _, task = await _cut(bench, body)
    found = await task
    if found:
        raise FailedError(found)
    return "text, usage and finish reason are the undisturbed ones"


@failover.case(own_only=CONTINUES)
async def continued_chat(bench: Bench) -> str:
    """A chat answer whose engine breaks off goes on: no token lost or twice, right usage and finish reason."""
    body = bench.conversation(stream=True, max_tokens=50, ignore_eos=True, stream_options={"include_usage": True})
    _, task = await _cut(bench, body)
    found = await task
    if found:
        raise FailedError(found)
    return "text, usage and finish reason are the undisturbed ones"


@failover.case()
async def no_silent_cut(bench: Bench) -> str:
    """A stream that breaks never looks whole: it goes on, or the client sees an error or a broken connection."""
    body = bench.completion(stream=True, max_tokens=50, ignore_eos=True)
    expected = await bench.plainly(body)
    await bench.slow_decodes()
    async with bench.stream(body, patience=12) as stream:
        await stream.more(6)
        await (await bench.serving()).fault("refuse", seconds=1.0)
        answer = await stream.rest()
    told = any(event.startswith('{"error"') for event in answer.events)
    if not difference(answer, expected):
        return "it went on"
    if answer.broken or told:
        return f"the client saw it: {answer.broken or 'an error event'}"
    raise FailedError(f"it ends after {len(answer.events)} events like a whole answer")


@failover.case()
async def broken_answer(bench: Bench) -> str:
    """An answer that is not streamed, and whose engine breaks off, is computed again."""
    body = bench.completion(max_tokens=50, ignore_eos=True)
    await bench.slow_decodes()
    asking = asyncio.ensure_future(bench.right(body))
    await (await bench.serving()).fault("refuse", seconds=1.0)
    await asking
    return "the text is right"


@failover.case()
async def bounded_retries(bench: Bench) -> str:
    """When every prefill engine fails, retries do not multiply the load: at most 2.5 attempts a request on average."""
    for engine in bench.fleet.prefills:
        await engine.fault("status", code=500, count=100_000)
    total = 200  # enough that a budget with a reserve for quiet times counts
    await bench.wrong([bench.completion(bench.prompt(20)) for _ in range(total)], 50, patience=2)
    attempts = sum((await bench.count(bench.fleet.prefills)).values())
    if attempts > 2.5 * total:
        raise FailedError(f"{attempts} attempts for {total} requests")
    return f"{attempts} attempts for {total} requests"


@failover.case()
async def recovery(bench: Bench) -> str:
    """After all engines were away for 1 s under load, requests are right again within 5 s, without anybody's help."""
    away = asyncio.ensure_future(_away(bench, bench.fleet.engines, 1.0))
    await bench.wrong([bench.completion() for _ in range(12)], patience=2)
    await away

    async def back() -> bool:
        return all([await engine.answers() for engine in bench.fleet.engines])

    await bench.eventually(back, "all engines listen again", 3)

    async def right() -> bool:
        return not await bench.wrong([bench.completion() for _ in range(12)], patience=2)

    await bench.eventually(right, "12 requests in a row are right")
    return "12 of 12 requests right again"


@failover.case(plan=Plan(2, 2), limit=120)
async def rolling_restart(bench: Bench) -> str:
    """Every engine is restarted in turn (SIGTERM) while requests flow: none fails."""
    async with _load(bench):
        for engine in bench.fleet.engines:
            await engine.end()
            await engine.restart()
            await until(engine.requests, 2.5)
    return f"no request failed over {len(bench.fleet.engines)} restarts"
