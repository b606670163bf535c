"""How many engines a workload needs: a first guess by arithmetic, then trials."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from pdsim.timing import Chunk, Profile
from pdsim.virtual.figures import Slo
from pdsim.virtual.fleet import Setup
from pdsim.virtual.judge import Source, load

BUSY = 0.9  # share of the time for which engines are busy in the first guess
_BISECTIONS = 4
_MOST_LOAD = 3.0


@dataclass(frozen=True)
class Trial:
    """What a setup gave, seed by seed."""

    setup: Setup
    figures: Sequence[Mapping[str, float]]

    def mean(self, name: str) -> float:
        """Give a figure's mean over seeds."""
        return sum(one[name] for one in self.figures) / len(self.figures)


@dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        best: the fewest engines that do it.
        saturates_at: by how much the load may grow until they do not.
        limit: what fails then.
        changes: by what was changed, the share of good requests at a load above that.
    """

    best: Trial
    saturates_at: float
    limit: str
    changes: Mapping[str, float] = field(default_factory=dict)


def guess(basis: Setup, source: Source, slo: Slo, profile: Profile) -> tuple[int, int]:
    """Give prefill and decode engines that could do it if nobody ever waited and nothing was cached."""
    workload = load(source)
    seconds = max(workload.seconds, 1.0) / basis.speed
    step = profile.max_num_batched_tokens
    working = 0.0
    for one in workload.requests:
        full, rest = divmod(one.tokens, step)
        for number in range(full):
            working += profile.step_seconds([Chunk(step, number * step)], 0, 0)
        if rest:
            # Short prompts share a step, and with it what a step costs beside its tokens.
            working += profile.step_seconds([Chunk(rest, full * step)], 0, 0) - profile.prefill_base * (1 - rest / step)
    prefill = max(1, ceil(working / seconds / BUSY))
    rate = len(workload.requests) / seconds
    context = sum(one.tokens + one.output / 2 for one in workload.requests) / len(workload.requests)
    output = sum(one.output for one in workload.requests) / len(workload.requests)
    size = basis.kv_tokens or profile.kv_cache_tokens
    decode = 1
    while decode < 1024:
        # Little's law, with the time between tokens that so many requests on an engine have.
        requests = held = 0.0
        for _ in range(20):
            itl = profile.decode_run(ceil(requests), int(held))[0]
            if held > size:
                break
            requests = rate / decode * output * itl
            held = requests * context
        if itl <= slo.itl * BUSY and held <= size * BUSY:
            break
        decode += 1
    return prefill, decode


def make_plan(
    basis: Setup, source: Source, slo: Slo, share: float, most: int, profile: Profile, tried: Callable[[Setup], Trial]
) -> Plan | None:
    """Find the fewest engines for which a share of the requests is good, or None when `most` are too few.

    Args:
        basis: everything but the numbers of engines.
        source: what is asked.
        slo: what a good request is.
        share: how many must be good.
        most: engines in all.
        profile: times of the GPU.
        tried: runs a setup.
    """
    known: dict[tuple[int, int, float], Trial] = {}

    def at(prefill: int, decode: int, speed: float = basis.speed) -> Trial:
        key = prefill, decode, speed
        if key not in known:
            known[key] = tried(replace(basis, prefill=prefill, decode=decode, speed=speed))
        return known[key]

    def good(trial: Trial) -> bool:
        return trial.mean("good_share") >= share

    prefill, decode = guess(basis, source, slo, profile)
    # What is cached needs no engine, so the guess may be too high, in both.
    while prefill + decode <= most and not good(at(prefill, decode)):
        trial = at(prefill, decode)
        if trial.mean("good_ttft") <= trial.mean("good_itl"):
            prefill += 1
        else:
            decode += 1
    if prefill + decode > most:
        return None
    while True:
        if prefill > 1 and good(at(prefill - 1, decode)):
            prefill -= 1
        elif decode > 1 and good(at(prefill, decode - 1)):
            decode -= 1
        else:
            break
    best = at(prefill, decode)
    low, high = 1.0, _MOST_LOAD
    if good(at(prefill, decode, basis.speed * high)):
        return Plan(best, high, "nothing up to that load")
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if good(at(prefill, decode, basis.speed * middle)):
            low = middle
        else:
            high = middle
    over = at(prefill, decode, basis.speed * high)
    limit = (
        "first tokens (prefill)" if over.mean("good_ttft") <= over.mean("good_itl") else "times between tokens (decode)"
    )
    speed = basis.speed * low * 1.2
    twice = 2 * (basis.kv_tokens or profile.kv_cache_tokens)
    changed = {
        "prefill": replace(basis, prefill=prefill + 1, decode=decode, speed=speed),
        "decode": replace(basis, prefill=prefill, decode=decode + 1, speed=speed),
        "kv": replace(basis, prefill=prefill, decode=decode, speed=speed, kv_tokens=twice),
    }  # fmt: skip
    if basis.link:
        changed["link"] = replace(basis, prefill=prefill, decode=decode, speed=speed, link=2 * basis.link)
    return Plan(best, low, limit, {name: tried(setup).mean("good_share") for name, setup in changed.items()})
