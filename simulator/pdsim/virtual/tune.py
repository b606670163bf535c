"""A better policy and split for engines that are there."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pdsim.virtual.fleet import Setup
from pdsim.virtual.plan import Trial

_AS_GOOD = 0.002  # shares of good requests that are no further apart are equal; first tokens decide then
_WORTH = 0.98  # of the mean first-token time: for less than 2 % nobody should change what runs


def better(one: Trial, other: Trial, share: float = 1.0) -> bool:
    """Say whether a setup keeps more promises than another, or as many with first tokens in a share of its time."""
    gain = one.mean("good_share") - other.mean("good_share")
    if abs(gain) > _AS_GOOD:
        return gain > 0
    return one.mean("ttft_mean") < share * other.mean("ttft_mean")


def tune(current: Setup, policies: Sequence[str], tried: Callable[[Setup], Trial]) -> tuple[Trial, Trial]:
    """Give what the current setup does, and the best that was found with as many engines.

    First the policy is chosen, then engines change sides one by one as long as that helps.

    Args:
        current: how it is now.
        policies: names to try.
        tried: runs a setup.
    """
    now = best = tried(current)
    for name in policies:
        if (name, "") != (current.prefill_policy, current.decode_policy):
            trial = tried(replace(current, prefill_policy=name, decode_policy=""))
            if better(trial, best):
                best = trial
    for step in (1, -1):
        moved = best
        while True:
            prefill, decode = moved.setup.prefill + step, moved.setup.decode - step
            if prefill < 1 or decode < 1:
                break
            trial = tried(replace(moved.setup, prefill=prefill, decode=decode))
            if not better(trial, moved):
                break
            moved = trial
        if moved is not best:
            best = moved
            break
    return now, best if better(best, now, _WORTH) else now
