"""Whether a router serves yet."""

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pdctl.deployment import Member
from pdctl.errors import ExitCode, PdctlError
from pdctl.routers.choice import Choice
from pdctl.routers.parts import Parts

_LOOK_SECONDS = 0.1
_PROMPTS = "/v1/completions"
_PROBE = {"prompt": "Is anybody there?", "max_tokens": 2, "temperature": 0}


def wait(
    choice: Choice, made: Parts, stage: list[Member], model: str, engines: int, seconds: float,
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Wait until every process of a stage answers; and, if clients are answered there, until a prompt was served.

    Args:
        choice: which router.
        made: its processes.
        stage: those that were just started.
        model: served model name.
        engines: how many engines it must know.
        seconds: how long to wait.
        check: called again and again; raises when a process has ended.

    Raises:
        PdctlError: it does not serve in time.
    """
    deadline = time.monotonic() + seconds
    waiting = [member.ready_url for member in stage]
    if choice.router == "ours":  # another router may answer at the same port: the metrics are its own
        waiting = [made.metrics_url]
    if made.url in {member.url for member in stage}:
        waiting.append(made.url + _PROMPTS)
    with httpx.Client(timeout=10) as client:
        while True:
            check()
            while waiting and _answers(client, waiting[0], choice, engines, model):
                del waiting[0]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise PdctlError(
                    f"{choice.title} does not serve within {seconds:g} s; no answer from {waiting[0]}",
                    "see its log, or give it more time with --timeout", ExitCode.TIMEOUT,
                )  # fmt: skip
            time.sleep(_LOOK_SECONDS)


def _answers(client: httpx.Client, url: str, choice: Choice, engines: int, model: str) -> bool:
    try:
        if url.endswith(_PROMPTS):
            return client.post(url, json={"model": model} | _PROBE).status_code == 200
        answer = client.get(url)
    except httpx.HTTPError:
        return False
    if answer.status_code != 200 or choice.router != "ours":
        return answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    healthy = (one.value for family in families if family.name == "pd_router_engine_healthy" for one in family.samples)
    return sum(healthy) >= engines
