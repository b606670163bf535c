"""Engines from DNS: the addresses of a name, or the targets of its SRV records."""

import asyncio
import random
from collections.abc import Callable, Iterable

import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver

from pdrouter.discovery.attempts import Attempts, Failure, Repeated
from pdrouter.discovery.found import Found, Sink
from pdrouter.discovery.records import Service, from_addresses, from_services, kept_for
from pdrouter.fleet.engine import Role

_LIFETIME = 5.0
_FAMILIES = (dns.rdatatype.A, dns.rdatatype.AAAA)


class DnsSource:
    """Asks for a name again whenever the answer's TTL has passed (at least 1 s, at most 30 s).

    With a port, the name's A records are the engines, or its AAAA records when it has no A: DNS does not say which of
    both belong to one engine, so only one family is used. Without a port, its SRV records are: priority and weight are
    not used, since policies choose among engines.

    No failure empties the fleet. While the name cannot be resolved (no answer, SERVFAIL, NXDOMAIN, or an answer
    without records, which is what a Service gives whose pods all restart) the last set stays and `age` grows; whether
    an engine answers is for health checks to say.

    Args:
        sink: Takes what is found.
        host: A name of DNS; search domains of the system apply. `/etc/hosts` is not read.
        role: The role of what is found.
        port: The engines' port; None to ask for SRV records.
        attempts: When to try again; for tests.
        resolver: Makes a resolver for each question, so that changes of `/etc/resolv.conf` are seen.
    """

    def __init__(
        self,
        sink: Sink,
        host: str,
        role: Role,
        port: int | None = None,
        attempts: Attempts | None = None,
        resolver: Callable[[], dns.asyncresolver.Resolver] = dns.asyncresolver.Resolver,
    ) -> None:
        self.name = f"dns:{role}:{host}" + ("" if port is None else f":{port}")
        self.found: tuple[Found, ...] | None = None
        self._sink = sink
        self._host = host
        self._role = role
        self._port = port
        self._resolver = resolver
        self._attempts = attempts or Attempts(self.name, first=0.5)
        self._repeated = Repeated(self._attempts, self._step)

    @property
    def age(self) -> float:
        """Seconds since the last answer with records; infinite before the first."""
        return self._attempts.age

    def start(self) -> None:
        """Begin to look."""
        self._repeated.start()

    async def stop(self) -> None:
        """Look no more."""
        await self._repeated.stop()

    async def _step(self) -> float:
        try:
            resolver = self._resolver()
        except dns.resolver.NoResolverConfiguration as error:
            raise Failure(f"no DNS server is known: {error}") from error
        question = _Question(resolver)
        if self._port is None:
            services = await question.services(self._host)
            targets = {one.target for one in services}
            found = from_services(services, await question.all_addresses(targets), self._role, self.found or ())
        else:
            found = from_addresses(await question.addresses(self._host), self._port, self._role)
        if not found:
            raise Failure(f"none of the SRV targets of {self._host} has an address")
        self._attempts.succeeded()
        if found != self.found:
            self._sink(self.name, found)
            self.found = found
        return kept_for(question.ttl * random.uniform(1.0, 1.1))  # so that many routers do not ask in step


class _Question:
    """One round of questions; `ttl` is the shortest of all answers used."""

    def __init__(self, resolver: dns.asyncresolver.Resolver) -> None:
        self.ttl = float("inf")
        self._resolver = resolver
        self._beside: dict[str, list[str]] = {}

    async def addresses(self, host: str) -> list[str]:
        """Resolve a name to addresses of one family.

        Raises:
            Failure: there are none.
        """
        for family in _FAMILIES:
            answer = await self._ask(host, family)
            if answer is not None:
                return [record.address for record in answer]
        raise Failure(
            f"DNS knows {host} and gives no address for it; does its Service have ready pods, and is it headless?"
        )

    async def all_addresses(self, targets: Iterable[str]) -> dict[str, list[str]]:
        """Resolve SRV targets; one that cannot be resolved is left out."""
        left = sorted(set(targets) - self._beside.keys())
        answers = await asyncio.gather(*(self.addresses(target + ".") for target in left), return_exceptions=True)
        for target, answer in zip(left, answers, strict=True):
            if isinstance(answer, list):
                self._beside[target] = answer
            elif not isinstance(answer, Failure):
                raise answer
            else:
                self.ttl = 0.0  # ask again soon
        return self._beside

    async def services(self, host: str) -> list[Service]:
        """Resolve a name to SRV targets.

        Raises:
            Failure: there are none.
        """
        answer = await self._ask(host, dns.rdatatype.SRV)
        services = [] if answer is None else [Service(_host(one.target), one.port) for one in answer]
        services = [one for one in services if one.target]  # the root as target: "there is no such service"
        if answer is None or not services:
            raise Failure(f"DNS knows {host} and gives no SRV record for it; name a port to use its addresses")
        self._read_beside(answer.response)
        return services

    def _read_beside(self, response: dns.message.Message) -> None:
        """Servers send the targets' addresses along with SRV records, mostly."""
        for family in _FAMILIES:
            for one in response.additional:
                host = _host(one.name)
                if one.rdtype == family and host not in self._beside:
                    self._beside[host] = [record.address for record in one]
                    self.ttl = min(self.ttl, one.ttl)

    async def _ask(self, host: str, kind: dns.rdatatype.RdataType) -> dns.resolver.Answer | None:
        """Give the records of a kind, None when the name exists without any."""
        asked = f"DNS cannot resolve {host} ({dns.rdatatype.to_text(kind)})"
        try:
            answer = await self._resolver.resolve(host, kind, search=True, raise_on_no_answer=False, lifetime=_LIFETIME)
        except dns.resolver.NXDOMAIN as error:
            raise Failure(f"{asked}: there is no such name (NXDOMAIN)") from error
        except dns.exception.Timeout as error:
            raise Failure(f"{asked}: no answer within {_LIFETIME:g}s") from error
        except (dns.exception.DNSException, OSError) as error:
            raise Failure(f"{asked}: {error}") from error
        if answer.rrset is None:
            return None
        self.ttl = min(self.ttl, answer.chaining_result.minimum_ttl)
        return answer


def _host(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower().removesuffix(".")
