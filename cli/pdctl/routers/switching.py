"""Another router before the engines of a local deployment."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pdctl import deployment
from pdctl.deployment import Deployment, Member
from pdctl.errors import PdctlError
from pdctl.routers import envoy, serving
from pdctl.routers.choice import Choice
from pdctl.routers.parts import DRAIN_SECONDS, parts
from pdctl.routers.programs import Programs, Say

_SUPERVISOR_SECONDS = 10.0
_LOOK_SECONDS = 0.1
_LOG_LINES = 12


def switch(name: str, router: Choice, programs: Programs, timeout: float, say: Say) -> None:
    """Start another router beside the one that serves, wait until it does too, and let the old one finish.

    Args:
        name: of the deployment.
        router: the other one.
        programs: llm-d's.
        timeout: seconds until it must serve.
        say: told what takes a while.

    Raises:
        PdctlError: it cannot be started or does not serve in time; the old one stays.
    """
    with deployment.locked(name, "switch.lock") as mine:
        if not mine:
            raise PdctlError(f"the router of {name} is being switched already", "wait until that is done")
        known = deployment.load(name)
        if not known.supervised:
            raise PdctlError(
                f"nobody supervises {name}, so nobody can start another router",
                f"run pdctl cleanup --name {name}, then deploy again",
            )
        _switch(known, router, programs, timeout, say)


def _switch(known: Deployment, router: Choice, programs: Programs, timeout: float, say: Say) -> None:
    old = [member for member in known.of_role("router") if not member.leaving]
    public = int(known.router_url.rpartition(":")[2])
    made = parts(router, known.engines, known.folder / "router", programs, say, public)
    _name(made.members, {member.name for member in known.members})
    names = [member.name for member in made.members]
    say(f"starting {router.title}: {', '.join(names)}")
    started: list[Member] = []
    try:
        for stage in made.stages:
            started += stage
            _want(replace(known, members=[*known.engines, *old, *started]))
            serving.wait(
                router, made, stage, known.model, len(known.engines), timeout, lambda: _check(known.name, names)
            )  # fmt: skip
    except BaseException:
        _want(replace(known, members=[*known.engines, *old]))
        raise
    if known.envoy_url and (left := envoy.drain(known.envoy_url, DRAIN_SECONDS)):
        say(f"{left} requests of the old router are cut: they took more than {DRAIN_SECONDS} s")
    say(f"{', '.join(member.name for member in old)}: told to end, finishing what there is")
    _want(
        replace(
            known, router=router.router, policy=router.policy, metrics_url=made.metrics_url, envoy_url=made.envoy_url,
            own_url="" if made.url == known.router_url else made.url, members=[*known.engines, *made.members],
        )
    )  # fmt: skip
    ending = {member.name for member in old}
    _until(
        lambda: not ending & {member.name for member in deployment.load(known.name).members},
        DRAIN_SECONDS + _SUPERVISOR_SECONDS, "the old router does not end",
    )  # fmt: skip


def _name(members: Sequence[Member], taken: set[str]) -> None:
    """Give each a name that no process of the deployment has."""
    for member in members:
        plain, number = member.name, 2
        while member.name in taken:
            member.name, number = f"{plain}-{number}", number + 1


def _want(wanted: Deployment) -> None:
    """Ask the supervisor for a deployment, and wait until it is at it."""
    wanted.save(wanted.wanted)
    try:
        _until(
            lambda: not wanted.wanted.exists(), _SUPERVISOR_SECONDS, f"the supervisor of {wanted.name} does not answer"
        )
    finally:
        wanted.wanted.unlink(missing_ok=True)


def _until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise PdctlError(otherwise, "look at pdctl status and pdctl logs")
        time.sleep(_LOOK_SECONDS)


def _check(name: str, started: Sequence[str]) -> None:
    known = deployment.load(name)
    for member in known.members:
        if member.name in started and member.exit is not None:
            log = known.log(member.name)
            lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if log.exists() else []
            raise PdctlError(
                f"{member.name} ended while starting ({member.ended}); the old router goes on",
                f"see the whole log: {log}", evidence=lines,
            )  # fmt: skip
