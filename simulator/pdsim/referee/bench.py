"""What a case works with: the router's address, the engines behind it, a client, prompts."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from pdsim.referee.answers import Answer, difference, why
from pdsim.referee.case import FailedError
from pdsim.referee.engines import MODEL, Engine, Fleet, until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATIENCE = 10.0  # seconds that a client of a case waits
Body = dict[str, Any]
WORDS = (  # common in the text that the tokenizer was trained on
    "return over def in class brown quick dog dict value import the lazy fox list jumps self range print os"
).split()


@dataclass(slots=True)
class Stream:
    """A streamed answer while it comes."""

    answer: Answer
    chunks: AsyncIterator[bytes]

    async def more(self, events: int) -> None:
        """Read until so many events have come in all.

        Raises:
            FailedError: the stream ended or broke before.
        """
        while len(self.answer.events) < events:
            try:
                self.answer.body += await anext(self.chunks)
            except StopAsyncIteration:
                raise FailedError(f"the stream ended after {len(self.answer.events)} events") from None
            except httpx.HTTPError as error:
                raise FailedError(f"{why(error)} after {len(self.answer.events)} events") from None
        if self.answer.status != 200:
            raise FailedError(self.answer.failure)

    async def rest(self) -> Answer:
        """Read to the end, whatever that is."""
        try:
            async for chunk in self.chunks:
                self.answer.body += chunk
        except httpx.HTTPError as error:
            self.answer.broken = why(error)
        return self.answer


@dataclass(slots=True)
class Bench:
    """One case's view of the world."""

    case: str
    url: str
    fleet: Fleet
    client: httpx.AsyncClient
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    # --- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, words: int = 200) -> str:
        """Give random words, others with each call and the same in each run."""
        draw = random.Random(f"{self.case} {next(self._numbers)}")
        return " ".join(draw.choice(WORDS) for _ in range(words))

    def completion(self, prompt: Any = None, **fields: Any) -> Body:
        """Make a body for /v1/completions at temperature 0, with a prompt of its own."""
        given = self.prompt() if prompt is None else prompt
        return {"model": MODEL, "prompt": given, "max_tokens": 12, "temperature": 0} | fields

    def conversation(self, prompt: str | None = None, **fields: Any) -> Body:
        """Make a body for /v1/chat/completions."""
        said = [
            {"role": "system", "content": "you are brief"},
            {"role": "user", "content": prompt or self.prompt()},
        ]
        return {"model": MODEL, "messages": said, "max_tokens": 12, "temperature": 0} | fields

    # --- requests -----------------------------------------------------------------------------------------------

    async def send(
        self, body: Body | bytes, headers: Mapping[str, str] | None = None, url: str = "", patience: float = PATIENCE
    ) -> Answer:
        """Send a request and read the whole answer; the path follows from the body."""
        async with self.stream(body, headers, url, patience) as stream:
            return await stream.rest()

    @asynccontextmanager
    async def stream(
        self, body: Body | bytes, headers: Mapping[str, str] | None = None, url: str = "", patience: float = PATIENCE
    ) -> AsyncIterator[Stream]:
        """Begin a request; leaving the block is the client's leaving."""
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        path = CHAT if isinstance(body, dict) and "messages" in body else COMPLETIONS
        told = {"content-type": "application/json"} | dict(headers or {})
        answer = Answer()
        try:
            async with (
                asyncio.timeout(patience),
                self.client.stream("POST", (url or self.url) + path, content=content, headers=told) as response,
            ):
                answer.status, answer.headers = response.status_code, dict(response.headers)
                yield Stream(answer, response.aiter_raw())
        except httpx.HTTPError as error:
            if answer.status:
                raise
            answer.broken = why(error)
            yield Stream(answer, _nothing())
        except TimeoutError:
            if answer.status:
                raise FailedError(f"no end of the answer within {patience:g} s") from None
            answer.broken = f"no answer within {patience:g} s"
            yield Stream(answer, _nothing())

    async def plainly(self, body: Body) -> Answer:
        """Give the plain engine's answer: the right one."""
        clean = {key: value for key, value in body.items() if key != "kv_transfer_params"}
        answer = await self.send(clean, url=self.fleet.plain.url)
        if answer.broken:
            raise FailedError(f"the plain engine does not answer: {answer.broken}")
        return answer

    async def right(
        self, body: Body, headers: Mapping[str, str] | None = None, patience: float = PATIENCE, usage: bool = True
    ) -> Answer:
        """Send a request through the router and compare with the right answer.

        Raises:
            FailedError: it differs.
        """
        answer, expected = await asyncio.gather(self.send(body, headers, patience=patience), self.plainly(body))
        found = difference(answer, expected, usage)
        if found:
            raise FailedError(found)
        return answer

    async def wrong(self, bodies: Sequence[Body], at_once: int = 6, patience: float = PATIENCE) -> list[str]:
        """Send requests, so many at once; give what is wrong with each that is not answered rightly."""
        gate = asyncio.Semaphore(at_once)

        async def one(body: Body) -> str:
            async with gate:
                try:
                    await self.right(body, patience=patience)
                except FailedError as error:
                    return str(error)
            return ""

        return [found for found in await asyncio.gather(*map(one, bodies)) if found]

    async def all_right(self, bodies: Sequence[Body], at_once: int = 6, patience: float = PATIENCE) -> None:
        """Send requests, so many at once.

        Raises:
            FailedError: one is not answered rightly.
        """
        found = await self.wrong(bodies, at_once, patience)
        if found:
            raise FailedError(f"{len(found)} of {len(bodies)} requests failed: {found[0]}")

    async def all_right_until_met(self, engine: Engine, most: int = 48, **fields: Any) -> int:
        """Send distinct requests, all to be answered rightly, until one has met an engine; give how many it took.

        Raises:
            FailedError: one is not answered rightly.
        """
        for sent in range(0, most, 6):
            bodies = [self.completion(stream=bool(number % 2), **fields) for number in range(6)]
            await self.all_right(bodies)
            if engine.alive and await engine.answers() and await engine.requests():
                return sent + 6
        raise FailedError(f"none of {most} distinct requests met {engine.name}: is it not used at all?")

    async def raw(self, content: bytes, seconds: float = 2.0) -> bytes:
        """Send bytes over a connection of their own; give what comes until it closes or the time is over."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        got = b""
        try:
            writer.write(content)
            async with asyncio.timeout(seconds):
                while chunk := await reader.read(65536):
                    got += chunk
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return got

    # --- engines ------------------------------------------------------------------------------------------------

    async def count(self, engines: Iterable[Engine]) -> dict[str, int]:
        """Give how many POST requests reached each engine."""
        return {engine.name: len(await engine.requests()) for engine in engines}

    async def seen(self, engines: Iterable[Engine] | None = None) -> list[dict[str, Any]]:
        """Give the POST requests that reached engines."""
        chosen = self.fleet.engines if engines is None else engines
        return [request for engine in chosen for request in await engine.requests()]

    async def legs(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Give the requests that reached prefill engines, and those that reached decode engines.

        Raises:
            FailedError: none reached either.
        """
        prefill, decode = await self.seen(self.fleet.prefills), await self.seen(self.fleet.decodes)
        if not decode:
            raise FailedError("no request reached a decode engine")
        return prefill, decode

    async def eventually(self, condition: Callable[[], Awaitable[Any]], what: str, seconds: float = 5.0) -> Any:
        """Poll until a condition holds.

        Raises:
            FailedError: it does not in time.
        """
        value = await until(condition, seconds)
        if not value:
            raise FailedError(f"not within {seconds:g} s: {what}")
        return value

    async def tickets(self) -> int:
        """Give how many tickets the prefill engines keep KV for."""
        return sum([(await engine.state())["tickets"] for engine in self.fleet.prefills])

    async def busy(self, engines: Sequence[Engine]) -> list[Engine]:
        """Give the engines that have a request."""
        told = [(engine, await engine.state()) for engine in engines]
        return [engine for engine, state in told if state["running"] or state["waiting"]]

    async def nothing_left(self) -> bool:
        """Whether no engine runs, queues or keeps anything."""
        return all([await engine.idle() for engine in self.fleet.engines])

    async def left(self) -> str:
        """Say what the engines still run, queue or keep."""
        told = []
        for engine in self.fleet.engines:
            state = await engine.state()
            work, pinned = state["running"] + state["waiting"], state["blocks"]["pinned"]
            if work or pinned:
                told.append(f"{engine.role} {engine.name} has {work} requests and {pinned} pinned blocks")
        return "; ".join(told)

    async def all_let_go(self, seconds: float = 5.0) -> None:
        """Wait until the engines have let go of everything.

        Raises:
            FailedError: they have not in time.
        """
        if not await until(self.nothing_left, seconds):
            raise FailedError(f"{seconds:g} s later {await self.left()}")

    async def slow_decodes(self, factor: float = 40.0) -> None:
        """Make tokens come slowly, so that something can happen between them (about 26 ms each)."""
        for engine in self.fleet.decodes:
            await engine.fault("slow", factor=factor)

    async def serving(self) -> Engine:
        """Give the one decode engine that has a request.

        Raises:
            FailedError: none has, or several have.
        """
        found = await self.eventually(lambda: self.busy(self.fleet.decodes), "a decode engine has the request", 3)
        if len(found) != 1:
            raise FailedError(f"{len(found)} decode engines have the one request")
        engine: Engine = found[0]
        return engine

    async def violations(self) -> list[str]:
        """Give the rules of the handoff protocol that were broken."""
        return sorted({entry["rule"] for engine in self.fleet.engines for entry in await engine.violations()})

    async def luck(self) -> str:
        """Say how KV was read that was free to be overwritten or another prompt's; the text was right by luck."""
        for engine in self.fleet.engines:
            for entry in await engine.violations() if await engine.answers() else ():
                freed = entry["rule"] == "ticket_reused" and entry["fields"].get("state") == "collected"
                if freed or entry["rule"] == "ticket_other_prompt":
                    return f"right by luck: decode engine {engine.name} read KV that was given free ({entry['rule']})"
        return ""


async def _nothing() -> AsyncIterator[bytes]:
    for chunk in tuple[bytes, ...]():
        yield chunk
