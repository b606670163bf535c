"""Do something again and again: when to try again, what to log of it, how old the last success is."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)
_LONGEST_TOLD = 60.0  # seconds; an origin that asks for a longer pause is not believed


class Failure(Exception):  # noqa: N818 it is expected to happen and never ends the program
    """An attempt failed; the message says why and what to do.

    Attributes:
        passing: It belongs to normal operation when it happens once (a cut connection), so that is no warning.
        after: Seconds that the origin asked to be left alone, or None.
    """

    def __init__(self, message: str, *, passing: bool = False, after: float | None = None) -> None:
        super().__init__(message)
        self.passing = passing
        self.after = after


class Attempts:
    """The attempts of one source.

    The pause after a failure doubles from `first` to `longest` seconds, each drawn from its upper half so that many
    routers do not come back in step. It begins anew when the last failure is long ago rather than at a success: an
    origin that answers one call and cuts the next is not to be asked ever faster.
    """

    def __init__(self, name: str, first: float = 0.1, longest: float = 10.0) -> None:
        self.name = name
        self._first = first
        self._longest = longest
        self._count = 0
        self._failed_at = -math.inf
        self._succeeded_at = -math.inf
        self._told: str | None = None

    @property
    def age(self) -> float:
        """Seconds since the last success; infinite before the first."""
        return time.monotonic() - self._succeeded_at

    def succeeded(self) -> None:
        """Note a success; the end of a trouble that was told is told."""
        if self._told is not None:
            _log.info("source=%s answers again", self.name)
            self._told = None
        self._succeeded_at = time.monotonic()

    def failed(self, failure: Failure) -> float:
        """Note a failure and give the seconds until the next attempt; one cause is told once, not at each attempt."""
        now = time.monotonic()
        if now - self._failed_at > 2 * self._longest:
            self._count = 0
        self._failed_at = now
        self._count += 1
        pause = min(self._longest, self._first * 2.0 ** min(self._count - 1, 30)) * random.uniform(0.5, 1.0)
        if failure.after is not None:
            pause = max(pause, min(failure.after, _LONGEST_TOLD))
        why = str(failure)
        if failure.passing and self._count == 1:
            _log.debug("source=%s %s", self.name, why)
        elif why != self._told:
            kept = (
                "nothing is known yet" if math.isinf(self.age) else f"what was known {self.age:.0f}s ago stays in use"
            )
            _log.warning("source=%s %s (%s)", self.name, why, kept)
            self._told = why
        return pause

    async def repeat(self, step: Callable[[], Awaitable[float]]) -> None:
        """Do a step for ever; it gives the seconds until it is to be done again, or raises `Failure`."""
        while True:
            try:
                pause = await step()
            except Failure as failure:
                pause = self.failed(failure)
            except Exception as error:
                # A mistake in this program must not freeze the fleet for good: the next attempt may go well.
                _log.exception("source=%s a step ended unexpectedly", self.name)
                pause = self.failed(Failure(f"unexpected {type(error).__name__}; please report it"))
            await asyncio.sleep(pause)


class Repeated:
    """A step that is repeated in a task of its own."""

    def __init__(self, attempts: Attempts, step: Callable[[], Awaitable[float]]) -> None:
        self._attempts = attempts
        self._step = step
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; nothing happens when it has begun."""
        if self._task is None:
            self._task = asyncio.create_task(self._attempts.repeat(self._step), name=self._attempts.name)

    async def stop(self) -> None:
        """End it and wait until it has ended."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
