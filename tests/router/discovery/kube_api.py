"""The part of a Kubernetes API that serves EndpointSlices, on loopback; a test changes objects and breaks things."""

import asyncio
import json
import ssl
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pdrouter.discovery.kubernetes import Account

NAMESPACE = "serving"
PATH = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"


def endpoint(address: str, pod: str | None = None, uid: str | None = None, **conditions: bool | None) -> dict[str, Any]:
    """Make an endpoint as the EndpointSlice controller does."""
    conditions = {"ready": True, "serving": True, "terminating": False} | conditions
    made: dict[str, Any] = {"addresses": [address], "conditions": conditions, "nodeName": "node-0"}
    if pod is not None:
        made["targetRef"] = {"kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": uid or f"uid-of-{pod}"}
    return made


def slice_of(
    name: str, *endpoints: Any, ports: Any = (("http", 8000),), family="IPv4", **labels: str
) -> dict[str, Any]:
    """Make a slice; its labels are `role` and `service`."""
    known = {"role": "llm-d.ai/role", "service": "kubernetes.io/service-name"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {known[key]: of for key, of in labels.items()}},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": None if ports is None else [{"name": name, "port": port, "protocol": "TCP"} for name, port in ports],
    }


@dataclass
class Asked:
    """A request that arrived."""

    at: float
    query: dict[str, str]
    token: str

    @property
    def watch(self) -> bool:
        return self.query.get("watch") == "true"


@dataclass
class KubeApi:
    """Objects with versions, their history, and the watches that follow it."""

    url: str = ""
    token: str = "first-token"
    version: int = 100
    refuse: tuple[int, dict[str, Any], dict[str, str]] | None = None
    refuse_watch: tuple[int, dict[str, Any], dict[str, str]] | None = None
    gone_within_watch: bool = True
    ignores_requests: bool = False
    asked: list[Asked] = field(default_factory=list)
    _slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    _history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    _compacted: int = 0
    _watches: dict[asyncio.StreamWriter, str] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def lists(self) -> list[Asked]:
        return [one for one in self.asked if not one.watch]

    @property
    def watches(self) -> list[Asked]:
        return [one for one in self.asked if one.watch]

    @property
    def watching(self) -> int:
        return len(self._watches)

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 8.0) -> None:
        """Wait for requests and ends of watches until the condition holds."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {what}; asked: {self.asked}") from None

    async def until_watched(self) -> None:
        await self.until(lambda: self.watching > 0, "a watch")

    def put(self, one: dict[str, Any]) -> None:
        self.version += 1
        name = one["metadata"]["name"]
        kind = "MODIFIED" if name in self._slices else "ADDED"
        one["metadata"]["resourceVersion"] = str(self.version)
        self._slices[name] = one
        self._tell({"type": kind, "object": one})

    def delete(self, name: str) -> None:
        self.version += 1
        one = self._slices.pop(name)
        one["metadata"]["resourceVersion"] = str(self.version)
        self._tell({"type": "DELETED", "object": one})

    def forget(self, name: str) -> None:
        """Delete an object whose event nobody will ever see."""
        self.version += 1
        del self._slices[name]

    def compact(self) -> None:
        """Lose the history."""
        self.version += 1
        self._compacted = self.version
        self._history.clear()

    def bookmark(self) -> None:
        self.version += 10
        meta = {"resourceVersion": str(self.version), "creationTimestamp": None}
        self.send({"type": "BOOKMARK", "object": {"kind": "EndpointSlice", "metadata": meta}})

    def error(self, code: int, message: str = "an error") -> None:
        self.send({"type": "ERROR", "object": {"kind": "Status", "code": code, "message": message}})

    def send(self, event: Any) -> None:
        self.send_raw(json.dumps(event, ensure_ascii=False).encode() + b"\n")

    def send_raw(self, data: bytes) -> None:
        for writer in self._watches:
            _chunk(writer, data)

    def end(self) -> None:
        """End the watches as the API does at their time limit."""
        for writer in list(self._watches):
            writer.write(b"0\r\n\r\n")
            self._over(writer)

    def cut(self) -> None:
        """Break the connections of the watches."""
        for writer in list(self._watches):
            writer.transport.abort()
            self._over(writer)

    def _over(self, writer: asyncio.StreamWriter) -> None:
        self._watches.pop(writer, None)
        self._changed.set()

    def _tell(self, event: dict[str, Any]) -> None:
        event = json.loads(json.dumps(event))
        self._history.append((self.version, event))
        for writer, selector in self._watches.items():
            if _matches(event["object"], selector):
                _chunk(writer, json.dumps(event).encode() + b"\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self._answer(head.decode(), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._over(writer)
            writer.close()

    def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        first, *rest = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        target = urlsplit(first.split()[1])
        query = dict(parse_qsl(target.query))
        token = headers.get("authorization", "").removeprefix("Bearer ")
        asked = Asked(asyncio.get_running_loop().time(), query, token)
        self.asked.append(asked)
        self._changed.set()
        if self.ignores_requests:
            return
        refusal = self.refuse or (self.refuse_watch if asked.watch else None)
        if token != self.token:
            refusal = (401, {"message": "Unauthorized"}, {})
        elif target.path != PATH:
            refusal = (404, {"message": "the server could not find the requested resource"}, {})
        if refusal is not None:
            _whole(writer, *refusal)
        elif asked.watch:
            self._watch(writer, query)
        else:
            items = [one for one in self._slices.values() if _matches(one, query.get("labelSelector", ""))]
            meta = {"resourceVersion": str(self.version)}
            _whole(writer, 200, {"kind": "EndpointSliceList", "metadata": meta, "items": items or None}, {})

    def _watch(self, writer: asyncio.StreamWriter, query: dict[str, str]) -> None:
        since, selector = int(query["resourceVersion"]), query.get("labelSelector", "")
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {since}"}
        if since < self._compacted and not self.gone_within_watch:
            _whole(writer, 410, status, {})
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        if since < self._compacted:
            _chunk(writer, json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            writer.write(b"0\r\n\r\n")
            return
        for version, event in self._history:
            if version > since and _matches(event["object"], selector):
                _chunk(writer, json.dumps(event).encode() + b"\n")
        self._watches[writer] = selector
        self._changed.set()


def _matches(one: dict[str, Any], selector: str) -> bool:
    wanted = dict(part.split("=") for part in selector.split(",") if part)
    return wanted.items() <= one["metadata"]["labels"].items()


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def _whole(writer: asyncio.StreamWriter, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    raw = json.dumps(body).encode()
    told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{told}content-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)


@asynccontextmanager
async def kube_api(tls: ssl.SSLContext | None = None):
    api = KubeApi()
    listener = await asyncio.start_server(api.serve, "127.0.0.1", 0, ssl=tls)
    scheme = "http" if tls is None else "https"
    api.url = f"{scheme}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield api
    finally:
        listener.close()
        api.cut()
        await listener.wait_closed()


def account(api: KubeApi, folder: Path, ca_file: Path | None = None) -> Account:
    token = folder / "token"
    token.write_text(api.token + "\n")
    return Account(api.url, NAMESPACE, token, ca_file)
