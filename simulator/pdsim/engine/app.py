"""The process `pd-engine-sim`: flags, sockets, signals."""

import argparse
import asyncio
import contextlib
import gc
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import uvicorn
import uvloop

from pdsim.engine.answers import VERSION
from pdsim.engine.api import Api
from pdsim.engine.engine import Engine, EngineSettings
from pdsim.engine.tokenizer import Tokenizer
from pdsim.engine.violations import Violations
from pdsim.timing import load_profile

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
DEFAULT_PORTS = {"prefill": 8000, "decode": 8200, "both": 8000}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="pd-engine-sim",
        description="A simulated vLLM engine: real vLLM's wire, KV blocks that tell the truth, time as measured on an "
        "H200. It needs no GPU.",
    )
    made.add_argument("--role", choices=sorted(DEFAULT_PORTS), default="both", help="what the engine is for (both)")
    made.add_argument("--host", default="127.0.0.1", help="address of the HTTP port (127.0.0.1)")
    made.add_argument("--port", type=int, help="HTTP port (8000; decode: 8200)")
    made.add_argument(
        "--localhost-port", type=int, metavar="PORT",
        help="answer on 127.0.0.1:PORT too, where a pod's other containers find an engine (none)",
    )  # fmt: skip
    made.add_argument("--side-channel-host", help="address of the side channel, told in tickets (--host)")
    made.add_argument("--side-channel-port", type=int, default=5600, help="port of the side channel (5600)")
    made.add_argument("--model", default=DEFAULT_MODEL, help=f"served model name ({DEFAULT_MODEL})")
    made.add_argument("--profile", default="h200", help="timing profile (h200)")
    made.add_argument("--speed", type=float, default=1.0, help="how much faster than real time (1.0)")
    made.add_argument("--seed", type=int, help="makes unseeded sampling repeat")
    made.add_argument("--block-size", type=int, default=128, help="tokens a KV block (128)")
    made.add_argument("--num-gpu-blocks", type=int, help="KV blocks (as many as the profile's GPU has room for)")
    made.add_argument("--max-model-len", type=int, default=131_072, help="tokens of prompt and answer (131072)")
    made.add_argument("--max-num-seqs", type=int, default=1024, help="sequences that run at once (1024)")
    made.add_argument(
        "--no-kv-connector", action="store_true", help="pass over tickets and give none, as vLLM does without NIXL"
    )
    made.add_argument("--kv-lease-duration", type=float, default=30.0, help="seconds until uncollected KV expires (30)")
    made.add_argument(
        "--kv-load-failure-policy", choices=["fail", "recompute"], default="recompute",
        help="what a decode engine does when KV cannot be fetched (recompute)",
    )  # fmt: skip
    made.add_argument(
        "--keep-requests", type=int, default=0, metavar="N",
        help="show the last N POST requests, with headers and bodies, under GET /sim/requests (0)",
    )  # fmt: skip
    made.add_argument(
        "--shutdown-timeout", type=float, default=1.0, metavar="S",
        help="seconds for requests under way after SIGTERM (1)",
    )  # fmt: skip
    made.add_argument("--vllm-version", default=VERSION, help=f"version of vLLM that it tells ({VERSION})")
    made.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return made


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, port))
    made.listen(2048)
    made.set_inheritable(True)
    return made


async def _serve(settings: EngineSettings, listening: list[socket.socket], log_level: str, drain_seconds: float) -> int:
    engine = Engine(settings, Tokenizer(), Violations())
    api = Api(engine)
    try:
        await engine.start()
    except OSError as error:
        where = f"{settings.side_channel_host}:{settings.side_channel_port}"
        print(f"pd-engine-sim: cannot open the side channel on {where}: {error.strerror}", file=sys.stderr)
        return 1
    config = uvicorn.Config(
        api.application(), log_level="warning" if log_level == "info" else log_level, access_log=False, lifespan="off",
        timeout_keep_alive=5, timeout_graceful_shutdown=math.ceil(drain_seconds), http="httptools", ws="none",
    )  # fmt: skip
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stopper(server))
    engine.on_death = lambda: os._exit(1)
    addresses = [one.getsockname()[:2] for one in listening]
    api.refuse = _refuser(server, config, loop, addresses)
    host, port = addresses[0]
    if log_level in ("info", "debug"):
        print(
            f"simulated {settings.role} engine on http://{host}:{port}, side channel "
            f"{settings.side_channel_host}:{settings.side_channel_port}, model {settings.model}, "
            f"{settings.num_blocks - 1} blocks of {settings.block_size}, speed {settings.speed:g}",
            flush=True,
        )
    gc.collect()
    gc.freeze()  # what start-up made stays; collections then look at requests only
    await server.serve(listening)
    await engine.stop()
    return 0


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process by the signal instead of with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def _stopper(server: uvicorn.Server) -> Callable[[], None]:
    def stop() -> None:
        server.should_exit = True

    return stop


def _refuser(
    server: uvicorn.Server, config: uvicorn.Config, loop: asyncio.AbstractEventLoop, addresses: list[tuple[str, int]]
) -> Callable[[float], None]:
    """Make the function that refuses connections for some seconds: it stops listening and resets what is open."""

    async def open_again() -> None:
        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=server.server_state, app_state=server.lifespan.state
            )
            return made

        for address in addresses:
            server.servers.append(await loop.create_server(protocol, sock=_listen(*address)))

    def refuse(seconds: float) -> None:
        for one in server.servers:
            one.close()
        server.servers.clear()
        for connection in list(server.server_state.connections):
            transport = connection.transport
            if transport is not None:
                transport.abort()
        loop.call_later(seconds, lambda: asyncio.ensure_future(open_again()))

    return refuse


def main(argv: Sequence[str] | None = None) -> None:
    """Run an engine until SIGTERM or SIGINT; exit 1 with one line when it cannot listen, 2 on a bad flag."""
    made = parser()
    options = made.parse_args(argv)
    try:
        profile = load_profile(options.profile)
    except ValueError as error:
        made.error(str(error))
    if options.speed <= 0:
        made.error("--speed must be above 0")
    if options.block_size < 1:
        made.error("--block-size must be at least 1")
    port = DEFAULT_PORTS[options.role] if options.port is None else options.port
    blocks = options.num_gpu_blocks or profile.kv_cache_tokens // options.block_size
    settings = EngineSettings(
        role=options.role,
        model=options.model,
        profile=profile,
        block_size=options.block_size,
        num_blocks=blocks + 1,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        connector=not options.no_kv_connector,
        lease_duration=options.kv_lease_duration,
        load_failure_policy=options.kv_load_failure_policy,
        side_channel_host=options.side_channel_host or options.host,
        side_channel_port=options.side_channel_port,
        speed=options.speed,
        seed=options.seed,
        keep_requests=options.keep_requests,
        version=options.vllm_version,
    )
    listening = []
    local = [("127.0.0.1", options.localhost_port)] if options.localhost_port else []
    for address in ((options.host, port), *local):
        try:
            listening.append(_listen(*address))
        except OSError as error:
            print(f"pd-engine-sim: cannot listen on {address[0]}:{address[1]}: {error.strerror}", file=sys.stderr)
            sys.exit(1)
    sys.exit(uvloop.run(_serve(settings, listening, options.log_level, options.shutdown_timeout)))
