"""Small engines that note what arrives and answer as told, and a client that sees every byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import uvloop

from pdrouter.app import Router
from pdrouter.settings import Settings

TICKET: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3]],
    "remote_engine_id": "ef0df756-71b4-43da-895b-dc26bd3938f7",
    "remote_request_id": "cmpl-x-0-854fd6c2",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "remote_num_tokens": 548,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
    "a_key_of_a_later_release": {"x": [1.5, None]},
}
USAGE = {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2}


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine on the loop that serves in production."""

    async def limited() -> None:
        async with asyncio.timeout(30):
            await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited())


async def until(condition: Callable[[], Any], what: str, seconds: float = 8.0) -> None:
    """Poll until the condition is true; fail when it never is."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.005)


@dataclass
class Seen:
    """A request that reached a fake engine."""

    method: str
    target: str
    headers: dict[str, str]
    raw: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class Out:
    """A fake engine's way back."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def json(self, body: Any, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        told += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n"
        self.writer.write(f"HTTP/1.1 {status} X\r\n{told}\r\n".encode() + raw)
        await self.writer.drain()

    async def events(self) -> None:
        self.writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.writer.drain()

    async def end(self) -> None:
        await self.chunk(b"")

    def cut(self) -> None:
        self.writer.transport.abort()


Behaviour = Callable[[Seen, Out], Awaitable[None]]


def answer_to(seen: Seen, **fields: Any) -> dict[str, Any]:
    """An answer in vLLM's shape; its text tells the prompt."""
    chat = "/chat/" in seen.target
    n = int(seen.body.get("n") or 1)
    text = f"<{seen.body.get('prompt')}>"
    choices = [
        {"index": i, "finish_reason": "length"}
        | ({"message": {"role": "assistant", "content": text}} if chat else {"text": f"{text}{i}"})
        for i in range(n)
    ]
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{seen.headers.get('x-request-id')}",
        "model": "tiny",
        "choices": choices,
        "usage": USAGE,
        "kv_transfer_params": None,
    } | fields


async def prefill(seen: Seen, out: Out) -> None:
    """Do what a prefill engine does."""
    await out.json(answer_to(seen, kv_transfer_params=TICKET))


def event(seen: Seen, index: int, text: str, **fields: Any) -> bytes:
    """One chunk of a stream."""
    choice = {"index": index, "text": text, "finish_reason": None}
    body = {"id": f"cmpl-{seen.headers['x-request-id']}", "model": "tiny", "choices": [choice]} | fields
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


async def decode(seen: Seen, out: Out) -> None:
    """Do what a decode engine does."""
    if not (seen.raw and seen.body.get("stream") is True):
        await out.json(answer_to(seen) if seen.raw else {"path": seen.target})
        return
    await out.events()
    for i in range(seen.body.get("n") or 1):
        await out.chunk(event(seen, i, f"<{seen.body.get('prompt')}>{i}"))
    usage = (seen.body.get("stream_options") or {}).get("include_usage")
    last = {"choices": [], "usage": USAGE} if usage else {}
    await out.chunk(event(seen, 0, "!", system_fingerprint="f", **last))
    await out.chunk(b"data: [DONE]\n\n")
    await out.end()


