"""One client process's share of a workload: a closed loop, an open one, conversations."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import orjson

from pdctl.bench.client import Answer, Connection, Record
from pdctl.bench.workload import Request, Workload

LAG_INTERVAL = 0.05
PATH = "/v1/completions"


@dataclass(slots=True)
class Share:
    """What one of several client processes sends.

    Args:
        url: base URL of the server.
        model: served model name.
        workload: the whole of it.
        requests: this process's part.
        concurrency: its part of the requests (conversations) at once.
    """

    url: str
    model: str
    workload: Workload
    requests: list[Request]
    concurrency: int | None

    def body(self, prompt: str | list[int], output_tokens: int) -> bytes:
        """Give the body of one request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "temperature": 0.0,
            "max_tokens": output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        if self.workload.data == "conversations" and self.workload.spelling == "ids":
            fields["return_token_ids"] = True  # the next turn repeats the answer token by token
        return orjson.dumps(fields)


def share_of(workload: Workload, requests: list[Request], number: int, processes: int) -> list[Request]:
    """Give the requests of one of several client processes; a conversation stays in one."""
    whole = workload.data == "conversations"
    return [one for one in requests if ((one.conversation if whole else one.number) or 0) % processes == number]


@dataclass(slots=True)
class Strain:
    """How hard the client itself had to work; what it measured includes that.

    Args:
        lags: how late its event loop was, seconds, every 50 ms.
        late: how late requests of an open loop were sent that did not have to wait for room, seconds.
        cpu_seconds: processor time of the process.
        seconds: length of the run.
    """

    lags: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class Load:
    """Sends a share; `records` fills while it goes on."""

    share: Share
    on_done: Callable[[Record], None]
    begin: float = 0.0
    strain: Strain = field(default_factory=Strain)
    _idle: list[Connection] = field(default_factory=list)

    async def run(self) -> None:
        """Send everything; `begin` (perf_counter) says when the run begins, and may lie ahead."""
        lag = asyncio.ensure_future(self._watch_lag())
        if (ahead := self.begin - perf_counter()) > 0:
            await asyncio.sleep(ahead)
        cpu = process_time()
        try:
            await (self._open() if self.share.workload.open_loop else self._closed())
        finally:
            self.strain.cpu_seconds = process_time() - cpu
            self.strain.seconds = perf_counter() - self.begin
            lag.cancel()
            for connection in self._idle:
                connection.close()

    async def warm_up(self, requests: list[Request]) -> None:
        """Send requests that are not counted, all at once."""
        async with asyncio.TaskGroup() as group:
            for one in requests:
                group.create_task(self._post(self.share.body(one.prompt, one.output_tokens)))

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self.strain.lags.append(loop.time() - due)

    @asynccontextmanager
    async def _connection(self) -> Any:
        connection = self._idle.pop() if self._idle else Connection(self.share.url, PATH)
        try:
            yield connection
        finally:
            self._idle.append(connection)

    async def _post(self, body: bytes, **how: Any) -> Record:
        async with self._connection() as connection:
            record: Record = await connection.post(body, **how)
            return record

    def _talks(self) -> list[list[Request]]:
        """Group requests that follow one another: the turns of a conversation, else each by itself."""
        grouped: dict[int, list[Request]] = defaultdict(list)
        for one in self.share.requests:
            grouped[one.number if one.conversation is None else one.conversation].append(one)
        return list(grouped.values())

    async def _closed(self) -> None:
        # bodies are written before, so that nothing delays a request that follows another
        left: Iterator[tuple[list[Request], bytes]] = iter(
            [(talk, self.share.body(talk[0].prompt, talk[0].output_tokens)) for talk in self._talks()]
        )

        async def client() -> None:
            for talk, body in left:
                await self._talk(talk, body, self.begin)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.share.concurrency or len(self.share.requests), len(self.share.requests))):
                group.create_task(client())

    async def _open(self) -> None:
        slots: AbstractAsyncContextManager[Any] = (
            asyncio.Semaphore(self.share.concurrency) if self.share.concurrency else nullcontext()
        )
        talks = [(talk, self.share.body(talk[0].prompt, talk[0].output_tokens)) for talk in self._talks()]

        async def one(talk: list[Request], body: bytes, due: float) -> None:
            async with slots:
                await self._talk(talk, body, due)

        async with asyncio.TaskGroup() as group:
            for talk, body in talks:
                due = self.begin + (talk[0].due or 0.0)
                if (ahead := due - perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                if not isinstance(slots, asyncio.Semaphore) or not slots.locked():
                    self.strain.late.append(max(0.0, perf_counter() - due))
                group.create_task(one(talk, body, due))

    async def _talk(self, talk: list[Request], body: bytes, due: float) -> None:
        """Send the turns one after the other; each repeats all before it, answers included."""
        several = len(talk) > 1
        spoken = talk[0].prompt
        for one in talk:
            if one.turn:
                await asyncio.sleep(self.share.workload.think_seconds)
                due = perf_counter()
                body = self.share.body(spoken, one.output_tokens)
            answer = Answer() if several else None
            session = None if one.conversation is None else f"conversation-{one.conversation}"
            record = await self._post(body, abort_after=one.abort_after, session=session, answer=answer)
            record.number, record.conversation, record.turn = one.number, one.conversation, one.turn
            record.queued = max(0.0, record.start - due)
            self.on_done(record)
            if answer is not None and (following := one.turn + 1) < len(talk):
                spoken = _went_on(spoken, answer, talk[following].prompt)


def _went_on(spoken: str | list[int], answer: Answer, added: str | list[int]) -> str | list[int]:
    if isinstance(spoken, str):
        return spoken + "".join(answer.texts) + str(added)
    return [*spoken, *answer.ids, *(token for token in added if isinstance(token, int))]
