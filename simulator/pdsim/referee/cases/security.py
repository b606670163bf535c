"""Clients that mean harm."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import orjson

from pdsim.referee.bench import Bench
from pdsim.referee.case import FailedError, Group

security = Group("security")
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@contextlib.asynccontextmanager
async def _trap() -> AsyncIterator[tuple[int, list[bytes]]]:
    """Listen where nobody has any business; give the port and what came."""
    caught: list[bytes] = []

    async def catch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            caught.append(b"")
            caught[-1] = await asyncio.wait_for(reader.read(200), 0.5)
        writer.close()

    server = await asyncio.start_server(catch, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], caught
    finally:
        server.close()
        await server.wait_closed()


def _request(body: bytes, *lines: str) -> bytes:
    head = HEAD + "".join(f"{one}\r\n" for one in lines)
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def _smuggled(bench: Bench, marker: str) -> bool:
    """Whether a request that was hidden in another one's body has reached an engine."""
    for request in await bench.seen():
        with contextlib.suppress(ValueError):
            if json.loads(request["body"]).get("prompt") == marker:
                return True
    return False


@security.case()
async def length_and_chunks(bench: Bench) -> str:
    """A request with both Content-Length and Transfer-Encoding smuggles no second one past the router."""
    marker = bench.prompt(8)
    hidden = _request(orjson.dumps(bench.completion(marker)))
    body = b"0\r\n\r\n" + hidden
    got = await bench.raw(_request(body, "transfer-encoding: chunked"))
    if await _smuggled(bench, marker):
        raise FailedError("the hidden request reached an engine")
    await bench.right(bench.completion())
    return f"answered {got[:12].decode(errors='replace')!r}, the hidden request reached nobody"


@security.case()
async def ambiguous_lengths(bench: Bench) -> str:
    """Lengths that two parsers may read differently are refused, and smuggle nothing."""
    marker = bench.prompt(8)
    hidden = _request(orjson.dumps(bench.completion(marker)))
    body = orjson.dumps(bench.completion(bench.prompt(8)))
    forms = {
        "two different lengths": f"{HEAD}content-length: {len(body)}\r\ncontent-length: {len(body + hidden)}\r\n\r\n",
        "a signed length": f"{HEAD}content-length: +{len(body)}\r\n\r\n",
        "a space before the colon": f"{HEAD}transfer-encoding : chunked\r\ncontent-length: {len(body)}\r\n\r\n",
        "an unknown coding": f"{HEAD}transfer-encoding: xchunked\r\ncontent-length: {len(body)}\r\n\r\n",
    }
    for name, head in forms.items():
        got = await bench.raw(head.encode() + body + hidden, 1.5)
        if await _smuggled(bench, marker):
            raise FailedError(f"with {name} the hidden request reached an engine")
        if got.startswith(b"HTTP/1.1 2"):
            raise FailedError(f"with {name} the request was served")
    return f"{len(forms)} of {len(forms)} refused"


@security.case()
async def header_injection(bench: Bench) -> str:
    """A header value with a bare CR or a folded line puts no header of its own into engines' requests or answers."""
    body = orjson.dumps(bench.completion(bench.prompt(8)))
    for value in ("a\rx-injected: yes", "a\r\n x-injected: yes", "a\0x-injected: yes", "a%0d%0ax-injected: yes"):
        got = await bench.raw(_request(body, f"x-request-id: {value}", "connection: close"))
        head = got.partition(b"\r\n\r\n")[0].lower()
        if any(row.startswith(b"x-injected:") for row in head.splitlines()):
            raise FailedError("the header is in the answer")
    for request in await bench.seen():
        if any(name.lower() == "x-injected" for name, _ in request["headers"]):
            raise FailedError("the header reached an engine")
    await bench.right(bench.completion())
    return "4 forms, none put a header anywhere"


