"""The smallest prefill/decode proxy there is, as a yardstick: vLLM's toy protocol, written anew.

vLLM's own tests drive a pair of engines this way: round robin over both roles; the prompt goes to a prefill engine with
`max_tokens` 1 and a wish for remote decode; the `kv_transfer_params` of its answer go with the request to a decode
engine, whose bytes are passed on. No headers of the client, no retries, no health checks, no splitting of batches, and
the client has its status 200 before decode was asked. Engines see a request id and an authorization of the proxy.
"""

import argparse
import contextlib
import itertools
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WANT_TICKET: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """Give the body of the first step."""
    told = {key: value for key, value in body.items() if key not in ("stream_options", "min_tokens")}
    told |= {"kv_transfer_params": WANT_TICKET, "stream": False, "max_tokens": 1}
    if "max_completion_tokens" in told:
        told["max_completion_tokens"] = 1
    return told


class Toy:
    """The proxy."""

    def __init__(self, prefills: list[str], decodes: list[str]) -> None:
        self._prefills, self._decodes = itertools.cycle(prefills), itertools.cycle(decodes)
        self._client = httpx.AsyncClient(
            timeout=None, trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=None)
        )

    def application(self) -> Starlette:
        """Give the ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/completions", self.serve, methods=["POST"]),
                Route("/v1/chat/completions", self.serve, methods=["POST"]),
                Route("/healthcheck", self.health, methods=["GET"]),
            ]
        )

    async def health(self, _: Request) -> Response:
        """Say that the proxy runs."""
        return JSONResponse({"status": "ok"})

    async def serve(self, request: Request) -> Response:
        """Take a request through both steps."""
        body = orjson.loads(await request.body())
        headers = {"x-request-id": str(uuid.uuid4()), "authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"}
        path = request.url.path
        first = await self._client.post(next(self._prefills) + path, json=prefill_body(body), headers=headers)
        first.raise_for_status()
        ticket = first.json().get("kv_transfer_params")
        if ticket:
            body["kv_transfer_params"] = ticket
        return StreamingResponse(self._decode(next(self._decodes) + path, body, headers), media_type="application/json")

    async def _decode(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[bytes]:
        async with self._client.stream("POST", url, json=body, headers=headers) as answer:
            answer.raise_for_status()
            async for chunk in answer.aiter_bytes():
                yield chunk


def main() -> None:
    """Run the proxy until a signal."""
    parser = argparse.ArgumentParser(prog="python -m pdsim.referee.toy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8192)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL", help="a prefill engine; repeat")
    parser.add_argument("--decode", action="append", required=True, metavar="URL", help="a decode engine; repeat")
    options = parser.parse_args()
    toy = Toy(options.prefill, options.decode)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(toy.application(), host=options.host, port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
