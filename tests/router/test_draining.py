"""A router that ends serves everybody who has reached it, and nobody new."""

import asyncio
import json
import random
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from router.fakes import Bed, Behaviour, Out, Seen, ask, event, read_answer, routed, run, until, wire

REQUEST = wire("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "hi"}).encode())


def connected(bed: Bed) -> socket.socket:
    """Connect without giving the router time to notice."""
    return socket.create_connection(("127.0.0.1", bed.router.public.port), 5)


@pytest.mark.parametrize("secure", [False, True])
def test_who_is_connected_and_not_yet_accepted_is_served(secure: bool, tmp_path: Path) -> None:
    authority = trustme.CA()
    told: dict[str, str] = {}
    if secure:
        leaf = authority.issue_cert("127.0.0.1")
        leaf.private_key_pem.write_to_path(tmp_path / "key")
        leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert")
        told = {"tls_cert_file": str(tmp_path / "cert"), "tls_key_file": str(tmp_path / "key")}

    async def main() -> None:
        async with routed(**told) as bed:
            sockets = [connected(bed) for _ in range(3)]
            draining = asyncio.ensure_future(bed.router.public.drain(10))
            context = None
            if secure:
                context = ssl.create_default_context()
                authority.configure_trust(context)
            for one in sockets:
                one.setblocking(False)
                name = "127.0.0.1" if secure else None
                reader, writer = await asyncio.open_connection(sock=one, ssl=context, server_hostname=name)
                writer.write(REQUEST)
                answer = await read_answer(reader)
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                writer.close()
            assert await draining == 0

    run(main)


def test_who_has_just_connected_may_send_a_request_and_who_kept_an_idle_connection_may_not() -> None:
    async def main() -> None:
        async with routed() as bed:
            port = bed.router.public.port
            kept, keeper = await bed.connect()
            keeper.write(REQUEST)
            assert (await read_answer(kept)).status == 200
            connections = bed.router.public._connections
            await until(lambda: len(bed.router.public.idle), "the answer is over for the router, too")
            ends = bed.router.public.idle._ends
            for one in ends:
                ends[one] -= 5  # it has been idle for some time
            reader, writer = await bed.connect()
            await until(lambda: len(connections) == 2, "both are accepted")
            draining = asyncio.ensure_future(bed.router.public.drain(10))
            assert await kept.read() == b"", "an idle connection is closed"
            with pytest.raises(ConnectionRefusedError):
                await ask(port, "GET", "/health")
            writer.write(REQUEST)
            answer = await read_answer(reader)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await draining == 0
            writer.close()
            keeper.close()

    run(main)


def test_clients_that_send_one_request_after_another_lose_none_when_the_router_ends() -> None:
    """However long they have been connected; who is told that an answer is the last one sends no more."""
    lost: list[str] = []

    async def client(bed: Bed, number: int, last: asyncio.Event) -> int:
        reader, writer = await bed.connect()
        draw, answered = random.Random(number), 0
        while True:
            await asyncio.sleep(draw.uniform(0, 0.02))
            try:
                writer.write(REQUEST)
                answer = await read_answer(reader)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                lost.append(f"client {number}, request {answered}: {error!r}")
                break
            assert (answer.status, answer.complete) == (200, True)
            answered += 1
            if answer.headers.get("connection") == "close":
                assert last.is_set()
                break
        writer.close()
        return answered

    async def main() -> None:
        async with routed() as bed:
            last = asyncio.Event()
            clients = [asyncio.ensure_future(client(bed, number, last)) for number in range(40)]
            await asyncio.sleep(1.2)  # so long that none has just connected
            last.set()
            assert await bed.router.public.drain(10) == 0
            assert min(await asyncio.gather(*clients)) > 1
            assert lost == []

    run(main)


def in_two_pieces(over: asyncio.Event) -> Behaviour:
    """Stream the first piece at once and the rest when told."""

    async def slow(seen: Seen, out: Out) -> None:
        await out.events()
        await out.chunk(event(seen, 0, "a"))
        await over.wait()
        await out.chunk(event(seen, 0, "b") + b"data: [DONE]\n\n")
        await out.end()

    return slow


def test_a_connection_that_was_promised_to_stay_has_a_second_for_its_next_request() -> None:
    over = asyncio.Event()
    slow = in_two_pieces(over)

    async def main() -> None:
        async with routed() as bed:
            behave, bed.decode.behave = bed.decode.behave, slow
            reader, writer = await bed.connect()
            writer.write(wire("POST", "/v1/completions", b'{"model": "tiny", "prompt": "hi", "stream": true}'))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection: close" not in head
            draining = asyncio.ensure_future(bed.router.public.drain(6))
            await asyncio.sleep(0.8)
            over.set()
            await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
            bed.decode.behave = behave
            await asyncio.sleep(0.5)  # the router has been ending for longer than a second, the client has waited less
            writer.write(REQUEST)
            answer = await read_answer(reader)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await draining == 0
            writer.close()

    run(main)


def test_who_connected_and_sends_nothing_holds_a_router_up_for_a_second_only() -> None:
    async def main() -> None:
        async with routed() as bed:
            reader, writer = await bed.connect()
            await until(lambda: bed.router.public._connections, "it is accepted")
            assert await bed.router.public.drain(20) == 0, "closed, not cut"
            assert await reader.read() == b""
            writer.close()

    run(main)


def test_a_connection_whose_answer_was_under_way_holds_a_router_up_for_a_second_only() -> None:
    over = asyncio.Event()
    slow = in_two_pieces(over)

    async def main() -> None:
        async with routed() as bed:
            bed.decodes[0].behave = slow
            reader, writer = await bed.connect()
            writer.write(wire("POST", "/v1/completions", b'{"model": "tiny", "prompt": "hi", "stream": true}'))
            await reader.readuntil(b'"a"')
            draining = asyncio.ensure_future(bed.router.public.drain(6))
            await asyncio.sleep(1.1)  # longer than those wait who have just connected
            over.set()
            rest = await reader.read()
            assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "the answer is whole, then the router closes"
            assert await draining == 0
            writer.close()

    run(main)
