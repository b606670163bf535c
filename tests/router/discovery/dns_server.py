"""A DNS server on loopback, UDP and TCP, whose answers a test changes while it runs."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

_SMALL = 512  # bytes of an answer by UDP without EDNS


@dataclass
class DnsServer:
    """Answers from `records`, or with `failure`, or not at all while `silent`."""

    port: int = 0
    records: dict[tuple[str, str], tuple[int, list[str]]] = field(default_factory=dict)
    beside: list[tuple[str, int, str, str]] = field(default_factory=list)
    failure: dns.rcode.Rcode | None = None
    silent: bool = False
    asked: list[tuple[float, str, str]] = field(default_factory=list)
    by_tcp: int = 0
    _heard: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, name: str, kind: str, ttl: int, *data: str) -> None:
        self.records[name, kind] = (ttl, list(data))

    def resolver(self) -> dns.asyncresolver.Resolver:
        one = dns.asyncresolver.Resolver(configure=False)
        one.nameservers = ["127.0.0.1"]
        one.port = self.port
        one.timeout = 0.2
        return one

    def times(self, name: str, kind: str) -> list[float]:
        return [at for at, asked, of in self.asked if (asked, of) == (name, kind)]

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 8.0) -> None:
        """Wait for questions until the condition holds."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {what}; asked: {self.asked}") from None

    def answer(self, wire: bytes) -> bytes | None:
        question = dns.message.from_wire(wire)
        name = question.question[0].name.to_text().rstrip(".")
        kind = dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked.append((asyncio.get_running_loop().time(), name, kind))
        self._heard.set()
        if self.silent:
            return None
        reply = dns.message.make_response(question)
        reply.flags |= dns.flags.RA
        known = {of for of, _ in self.records}
        if self.failure is not None:
            reply.set_rcode(self.failure)
        elif (name, kind) in self.records:
            ttl, data = self.records[name, kind]
            reply.answer.append(dns.rrset.from_text(name + ".", ttl, "IN", kind, *data))
            for host, seconds, of, address in self.beside:
                reply.additional.append(dns.rrset.from_text(host + ".", seconds, "IN", of, address))
        elif name not in known:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply.to_wire()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        reply = self._server.answer(data)
        if reply is None:
            return
        if len(reply) > _SMALL:
            short = dns.message.make_response(dns.message.from_wire(data))
            short.flags |= dns.flags.TC
            reply = short.to_wire()
        self._transport.sendto(reply, address)


@asynccontextmanager
async def dns_server():
    server = DnsServer()

    async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2))
        server.by_tcp += 1
        reply = server.answer(await reader.readexactly(size))
        if reply is not None:
            writer.write(len(reply).to_bytes(2) + reply)
        writer.close()
        await writer.wait_closed()

    listener = await asyncio.start_server(tcp, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", server.port))
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Udp(server), sock=udp)
    try:
        yield server
    finally:
        transport.close()
        listener.close()
        await listener.wait_closed()
