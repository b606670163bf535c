"""Cases one after the other: engines made well, router started anew where the last case disturbed it, verdicts."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from pdsim.referee.answers import line
from pdsim.referee.bench import Bench
from pdsim.referee.case import Case, FailedError, NotApplicableError, Plan, Verdict
from pdsim.referee.engines import Fleet, RefereeError, fleet
from pdsim.referee.places import Places
from pdsim.referee.router import Router


@dataclass(frozen=True, slots=True)
class Finding:
    """How one case ended; `seconds` without what it took to make everything well for it."""

    case: Case
    verdict: Verdict
    evidence: str
    seconds: float


class Court:
    """Hears cases.

    Args:
        router: the router under test.
        client: for everything but raw bytes.
        places: addresses for engines.
        named: URLs of prefill and decode engines that the router knows; None when the referee makes its own.
        keyed: the router chooses engines by a key of the request.
    """

    def __init__(
        self,
        router: Router,
        client: httpx.AsyncClient,
        places: Places,
        named: tuple[list[str], list[str]] | None = None,
        keyed: bool = True,
    ) -> None:
        self._router, self._client, self._places = router, client, places
        self._named, self._keyed = named, keyed
        self._fleet: Fleet | None = None
        self._standing: Fleet | None = None
        self._disturbed = True
        self._served = False  # the router, once at least
        self.metrics = ""  # what the router's metrics page has; no verdict

    async def hear(self, cases: Sequence[Case], told: Callable[[Finding], None]) -> list[Finding]:
        """Try all cases; everything is stopped in the end.

        Raises:
            RefereeError: engines or the router cannot be brought up at all.
        """
        findings = []
        try:
            for case in cases:
                finding = await self._try(case)
                findings.append(finding)
                told(finding)
                self.metrics = self.metrics or await self._metrics()
        finally:
            await self._router.stop()
            for one in {id(made): made for made in (self._fleet, self._standing) if made is not None}.values():
                one.stop()
        return findings

    async def _metrics(self) -> str:
        for url in self._router.metrics_urls:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self._client.get(url, timeout=3)
                kinds = [row for row in answer.text.splitlines() if row.startswith("# TYPE ")]
                if answer.status_code == 200 and kinds:
                    return f"{len(kinds)} metrics on a Prometheus page"
        return ""

    async def _try(self, case: Case) -> Finding:
        refused = self._refused(case)
        if refused:
            return Finding(case, Verdict.NOT_APPLICABLE, refused, 0.0)
        try:
            made = await self._ready(case)
        except RefereeError as error:
            if not self._served:
                raise
            self._disturbed = True
            return Finding(case, Verdict.FAIL, line(f"not tried: {error}"), 0.0)
        self._served = True
        bench = Bench(case.name, self._router.url, made, self._client)
        begin = time.monotonic()
        verdict, evidence = await self._verdict(case, bench)
        seconds = time.monotonic() - begin
        well = all([engine.alive and await engine.answers() for engine in made.engines])
        self._disturbed = case.alone or not well or not self._router.alive()
        if verdict is Verdict.FAIL and not self._router.alive():
            evidence += "; the router has ended"
        return Finding(case, verdict, line(evidence), seconds)

    def _refused(self, case: Case) -> str:
        if case.keyed and not self._keyed:
            return "this router does not choose engines by a key"
        if self._named is not None and case.plan != Plan():
            return "needs engines with settings of their own"
        return ""

    async def _verdict(self, case: Case, bench: Bench) -> tuple[Verdict, str]:
        try:
            async with asyncio.timeout(case.limit):
                evidence = await case.run(bench)
                luck = await bench.luck()
                return (Verdict.FAIL, luck) if luck else (Verdict.PASS, evidence)
        except FailedError as error:
            return Verdict.FAIL, str(error)
        except NotApplicableError as error:
            return Verdict.NOT_APPLICABLE, str(error)
        except TimeoutError:
            return Verdict.FAIL, f"not over within {case.limit:g} s"
        except (httpx.HTTPError, OSError) as error:
            return Verdict.FAIL, f"an engine or the router cannot be reached: {error!r}"

    async def _ready(self, case: Case) -> Fleet:
        """Bring up what a case needs, as if nothing had been before."""
        other = self._fleet is None or self._fleet.plan != case.plan
        anew = self._disturbed or case.alone or other
        if anew:
            await self._router.stop()
        if other:
            await self._change(case.plan)
        made = self._fleet
        assert made is not None
        await made.heal()
        if anew:
            await self._router.start(made)
            await made.heal()  # what it took to see that it serves is forgotten
        return made

    async def _change(self, plan: Plan) -> None:
        """Have engines by another plan; the standing fleet is kept meanwhile."""
        if self._fleet is not None and self._fleet is not self._standing:
            self._fleet.stop()
        if plan == Plan() and self._standing is not None:
            self._fleet = self._standing
            return
        self._fleet = fleet(plan, self._places, self._client, self._named)
        if plan == Plan():
            self._standing = self._fleet
        await self._fleet.start()
        for engine in self._fleet.engines:
            if not (await engine.state()).get("keep_requests"):
                raise RefereeError(f"the engine {engine.url} keeps no requests; start it with --keep-requests 2000")
