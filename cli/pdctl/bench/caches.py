"""Prefix caches emptied, so that no run finds the prompts of an earlier one."""

from pdctl.errors import PdctlError
from pdctl.targets.target import Target


class CachesKeptError(PdctlError):
    """Engines have no way to empty their caches."""


def reset(target: Target) -> None:
    """Empty the prefix cache of every engine of a deployment.

    Raises:
        CachesKeptError: they offer no such thing.
        PdctlError: an engine does not do it.
    """
    for member, status in target.post("/reset_prefix_cache").items():
        if status == 404:
            raise CachesKeptError(
                f"{member} cannot empty its prefix cache, where prompts of an earlier run with this seed are found",
                "start the engines with VLLM_SERVER_DEV_MODE=1, or give --keep-caches and another --seed each time",
            )
        if status != 200:
            what = "does not answer" if status is None else f"answers {status}"
            raise PdctlError(
                f"{member} does not empty its prefix cache: it {what}",
                f"look at pdctl status{target.flags}; or measure with --keep-caches",
            )
