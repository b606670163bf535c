"""What each path does."""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable
from math import inf

import orjson

from pdrouter.handoff.alone import Alone
from pdrouter.handoff.batch import Batch, Part, PartPair
from pdrouter.handoff.delivery import Delivery
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import JSON_HEADERS
from pdrouter.handoff.pair import Pair
from pdrouter.handoff.relay import Relay
from pdrouter.handoff.way import Way
from pdrouter.observe.record import Record
from pdrouter.observe.traces import CONTEXT
from pdrouter.openai.asked import CHAT, COMPLETIONS, Asked, passed, read
from pdrouter.openai.batch import part_body, repeated
from pdrouter.openai.errors import RequestError, error_body
from pdrouter.openai.features import Prompt
from pdrouter.openai.legs import encoded
from pdrouter.openai.routing_key import KeySources, bytes_key
from pdrouter.policies import RoutingKey
from pdrouter.server.headers import budget, forwarded, request_id
from pdrouter.server.request import ClientRequest
from pdrouter.settings import Settings

GENERATIONS = frozenset((COMPLETIONS, CHAT))
_PASSED = frozenset(("/tokenize", "/detokenize", "/tokenizer_info", "/version"))
# An engine decodes `%2e` and the like, so what is no plain path could be another path there than it is here.
_PLAIN = re.compile(r"/v1(?:/[A-Za-z0-9_~:@=+,-][A-Za-z0-9._~:@=+,-]*)+")
# These change one engine, and let it fetch what a client names.
_NOT_PASSED = frozenset(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"))
_NO_KEY = "The API key is missing or wrong; send it as Authorization: Bearer KEY."
# Paths that may be labels of metrics; any other would let clients grow the metrics page.
_LABELS = GENERATIONS | _PASSED | {"/v1/models", "/v1/embeddings", "/v1/responses", "/v1/messages"}
_JSON_LINE = b"content-type: application/json\r\n"
_METRICS_HEADERS = b"content-type: text/plain; version=1.0.0; charset=utf-8\r\n"


class Routes:
    """Serves the public port."""

    def __init__(self, desk: Desk, settings: Settings, draining: Callable[[], bool]) -> None:
        self._desk = desk
        self._credential = f"Bearer {settings.api_key}".encode() if settings.api_key else None
        self._max_prompts = settings.max_prompts
        self._max_payload = settings.max_payload_size
        self._keys = KeySources(settings.session_header)
        self._draining = draining
        self._own = {"/health": self._health, "/ready": self._ready}

    def handle(self, request: ClientRequest) -> None:
        """Serve a request."""
        target = request.target.decode("latin-1")
        path = target if target in GENERATIONS else target.partition("?")[0]
        own = self._own.get(path)
        if own is not None:
            if self._method(request, path, "GET"):
                own(request)
        elif path in GENERATIONS:
            if self._method(request, path, "POST") and self._admitted(request, path):
                self._generate(request, path)
        elif path in _PASSED or (path not in _NOT_PASSED and _PLAIN.fullmatch(path)):
            if self._method(request, path, "GET", "POST") and self._admitted(request, path):
                self._pass_on(request, path)
        else:
            self._refuse(request, "other", 404, "not_found", f"There is no {path[:200]} here.")

    def _label(self, path: str) -> str:
        return path if path in _LABELS or path in self._own else "other"

    def _method(self, request: ClientRequest, path: str, *known: str) -> bool:
        method = request.method.decode("latin-1")
        if method in known or (method == "HEAD" and "GET" in known):
            return True
        allow = f"allow: {', '.join((*known, 'HEAD') if 'GET' in known else known)}, OPTIONS\r\n".encode()
        if method == "OPTIONS":
            request.respond(204, b"", allow)
        else:
            message = f"{path[:200]} answers {' and '.join(known)}, not {method}."
            self._refuse(request, self._label(path), 405, "method", message, allow)
        return False

    def _allowed(self, request: ClientRequest) -> bool:
        if self._credential is None:
            return True
        return hmac.compare_digest(request.header(b"authorization") or b"", self._credential)

    def _admitted(self, request: ClientRequest, path: str) -> bool:
        label = self._label(path)
        if not self._allowed(request):
            self._refuse(request, label, 401, "api_key", _NO_KEY, b"www-authenticate: Bearer\r\n")
            return False
        encoding = request.header(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            self._refuse(request, label, 415, "encoding", "The router takes bodies without content-encoding.")
            return False
        return True

    def _refuse(
        self, request: ClientRequest, label: str, status: int, reason: str, message: str, headers: bytes = b""
    ) -> None:
        record = Record(request_id(request.header(b"x-request-id")), label, "refused")
        record.status = status
        record.error("router", reason)
        request.respond(status, error_body(status, message), JSON_HEADERS + headers)
        self._desk.observer.finished(record)

    def unwelcome(self, request: ClientRequest) -> tuple[int, str] | None:
        """Turn away who has no API key before a larger body is read."""
        return None if self._allowed(request) else (401, _NO_KEY)

    def refused(self, status: int) -> None:
        """Record a request that was refused before it was complete: too large, or no HTTP."""
        record = Record("-", "other", "refused")
        record.status = status
        record.error("router", f"status_{status}")
        self._desk.observer.finished(record)

    # generation

    def _generate(self, request: ClientRequest, path: str) -> None:
        raw = request.body
        try:
            asked = read(path, raw, self._max_prompts)
        except RequestError as error:
            self._refuse(request, path, error.status, error.reason, error.message)
            return
        if asked.prompts is not None and repeated(asked.body) > self._max_payload:
            message = f"What is beside the prompts would go on {len(asked.prompts)} times; send them one by one."
            self._refuse(request, path, 413, "prompts", message)
            return
        record = Record(request_id(request.header(b"x-request-id")), path, generation=True)
        told = self._told(request, record) + _JSON_LINE
        if asked.alone is not None:
            self._generate_alone(request, asked, record, told)
        elif asked.prompts is not None:
            self._generate_batch(request, asked, asked.prompts, record, told)
        else:
            desk = self._desk
            key = self._keys.routing_key(request.headers, asked.body, raw)
            record.reason = desk.pair_reason(key)
            relay = Relay(desk, request, record)
            way = Way(b"POST", request.target, told, record.request_id, record.span)
            deadline = self._deadline(request, relay)
            prompt = Prompt(key, asked.body)
            if desk.observer.recorder is not None:
                record.asked = prompt
            relay.begin(Pair(desk, way, path, asked.body, asked.bare, prompt, record, relay, deadline))

    def _deadline(self, request: ClientRequest, delivery: Delivery) -> float:
        """Note how long the client wants to wait; give the loop time at which that is over."""
        most = self._desk.deadlines.seconds
        delivery.budget = budget(request.header(b"x-request-timeout"), most)
        return self._desk.loop.time() + (delivery.budget or most)

    def _told(self, request: ClientRequest, record: Record) -> bytes:
        """Encode the client's headers that go on; when there are traces, each leg adds a trace context of its own."""
        traces = self._desk.traces
        if traces is None:
            return forwarded(request.headers)
        record.span = traces.request(request.method.decode(), record.path, request.headers)
        return forwarded(header for header in request.headers if header[0] not in CONTEXT)

    def _generate_alone(self, request: ClientRequest, asked: Asked, record: Record, told: bytes) -> None:
        desk = self._desk
        key = self._keys.routing_key(request.headers, asked.body, request.body)
        record.reason = f"single_engine:{asked.alone}"
        relay = Relay(desk, request, record)
        way = Way(b"POST", request.target, told, record.request_id, record.span)
        deadline = self._deadline(request, relay)
        relay.begin(Alone(desk, way, asked.bare, Prompt(key, asked.body), record, relay, asked.stream, deadline))

    def _generate_batch(
        self, request: ClientRequest, asked: Asked, prompts: list[object], record: Record, told: bytes
    ) -> None:
        desk = self._desk
        whole = self._keys.header_key(request.headers)
        deadline = desk.loop.time() + (budget(request.header(b"x-request-timeout"), desk.deadlines.seconds) or inf)

        def make(number: int, part: Part) -> PartPair:
            body = part_body(asked.body, prompts[number])
            bare = encoded(body)
            key = whole or self._keys.routing_key((), body, bare)
            if number == 0:
                record.reason = f"{desk.pair_reason(key)}:batch_of_{len(prompts)}"
            way = Way(b"POST", request.target, told, f"{record.request_id}-{number}", record.span)
            return PartPair(desk, way, COMPLETIONS, body, bare, Prompt(key, body), record, part, deadline)

        batch = Batch(desk, request, record, len(prompts), asked.stream, make)
        batch.budget = budget(request.header(b"x-request-timeout"), desk.deadlines.seconds)
        batch.run()

    # everything else

    def _pass_on(self, request: ClientRequest, path: str) -> None:
        desk = self._desk
        try:
            body = passed(request.header(b"content-type") or b"", request.body)
        except RequestError as error:
            self._refuse(request, self._label(path), error.status, error.reason, error.message)
            return
        record = Record(request_id(request.header(b"x-request-id")), self._label(path), "single_engine:path")
        told = self._told(request, record)
        for name in (b"content-type", b"accept"):
            value = request.header(name)
            if value is not None:
                told += b"%b: %b\r\n" % (name, value)
        key = self._keys.header_key(request.headers) or self._path_key(request)
        relay = Relay(desk, request, record)
        method = b"GET" if request.method == b"HEAD" else request.method
        way = Way(method, request.target, told, record.request_id, record.span)
        deadline = self._deadline(request, relay)
        relay.begin(Alone(desk, way, body, Prompt(key, {}), record, relay, False, deadline))

    @staticmethod
    def _path_key(request: ClientRequest) -> RoutingKey:
        return bytes_key(request.body or request.target)

    # the router's own paths

    def _health(self, request: ClientRequest) -> None:
        request.respond(200, b'{"status":"ok"}', JSON_HEADERS)

    def _ready(self, request: ClientRequest) -> None:
        fleet = self._desk.fleet
        ready = fleet.ready() and not self._draining()
        state: dict[str, object] = {"status": "ready" if ready else "not_ready"}
        for role, engines in fleet.engines.items():
            state[role.value] = {"healthy": len(fleet.healthy(role)), "total": len(engines)}
        request.respond(200 if ready else 503, orjson.dumps(state), JSON_HEADERS)


class MetricsRoutes:
    """Serves the metrics port."""

    def __init__(self, page: Callable[[], Awaitable[bytes]]) -> None:
        self._page = page
        self._open: set[asyncio.Task[None]] = set()

    def handle(self, request: ClientRequest) -> None:
        """Serve a request."""
        if request.target.partition(b"?")[0] != b"/metrics":
            request.respond(404, error_body(404, "This port has /metrics only."), JSON_HEADERS)
        elif request.method not in (b"GET", b"HEAD"):
            request.respond(405, error_body(405, "/metrics answers GET."), JSON_HEADERS + b"allow: GET, HEAD\r\n")
        else:
            task = asyncio.get_running_loop().create_task(self._respond(request))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

    async def _respond(self, request: ClientRequest) -> None:
        request.respond(200, await self._page(), _METRICS_HEADERS)