class FakeEngine:
    """An engine; `behave` answers generation requests, health and models are always fine unless `healthy` is False.
    One that is `silent` answers nothing at all.

    `version` and `blocks` (of `block_size` tokens) are told where they are set. Requests of the router's own have no
    request id: `released` has those that give a ticket back, `probe` answers its canaries. With a `key`, whoever
    does not tell it is turned away before anything of the request is looked at, as vLLM does with `--api-key`.
    `generated` is what its metrics say of its tokens, where that is set; `counts` what they say besides, by name, and
    `looked_at` how often somebody asked.
    """

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.probe = behave
        self.seen: list[Seen] = []
        self.released: list[Seen] = []
        self.canaries: list[Seen] = []
        self.healthy = True
        self.silent = False
        self.key = ""
        self.generated: int | None = None
        self.counts: dict[str, float] = {}
        self.looked_at = 0
        self.turned_away = 0
        self.models = ["tiny"]
        self.adapters: list[str] = []
        self.version = ""
        self.block_size = self.blocks = self.longest = 0
        self.connections = 0
        self.url = ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, host, port)
        self.url = f"http://{host}:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        seen: Seen | None = None
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in head[1:] if line}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(method, target, headers, raw)
                out = Out(writer)
                if self.silent:
                    await asyncio.sleep(60)
                elif target == "/health":
                    await out.json({}, 200 if self.healthy else 503)
                elif method == "GET" and "x-request-id" not in headers:
                    await self._tell(target, out)
                elif self.key and headers.get("authorization") != f"Bearer {self.key}":
                    self.turned_away += 1
                    await out.json({"error": "Unauthorized"}, 401)
                elif "x-request-id" not in headers and seen.body.get("min_tokens") == 2:
                    # The router's own request, which gives a ticket back: vLLM refuses it and frees the blocks.
                    self.released.append(seen)
                    await out.json({"error": {"message": "min_tokens"}}, 400)
                else:
                    own = "x-request-id" not in headers
                    (self.canaries if own else self.seen).append(seen)
                    behave = self.probe if own else self.behave
                    answer = asyncio.ensure_future(behave(seen, out))  # type: ignore[arg-type]
                    more = asyncio.ensure_future(reader.read(1))
                    await asyncio.wait([answer, more], return_when=asyncio.FIRST_COMPLETED)
                    if more.done() and not answer.done():
                        seen.gone.set()
                        answer.cancel()
                    with suppress(asyncio.CancelledError, ConnectionError):
                        await answer
                    if more.done():
                        return
                    more.cancel()
                    with suppress(asyncio.CancelledError):
                        await more
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _tell(self, target: str, out: Out) -> None:
        """Answer the router's questions what this engine is."""
        if target == "/v1/models":
            own = [{"id": name, "root": f"root-{name}", "parent": None} for name in self.models]
            adapters = [{"id": name, "root": f"/{name}", "parent": self.models[0]} for name in self.adapters]
            limit = {"max_model_len": self.longest} if self.longest else {}
            await out.json({"data": [one | limit for one in own] + adapters})
        elif target == "/version" and self.version:
            await out.json({"version": self.version})
        elif target == "/metrics" and (self.block_size or self.counts or self.generated is not None):
            self.looked_at += 1
            page = "# x\n"
            for name, value in self.counts.items():
                page += f'{name}{{engine="0",model_name="tiny"}} {value}\n'
            if self.block_size:
                told = f'block_size="{self.block_size}",num_gpu_blocks="{self.blocks or 1000}"'
                page += f"vllm:cache_config_info{{{told}}} 1.0\n"
            if self.generated is not None:
                page += f'vllm:generation_tokens_total{{engine="0",model_name="tiny"}} {float(self.generated)}\n'
            await out.json(page.encode())
        else:
            await out.json({"detail": "Not Found"}, 404)

    def hang_up(self) -> None:
        """Close the connections that are open, as an engine does with idle ones."""
        for writer in list(self._writers):
            writer.close()

    async def start_again(self) -> None:
        """Listen again where it did, as a restarted process does."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        await self.start(host, int(port))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        parts = self.body.decode().split("\n\n")
        return [json.loads(part[6:]) for part in parts if part and part != "data: [DONE]"]


async def read_answer(reader: asyncio.StreamReader, method: str = "POST") -> Answer:
    """Read one answer; `complete` is False when the connection ended before it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in head[1:] if line}
    answer = Answer(int(head[0].split(" ")[1]), headers, b"")
    try:
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline() or b"", 16):
                answer.body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        elif method != "HEAD" and answer.status not in (204, 304):
            answer.body = await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        answer.complete = False
    return answer


def wire(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """Encode a request."""
    told = {"host": "router", "content-length": str(len(body))} | (headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


async def ask(port: int, method: str, path: str, body: bytes = b"") -> Answer:
    """Send one request to a port of this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(wire(method, path, body))
        return await read_answer(reader, method)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


_hosts = count(1)


class Bed:
    """A router in this process, its engines, and a client."""

    def __init__(self, prefills: list[FakeEngine], decodes: list[FakeEngine]) -> None:
        self.prefills = prefills
        self.decodes = decodes
        self.router: Router

    @property
    def prefill(self) -> FakeEngine:
        return self.prefills[0]

    @property
    def decode(self) -> FakeEngine:
        return self.decodes[0]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.router.public.port, limit=2**20)

    async def send(self, raw: bytes, method: str = "POST") -> Answer:
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            return await read_answer(reader, method)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.send(wire("POST", path, raw, told))

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.send(wire("GET", path, b"", {n.replace("_", "-"): v for n, v in headers.items()}), "GET")

    async def complete(self, prompt: Any = "hi", **fields: Any) -> Answer:
        return await self.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 8} | fields)

    async def metrics(self) -> str:
        return (await ask(self.router.scraped.port, "GET", "/metrics")).body.decode()

    async def admin(self, method: str, path: str, body: bytes = b"") -> Answer:
        return await ask(self.router.admin.port, method, path, body)

    async def workers(self) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = (await self.admin("GET", "/list_workers")).json["workers"]
        return told


@asynccontextmanager
async def routed(prefills: int = 1, decodes: int = 1, **settings: Any) -> AsyncIterator[Bed]:
    """Start engines and a router in front of them."""
    async with AsyncExitStack() as stack:
        bed = Bed([FakeEngine(prefill) for _ in range(prefills)], [FakeEngine(decode) for _ in range(decodes)])
        for engine in [*bed.prefills, *bed.decodes]:
            await engine.start(f"127.0.1.{next(_hosts) % 250 + 1}")
            stack.push_async_callback(engine.stop)
        told: dict[str, Any] = {
            "host": "127.0.0.1", "port": 0, "prometheus_host": "127.0.0.1", "prometheus_port": 0,
            "admin_port": 0, "drain_timeout_secs": 0.1, "health_interval_secs": 0.1,
        }  # fmt: skip
        bed.router = Router(
            Settings(tuple(one.url for one in bed.prefills), tuple(one.url for one in bed.decodes), **(told | settings))
        )
        await bed.router.start()
        stack.push_async_callback(bed.router.stop)
        await until(
            lambda: all(engine.healthy and engine.models for engine in bed.router.fleet), "all engines are healthy"
        )
        yield bed
