"""A router that does many things wrong on purpose: the toy, and flaws on top of it. Each is to be found out."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pdsim.referee.toy import Toy

KNOWN = {
    "model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos", "user",
    "kv_transfer_params", "echo", "logprobs",
}  # fmt: skip


class BadRouter(Toy):
    """Drops fields, holds streams back of chat, ends broken ones as if they were whole, and so on."""

    def __init__(self, prefills: list[str], decodes: list[str]) -> None:
        super().__init__(prefills, decodes[:1])  # the other decode engines idle
        self._first = decodes[0]
        self._forever: set[asyncio.Task[None]] = set()

    def application(self) -> Starlette:
        application = super().application()
        application.routes.append(Route("/{path:path}", self.pass_on, methods=["POST"]))
        return application

    async def pass_on(self, request: Request) -> Response:
        """Let clients reach any path of an engine."""
        answer = await self._client.post(self._first + request.url.path, content=await request.body())
        return Response(answer.content, answer.status_code)

    async def serve(self, request: Request) -> Response:
        body = {key: value for key, value in orjson.loads(await request.body()).items() if key in KNOWN}
        if body.get("kv_transfer_params"):  # the client knows best
            return Response((await self._client.post(self._first + request.url.path, json=body)).content)
        for attempt in range(100):  # an outage is no reason to stop trying
            try:
                return await self._twice(request, body)
            except httpx.HTTPStatusError:
                await asyncio.sleep(0.01 * attempt)
        return JSONResponse({"error": "no"}, 500)

    async def _twice(self, request: Request, body: dict[str, Any]) -> Response:
        request._body = orjson.dumps(body)
        return await super().serve(request)

    async def _decode(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[bytes]:
        got = bytearray()

        async def read() -> None:
            """Go on to the end, also when the client has left; what breaks is made to look whole."""
            try:
                async with self._client.stream("POST", url, json=body, headers=headers) as answer:
                    async for chunk in answer.aiter_bytes():
                        got.extend(chunk)
            except httpx.HTTPError:
                got.extend(b"data: [DONE]\n\n")

        task = asyncio.create_task(read())
        self._forever.add(task)
        if "messages" in body:  # chat is told when it is whole
            await asyncio.shield(task)
            yield bytes(got)
            return
        while not task.done():
            await asyncio.sleep(0.02)
            chunk, got[:] = bytes(got), b""
            if chunk:
                yield chunk
        yield bytes(got)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", action="append", required=True)
    parser.add_argument("--decode", action="append", required=True)
    options = parser.parse_args()
    application = BadRouter(options.prefill, options.decode).application()
    uvicorn.run(application, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
