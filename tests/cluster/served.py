"""Engines and a router from the charts, seen as a client and as an operator see them."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import psutil

from chaos.fleet import Fleet
from support.processes import Process, engine

from .releases import Releases

ENGINES_OF, ROUTER_OF = "ms-tiny", "router"


class Served:
    """Engines and a router in a namespace, seen as a client and as an operator see them.

    Args:
        engines, router: names of the releases.
    """

    def __init__(self, releases: Releases, engines: str = ENGINES_OF, router: str = ROUTER_OF) -> None:
        self.releases = releases
        self.engines, self.router = engines, router
        self.plain = engine("both", "--speed", "50")

    @property
    def url(self) -> str:
        """Address of the router for clients: its one pod's, since there are no Services on fake nodes."""
        return f"http://{next(iter(self.releases.addresses(self.router)))}:10001"

    def knows(self, router: str) -> set[str]:
        """Give the addresses of the engines that a router's pod knows and finds well, by its admin port."""
        workers = httpx.get(f"http://{router}:29001/list_workers", trust_env=False).json()["workers"]
        return {httpx.URL(one["url"]).host for one in workers if one["healthy"]}

    def until_known(self, prefill: int, decode: int) -> None:
        """Wait until each router knows just the ready engines, and they are so many."""
        self.releases.cluster.until(lambda: self._same([prefill, decode]), f"{prefill}+{decode} engines are known")

    def _same(self, counts: list[int]) -> bool:
        there = [self.releases.addresses(self.engines, role) for role in ("prefill", "decode")]
        routers = self.releases.addresses(self.router)
        return [len(one) for one in there] == counts and all(
            self.knows(router) == there[0] | there[1] for router in routers
        )

    def kill(self, pod: dict[str, Any]) -> None:
        """Kill the process of a fake node's pod, as a crash does."""
        address = pod["status"]["podIP"]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                listening = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
                if any(one.laddr.ip == address for one in listening):
                    process.kill()
                    return
        raise AssertionError(f"nobody listens at {address}")

    def under_load(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do something while clients ask; fail when a request fails or a text is not a plain engine's."""
        bed = Fleet([], [], self.plain, Process([], self.url))

        async def main() -> list[str]:
            await bed.under_load(work(), clients=4)
            return await bed.compare()

        with self.plain:
            different = asyncio.run(main())
        bed.told()
        assert len(bed.outcomes) > 20
        if different:
            log = self.releases.kubectl("logs", "-l", "app.kubernetes.io/component=router", "--tail=-1", "--prefix")
            unusual = "\n".join(line for line in log.splitlines() if " status=200 " not in line)
            told = f"{different[0]}{self.releases.told()}\n{unusual}"
            raise AssertionError(f"{len(different)} of {len(bed.outcomes)}; the first: {told}")