@security.case()
async def ticket_to_elsewhere(bench: Bench) -> str:
    """A client's `kv_transfer_params` make no engine connect to an address of the client's choice."""
    async with _trap() as (port, caught):
        forged = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "x", "remote_request_id": "x",
            "remote_block_ids": [[*range(1, 9)]], "remote_host": "127.0.0.1", "remote_port": port, "tp_size": 1,
        }  # fmt: skip
        await bench.send(bench.completion(kv_transfer_params=forged), patience=5)
        await bench.send(bench.completion(kv_transfer_params=forged, echo=True, logprobs=1), patience=5)
        if caught:
            raise FailedError("an engine connected to the address that the client gave")
    return "nobody connected"


@security.case()
async def target_elsewhere(bench: Bench) -> str:
    """An absolute target, a foreign Host or a routing header makes the router connect to no address of the client's."""
    body = orjson.dumps(bench.completion(bench.prompt(8)))
    async with _trap() as (port, caught):
        there = f"127.0.0.1:{port}"
        head = HEAD.replace("POST /v1", f"POST http://{there}/v1").replace("host: x", f"host: {there}")
        await bench.raw(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body, 1.5)
        await bench.raw(f"CONNECT {there} HTTP/1.1\r\nhost: {there}\r\n\r\n".encode(), 0.5)
        names = ("x-prefiller-host-port", "x-prefiller-url", "x-decoder-host-port", "x-worker-url", "x-forwarded-host")
        headers = dict.fromkeys(names, there)
        await bench.send(body, headers, patience=5)
        if caught:
            raise FailedError(f"the router connected to {there}")
    await bench.right(bench.completion())
    return "nobody connected"


@security.case()
async def oversize_body(bench: Bench) -> str:
    """A body that is announced as 1 TiB is refused with 413 before it is sent."""
    head = f"{HEAD}content-length: {1 << 40}\r\n\r\n".encode()
    got = await bench.raw(head + b'{"model": "' + b"x" * 65536, 3)
    if not got.startswith(b"HTTP/1.1 413"):
        raise FailedError(f"answered {got[:40]!r}" if got else "it waits for the body")
    await bench.right(bench.completion())
    return "413"


@security.case()
async def slow_loris(bench: Bench) -> str:
    """300 clients that never end their request head keep nobody else from being served."""
    parts = urlsplit(bench.url)
    slow = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(300)]
    try:
        for number, (_, writer) in enumerate(slow):
            writer.write((HEAD if number % 2 else f"{HEAD}content-length: 900\r\n\r\n{{").encode())
        await bench.all_right([bench.completion() for _ in range(6)], patience=5)
    finally:
        for _, writer in slow:
            writer.close()
    return "6 of 6 requests right beside 300 slow clients"


@security.case()
async def deep_json(bench: Bench) -> str:
    """JSON nested 100,000 deep is answered with an error of the client's, and all goes on."""
    depth = 100_000
    body = b'{"model": "tiny", "prompt": "a", "x": ' + b"[" * depth + b"]" * depth + b"}"
    answer = await bench.send(body, patience=5)
    if not all(engine.alive for engine in bench.fleet.engines):
        raise FailedError("an engine died of it")
    if not 400 <= answer.status < 500:
        raise FailedError(answer.failure or "it was served")
    await bench.right(bench.completion())
    return f"status {answer.status}, served on"


@security.case()
async def control_paths(bench: Bench) -> str:
    """Engine paths that are not for clients are not passed on: cache reset, sleep, weight updates, remote calls."""
    paths = ("/reset_prefix_cache", "/sleep", "/wake_up", "/collective_rpc", "/update_weights", "/abort_requests")
    for path in paths:
        await bench.client.post(bench.url + path, json={}, timeout=5)
    reached = sorted({request["path"] for request in await bench.seen()})
    if reached:
        raise FailedError(f"reached an engine: {', '.join(reached)}")
    return f"{len(paths)} of {len(paths)} reached no engine"
