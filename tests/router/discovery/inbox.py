"""What a source reported, to be waited for."""

import asyncio
from collections.abc import Callable

from pdrouter.discovery.found import Found


class Inbox:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.reports: list[tuple[Found, ...]] = []
        self.sources: set[str] = set()
        self._came = asyncio.Event()

    def __call__(self, source: str, found: tuple[Found, ...]) -> None:
        self.sources.add(source)
        self.reports.append(found)
        self._came.set()

    @property
    def last(self) -> tuple[Found, ...] | None:
        return self.reports[-1] if self.reports else None

    @property
    def urls(self) -> list[str] | None:
        return None if self.last is None else [one.url for one in self.last]

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 8.0) -> None:
        """Wait for reports until the condition holds."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {what}; last report: {self.last}") from None

    async def until_urls(self, *urls: str) -> None:
        await self.until(lambda: self.urls == list(urls), f"the report {urls}")
