"""The HTTP face of the simulated engine: vLLM's paths, and `/sim/…` for those who look behind it."""

import asyncio
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pdsim.engine.answers import DONE, Answer, ChatAnswer, Choice, CompletionAnswer, Head, usage
from pdsim.engine.engine import UNREACHABLE_SECONDS, Engine
from pdsim.engine.faults import Fault, FaultKind
from pdsim.engine.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Limits,
    RequestError,
    TokenizeRequest,
    check_body,
    check_fields,
    check_model,
    is_text,
    parse,
    prompts_of,
    sampling_of,
)
from pdsim.engine.requests import Requests
from pdsim.engine.sequence import Delta, EngineDeadError, RequestFailedError, Sampling, Sequence
from pdsim.engine.violations import Rule, prefill_leg_breaches

ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
ORIGIN = {"vary": "Origin"}


class ClientGoneError(Exception):
    """The client closed the connection."""


class BrokenOffError(Exception):
    """A fault that was asked for: the connection breaks in the middle of an answer."""


class Json(Response):
    """A JSON answer, compact as FastAPI's."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return orjson.dumps(content)


def _failure(error: Exception) -> RequestError:
    if isinstance(error, EngineDeadError):
        return RequestError(ENGINE_DEAD, status=500, kind="InternalServerError")
    return RequestError("Internal server error", status=500, kind="InternalServerError")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A stream of server-sent events that notices at once when its client goes away."""

    def __init__(self, chunks: AsyncIterator[bytes], on_disconnect: Callable[[], None]) -> None:
        self._chunks = chunks
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"vary", b"Origin")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda task: None if task.cancelled() else self._on_disconnect())
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except ClientGoneError:
            pass
        finally:
            watch.cancel()


