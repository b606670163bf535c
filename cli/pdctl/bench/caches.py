"""Prefix caches emptied, so that no run finds the prompts of an earlier one."""

import httpx

from pdctl.errors import PdctlError
from pdctl.targets.target import Target


def reset(target: Target) -> None:
    """Empty the prefix cache of every engine of a deployment.

    Raises:
        PdctlError: an engine does not do it.
    """
    with httpx.Client(timeout=30) as client:
        for part in target.health():
            if part.role == "router":
                continue
            try:
                client.post(part.url + "/reset_prefix_cache").raise_for_status()
            except httpx.HTTPError as error:
                raise PdctlError(
                    f"{part.name} does not empty its prefix cache: {error}",
                    "real engines need VLLM_SERVER_DEV_MODE=1 for that; or measure with --keep-caches",
                ) from error
