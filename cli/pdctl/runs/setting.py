"""Where and with what a run was made: machine, versions, fleet, values."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import httpx
import orjson
import psutil

from pdctl.errors import PdctlError
from pdctl.targets import Target, find
from pdsim.engine.tokenizer import Tokenizer


def machine() -> dict[str, Any]:
    """Tell what this machine is."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_at_start": os.getloadavg()[0],
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Tell the versions of what takes part."""
    told = {"python": platform.python_version()}
    for package in ("pdctl", "pd-router", "pd-simulator"):
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            continue
    return told


def values_hash(settings: dict[str, Any]) -> str:
    """Give 12 digits that change when a setting of the deployment does."""
    return sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Place:
    """What is measured.

    Args:
        url: base URL, without `/v1`.
        model: served model name.
        target: the deployment behind it, where it is one of ours.
        settings: how it is set up, for people and for `values_hash`.
        served: what the server says of itself.
    """

    url: str
    model: str
    target: Target | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    served: dict[str, Any] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether its engines are simulated; a server that says so counts too."""
        return (self.target is not None and self.target.simulated) or bool(self.served.get("simulated"))

    @property
    def gpus(self) -> int | None:
        """How many GPUs serve, simulated ones where engines are."""
        roles = [self.settings.get(role) for role in ("prefill", "decode")]
        return sum(count for count in roles if isinstance(count, int)) or None

    def told(self) -> dict[str, Any]:
        """Give what a run writes down of it."""
        return {
            "model": self.model,
            "simulated": self.simulated,
            "fleet": {"url": self.url, "gpus": self.gpus, **self.settings, **self.served},
            "values_hash": values_hash(self.settings),
            "image": self.settings.get("image"),
        }


def described(url: str, model: str | None) -> Place:
    """Describe any OpenAI server.

    Raises:
        PdctlError: it does not answer.
    """
    base = url.rstrip("/").removesuffix("/v1")
    served: dict[str, Any] = {}
    with httpx.Client(timeout=10, headers=authorization()) as client:
        try:
            answer = client.get(base + "/v1/models")
            if model is None:
                answer.raise_for_status()
            told: str = model or answer.json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise PdctlError(
                f"{base}/v1/models does not tell a model: {error}",
                "check that the server runs, or name the model by --model",
            ) from error
        for path in ("/version", "/tokenizer_info"):
            try:
                answer = client.get(base + path)
                said = answer.json() if answer.status_code == 200 else {}
            except (httpx.HTTPError, ValueError):
                continue
            if "version" in said:
                served["version"] = said["version"]
            # a router passes this on: simulated engines are known by their tokenizer, whatever stands before them
            if said.get("chat_template") == Tokenizer().chat_template:
                served["simulated"] = True
    return Place(base, told, served=served)


def authorization() -> dict[str, str]:
    """Give the header with the API key of the environment, if any."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def placed(
    url: str | None, name: str | None, namespace: str | None = None, context: str | None = None,
    model: str | None = None,
) -> Iterator[Place]:  # fmt: skip
    """Describe any server (`url`) or a deployment, which can be reached for as long as the context lasts.

    Raises:
        PdctlError: there is none, or its router does not answer.
    """
    if url is not None:
        yield described(url, model)
        return
    target = find(name, namespace, context)
    try:
        with target.reached() as reached:
            place = described(reached, model)
            yield Place(place.url, place.model, target, target.settings, place.served)
    finally:
        target.close()


def command() -> list[str]:
    """Give the command line that runs, for repeating it."""
    return ["pdctl", *sys.argv[1:]]