class Api:
    """All handlers of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        settings = engine.settings
        self.limits = Limits(settings.model, settings.max_model_len, engine.tokenizer.vocabulary)
        self.created = int(time.time())
        self.started = time.monotonic()
        self.fingerprint = f"vllm-{settings.version}-{uuid.uuid5(uuid.NAMESPACE_DNS, settings.model).hex[:8]}"
        self.load = 0
        self.refuse: Callable[[float], None] = lambda seconds: None
        self.requests = Requests(settings.keep_requests)
        self._status_faults: list[int] = []
        self._break_after: list[tuple[int, bool]] = []
        self._late = 0.0
        self._ballast = b""

    def application(self) -> ASGIApp:
        """Give the ASGI application."""

        def get(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, handler, methods=["GET"])

        def post(path: str, handler: Callable[[Request], Awaitable[Any]]) -> Route:
            return Route(path, handler, methods=["POST"])

        routes = [
            post("/v1/completions", self.completions),
            post("/v1/chat/completions", self.chat),
            get("/v1/models", self.models),
            get("/health", self.health),
            Route("/ping", self.health, methods=["GET", "POST"]),
            get("/version", self.version),
            get("/load", self.server_load),
            get("/metrics", self.metrics),
            get("/tokenizer_info", self.tokenizer_info),
            post("/tokenize", self.tokenize),
            post("/detokenize", self.detokenize),
            post("/reset_prefix_cache", self.reset_prefix_cache),
            get("/sim/violations", self.violations),
            Route("/sim/violations", self.clear_violations, methods=["DELETE"]),
            get("/sim/state", self.state),
            get("/sim/requests", self.kept_requests),
            Route("/sim/requests", self.forget_requests, methods=["DELETE"]),
            post("/sim/fault", self.fault),
        ]
        application = Starlette(
            routes=routes, exception_handlers={HTTPException: self._http_error, RequestError: self._request_error}
        )
        return self.requests.kept(application) if self.engine.settings.keep_requests else application

    @staticmethod
    async def _http_error(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        detail = {404: "Not Found", 405: "Method Not Allowed"}.get(error.status_code, str(error))
        headers = dict(error.headers or {})
        if "Allow" in headers:  # FastAPI does not answer HEAD where it answers GET
            headers["Allow"] = ", ".join(sorted(set(headers["Allow"].split(", ")) - {"HEAD"}))
        return Json({"detail": detail}, error.status_code, headers | ORIGIN)

    @staticmethod
    async def _request_error(_: Request, error: Exception) -> Response:
        failure = error if isinstance(error, RequestError) else _failure(error)
        return Json(failure.body(), failure.status, ORIGIN)

    # --- generation ---------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Any:
        """POST /v1/completions."""
        return await self._generate(request, CompletionRequest)

    async def chat(self, request: Request) -> Any:
        """POST /v1/chat/completions."""
        return await self._generate(request, ChatRequest)

    async def _generate(self, http: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Any:
        arrival = asyncio.get_running_loop().time()
        content = await http.body()
        # All requests that came together take their time of arrival before the first of them is worked on.
        await asyncio.sleep(0)
        if self._status_faults:
            code = self._status_faults.pop()
            raise RequestError("a fault that was asked for", status=code, kind="InternalServerError")
        if self.engine.dead:
            raise _failure(EngineDeadError())
        body, raw = parse(kind, content)
        public_id = http.headers.get("x-request-id") or uuid.uuid4().hex[:16]
        prefix = "cmpl" if kind is CompletionRequest else "chatcmpl"
        self._watch_protocol(body, raw, f"{prefix}-{public_id}")
        check_body(body)
        if not self.engine.settings.connector:
            body.kv_transfer_params = None
        try:
            sequences, answer = self._prepare(http, body, f"{prefix}-{public_id}", arrival)
            self.engine.submit(sequences, is_text(body))
        except EngineDeadError as error:
            raise _failure(error) from error
        except RequestError:
            self.engine.reject(f"{prefix}-{public_id}", body.kv_transfer_params)
            raise
        self.load += 1
        if body.stream:
            stream = self._stream(body, sequences, answer)
            return EventStream(stream, lambda: self._client_gone(sequences))
        return await self._whole(http, sequences, answer)

    def _watch_protocol(self, body: CompletionRequest | ChatRequest, raw: dict[str, Any], request_id: str) -> None:
        """Record what a router did against the handoff protocol in this request."""
        params = body.kv_transfer_params
        if not params:
            return
        violations = self.engine.violations
        prompt = raw.get("prompt")
        batch = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
        if params.get("do_remote_decode"):
            for rule, fields in prefill_leg_breaches(raw):
                violations.add(rule, request_id, **fields)
            if batch > 1:
                violations.add(Rule.PREFILL_BATCH, request_id, prompts=batch)
        if params.get("do_remote_prefill") and batch > 1:
            violations.add(Rule.TICKET_BATCHED, request_id, prompts=batch)
        if not params.get("do_remote_prefill") and any(
            params.get(key) is not None for key in params if key.startswith("remote_")
        ):
            if not params.get("do_remote_decode"):
                violations.add(Rule.TICKET_ALTERED, request_id, do_remote_prefill=params.get("do_remote_prefill"))
        elif not params.get("do_remote_prefill") and not params.get("do_remote_decode"):
            violations.add(Rule.CLIENT_TICKET, request_id, kv_transfer_params=params)

    def _prepare(
        self, http: Request, body: CompletionRequest | ChatRequest, request_id: str, arrival: float
    ) -> tuple[list[Sequence], Answer]:
        check_fields(body)
        check_model(body.model, self.limits)
        rank = http.headers.get("x-data-parallel-rank", "")
        if rank.lstrip("-").isdigit() and int(rank) != 0:
            raise RequestError(f"data_parallel_rank {rank} is out of range [0, 1).")
        prompts = prompts_of(body, self.tokenizer, self.limits)
        sequences = []
        for number, prompt in enumerate(prompts):
            sampling = sampling_of(body, len(prompt), self.limits, self.engine.random_seed())
            internal = self.engine.request_id(request_id, number if isinstance(body, CompletionRequest) else None)
            for choice in range(body.n):
                params = None if body.kv_transfer_params is None else dict(body.kv_transfer_params)
                name = internal if body.n == 1 else f"{choice}_{internal}"
                own = sampling if choice == 0 else _reseeded(sampling, choice)
                sequences.append(Sequence(name, prompt, own, params, body.cache_salt, arrival, body.n))
        head = Head(request_id, int(time.time()), self.limits.model, self.fingerprint, self.tokenizer)
        return sequences, self._answer(body, head, prompts)

    def _answer(self, body: CompletionRequest | ChatRequest, head: Head, prompts: list[list[int]]) -> Answer:
        return_ids = bool(body.return_token_ids)
        options = body.stream_options
        if isinstance(body, ChatRequest):
            continuous = bool(options and options.include_usage and options.continuous_usage_stats)
            return ChatAnswer(head, bool(body.logprobs), body.top_logprobs or 0, return_ids, continuous)
        texts = []
        if body.echo:
            given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
            texts = [
                str(given[number]) if isinstance(given[number], str) else self.tokenizer.decode(prompt)
                for number, prompt in enumerate(prompts)
            ]
        only = bool(body.echo) and body.max_tokens == 0
        return CompletionAnswer(head, bool(body.echo), only, body.logprobs is not None, return_ids, texts, body.n)

    def _client_gone(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.engine.abort(sequence)
            sequence.outbox.fail(ClientGoneError())

    async def _whole(self, http: Request, sequences: list[Sequence], answer: Answer) -> Response:
        choices = [Choice(index, sequence) for index, sequence in enumerate(sequences)]
        break_after = self._break_after.pop() if self._break_after else None

        async def collect(choice: Choice) -> None:
            while choice.finish is None:
                choice.add(await choice.sequence.outbox.get())
                if break_after is not None and len(choice.tokens) >= break_after[0]:
                    self._break_off(sequences, break_after[1])

        work: asyncio.Future[Any] = asyncio.gather(*map(collect, choices))
        watch: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(http.receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._client_gone(sequences)
                with contextlib.suppress(ClientGoneError):
                    await work
                return Response(status_code=499)
            await work
            if self._late:  # a client that leaves now changes nothing: the engine core has finished
                await asyncio.wait({watch}, timeout=self._late)
        except (EngineDeadError, RequestFailedError) as error:
            for sequence in sequences:
                self.engine.abort(sequence)
            raise _failure(error) from error
        finally:
            watch.cancel()
            work.cancel()
            self.load -= 1
        self._count(http, 200)
        prompt_tokens = sum(len(sequence.prompt) for sequence in sequences[:: self._per_prompt(answer)])
        return Json(answer.whole(choices, prompt_tokens, sequences[0].ticket), 200, ORIGIN)

    @staticmethod
    def _per_prompt(answer: Answer) -> int:
        return answer.per_prompt if isinstance(answer, CompletionAnswer) else 1 << 30

    def _count(self, http: Request, status: int) -> None:
        self.engine.metrics.http.labels("POST", f"{status // 100}xx", http.url.path).inc()

    def _break_off(self, sequences: list[Sequence], leave: bool) -> None:
        if leave:
            os._exit(70)
        for sequence in sequences:
            self.engine.abort(sequence)
        raise BrokenOffError

    async def _stream(
        self, body: CompletionRequest | ChatRequest, sequences: list[Sequence], answer: Answer
    ) -> AsyncIterator[bytes]:
        options = body.stream_options
        with_usage = bool(options and options.include_usage)
        continuous = with_usage and bool(options and options.continuous_usage_stats)
        choices = [Choice(index, sequence) for index, sequence in enumerate(sequences)]
        break_after = self._break_after.pop() if self._break_after else None
        try:
            opened = False
            async for choice, delta in _merged(choices):
                if not opened:
                    opened = True
                    opening = b"".join(answer.opening(choice) for choice in choices)
                    if opening:
                        yield opening
                choice.tokens += delta.tokens
                told = usage(len(choice.sequence.prompt), len(choice.tokens)) if continuous else None
                yield answer.chunk(choice, delta, told, delta.finish is not None and not with_usage)
                if break_after is not None and len(choice.tokens) >= break_after[0]:
                    self._break_off(sequences, break_after[1])
            if with_usage:
                prompt_tokens = sum(len(one.prompt) for one in sequences[:: self._per_prompt(answer)])
                yield answer.usage_chunk(usage(prompt_tokens, sum(len(choice.tokens) for choice in choices)))
        except (EngineDeadError, RequestFailedError) as error:
            for sequence in sequences:
                self.engine.abort(sequence)
            # vLLM writes this event with json.dumps, spaces included
            yield b"data: " + _spaced(_failure(error).body()) + b"\n\n"
        finally:
            self.load -= 1
        yield DONE

    # --- the rest of vLLM's paths -------------------------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        permission = {
            "id": f"modelperm-{uuid.uuid4().hex[:16]}",
            "object": "model_permission",
            "created": int(time.time()),
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        card = {
            "id": self.limits.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.limits.model,
            "parent": None,
            "max_model_len": self.limits.max_model_len,
            "permission": [permission],
        }
        return Json({"object": "list", "data": [card]}, headers=ORIGIN)

    async def health(self, _: Request) -> Response:
        """GET /health, /ping."""
        return Response(status_code=503 if self.engine.dead else 200, headers=ORIGIN)

    async def version(self, _: Request) -> Response:
        """GET /version."""
        return Json({"version": self.engine.settings.version}, headers=ORIGIN)

    async def server_load(self, _: Request) -> Response:
        """GET /load."""
        return Json({"server_load": self.load}, headers=ORIGIN)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        media = "text/plain; version=1.0.0; charset=utf-8"
        return Response(generate_latest(self.engine.metrics.registry), headers={"content-type": media})

    async def tokenizer_info(self, _: Request) -> Response:
        """GET /tokenizer_info."""
        info: dict[str, Any] = {"tokenizer_class": "TokenizerPoolCachedTokenizersBackend"}
        info |= {key: value for key, value in self.tokenizer.config.items() if key != "tokenizer_class"}
        info |= {
            "chat_template": self.tokenizer.chat_template,
            "truncation_side": "left",
            "name_or_path": self.limits.model,
            "is_local": True,
            "local_files_only": True,
            "added_tokens_decoder": self.tokenizer.added_tokens,
        }
        return Json(info, headers=ORIGIN)

    async def tokenize(self, http: Request) -> Response:
        """POST /tokenize."""
        body, raw = parse(TokenizeRequest, await http.body())
        check_model(body.model, self.limits)
        if body.messages is not None:
            tokens = self.tokenizer.chat(body.messages, body.add_generation_prompt, body.continue_final_message)
        elif body.prompt is not None:
            tokens = self.tokenizer.encode(body.prompt, body.add_special_tokens)
        else:
            lacking = [
                f"  {{'type': 'missing', 'loc': 'body.{name}', 'msg': 'Field required', "
                f"'input': '<dict of {len(raw)} items>'}}"
                for name in ("prompt", "messages")
            ]
            raise RequestError("\n".join(["2 validation errors:", *lacking]), "body.prompt", kind="Bad Request")
        pieces = [self.tokenizer.piece(token) for token in tokens] if body.return_token_strs else None
        told = {
            "count": len(tokens),
            "max_model_len": self.limits.max_model_len,
            "tokens": tokens,
            "token_strs": pieces,
        }
        return Json(told, headers=ORIGIN)

    async def detokenize(self, http: Request) -> Response:
        """POST /detokenize."""
        body, _ = parse(DetokenizeRequest, await http.body())
        check_model(body.model, self.limits)
        return Json({"prompt": self.tokenizer.decode(body.tokens)}, headers=ORIGIN)

    async def reset_prefix_cache(self, _: Request) -> Response:
        """POST /reset_prefix_cache."""
        return Json({"success": self.engine.pool.forget()}, headers=ORIGIN)

    # --- behind the scenes --------------------------------------------------------------------------------------

    async def violations(self, _: Request) -> Response:
        """GET /sim/violations."""
        return Json(self.engine.violations.listed())

    async def clear_violations(self, _: Request) -> Response:
        """DELETE /sim/violations."""
        self.engine.violations.clear()
        return Json([])

    async def kept_requests(self, _: Request) -> Response:
        """GET /sim/requests."""
        return Json(self.requests.listed())

    async def forget_requests(self, _: Request) -> Response:
        """DELETE /sim/requests."""
        self.requests.clear()
        return Json([])

    async def state(self, _: Request) -> Response:
        """GET /sim/state."""
        settings = self.engine.settings
        told = {
            "simulated": True,
            "role": settings.role,
            "model": settings.model,
            "speed": settings.speed,
            "seed": settings.seed,
            "keep_requests": settings.keep_requests,
            "uptime_seconds": time.monotonic() - self.started,
        }
        return Json(told | self.engine.state())

    async def fault(self, http: Request) -> Response:
        """POST /sim/fault."""
        body, _ = parse(Fault, await http.body())
        self._apply(body)
        return Json({"kind": body.kind.value})

    def _apply(self, fault: Fault) -> None:
        engine = self.engine
        loop = asyncio.get_running_loop()
        match fault.kind:
            case FaultKind.SLOW:
                engine.slowdown = fault.factor
                if fault.seconds:
                    loop.call_later(fault.seconds, setattr, engine, "slowdown", 1.0)
            case FaultKind.HANG:
                engine.hanging = True
                if fault.seconds:
                    loop.call_later(fault.seconds, engine.resume)
            case FaultKind.REFUSE:
                loop.call_later(0.05, self.refuse, fault.seconds or 5.0)  # this answer goes out first
            case FaultKind.STATUS:
                self._status_faults = [fault.code] * fault.count
            case FaultKind.DIE_MID_STREAM:
                self._break_after = [(fault.after_tokens, fault.exit)] * fault.count
            case FaultKind.EXPIRE_LEASES:
                engine.expire(float("inf"))
            case FaultKind.DROP_REMOTE_REQUEST_ID:
                engine.drop_remote_request_id = fault.count
            case FaultKind.LATE_ANSWER:
                self._late = fault.seconds
            case FaultKind.EDGE:
                tries = fault.seconds or UNREACHABLE_SECONDS / engine.settings.speed
                engine.broken_edges[fault.host, fault.port] = tries
            case FaultKind.LINK:
                engine.link_slowdown = fault.factor
            case FaultKind.ALLOCATE:
                self._ballast = b"\x01" * fault.bytes  # not zeroes, which would take no memory
            case FaultKind.NONE:
                engine.slowdown = engine.link_slowdown = 1.0
                engine.drop_remote_request_id = 0
                engine.broken_edges.clear()
                self._late = 0.0
                self._ballast = b""
                self._status_faults, self._break_after = [], []
                engine.resume()


def _spaced(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


def _reseeded(sampling: Sampling, choice: int) -> Sampling:
    """Give the sampling of a further choice; vLLM adds the choice's index to the seed."""
    return replace(sampling, seed=sampling.seed + choice)


async def _merged(choices: list[Choice]) -> AsyncIterator[tuple[Choice, Delta]]:
    """Give the deltas of all choices as they come."""
    if len(choices) == 1:
        choice = choices[0]
        while choice.finish is None:
            delta = await choice.sequence.outbox.get()
            choice.finish = delta.finish
            yield choice, delta
        return
    pending = {asyncio.ensure_future(choice.sequence.outbox.get()): choice for choice in choices}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: pending[task].index):
                choice = pending.pop(task)
                delta = task.result()
                choice.finish = delta.finish
                if delta.finish is None:
                    pending[asyncio.ensure_future(choice.sequence.outbox.get())] = choice
                yield choice, delta
    finally:
        for task in pending:
            task.cancel()
