"""A virtual engine does what the simulated engine's scheduler does, at the same times, without taking each step."""

import random
from dataclasses import replace
from operator import mul

import pytest

from pdsim.timing import load_profile
from pdsim.virtual.clock import Clock
from pdsim.virtual.engine import Engine, Sequence
from virtual.reference import ReferenceEngine, World

PROFILE = load_profile("h200")


class Handover:
    """Hands each prefilled sequence to a decode engine at once."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.decode: Engine | None = None
        self.prefill: Engine | None = None
        self.firsts: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.cached: dict[str, int] = {}
        self.prefills: dict[str, float] = {}

    def prefilled(self, now: float, sequence: Sequence) -> None:
        name, keys, output = sequence.about
        self.prefills[name] = now
        self.cached[name] = sequence.cached
        assert self.decode is not None
        assert self.prefill is not None
        source = (self.prefill, sequence)
        self.decode.submit(now, Sequence(sequence.about, keys, sequence.length, output, source))

    def began(self, now: float, sequence: Sequence) -> None:
        self.firsts[sequence.about[0]] = sequence.first

    def decoded(self, now: float, sequence: Sequence) -> None:
        self.ends[sequence.about[0]] = now

    def fetched(self, now: float, sequence: Sequence, blocks: int) -> None:
        pass


def requests(seed: int, count: int, longest: int, most_output: int, gap: float) -> list[tuple[float, list[int], int]]:
    """Draw (arrival, block numbers that stand for 128 equal tokens, tokens after them, output); some begin alike."""
    draw = random.Random(seed)
    known: list[list[int]] = [[]]
    found = []
    time = 0.0
    for number in range(count):
        time += draw.expovariate(1 / gap)
        blocks = list(draw.choice(known)) if draw.random() < 0.5 else []
        blocks = blocks + [number * 1000 + at for at in range(draw.randrange(longest // 128))]
        known.append(blocks)
        rest = draw.randrange(1, 128)
        found.append((time, blocks, rest, draw.randrange(1, most_output)))
    return found


def virtual(asked, profile, blocks, disaggregated):
    clock = Clock()
    listener = Handover(clock)

    def engine(name: str, keeps: bool) -> Engine:
        return Engine(name, keeps, profile, clock, listener, key_tokens=128, kv_tokens=blocks * 128)

    decode = listener.decode = engine("d", False)
    prefill = listener.prefill = engine("p", True)
    for number, (time, keys, rest, output) in enumerate(asked):
        about = (str(number), keys, output)
        tokens = len(keys) * 128 + rest

        def send(now, about=about, tokens=tokens):
            if disaggregated:
                prefill.submit(now, Sequence(about, about[1], tokens, 1))
            else:
                decode.submit(now, Sequence(about, about[1], tokens, about[2]))

        clock.at(time, lambda now, about, send=send: send(now), None)
    clock.run()
    return listener, decode, prefill


def reference(asked, profile, blocks, disaggregated):
    world = World()
    decode, prefill = (ReferenceEngine(world, profile, blocks, keeps) for keeps in (False, True))
    prompts = {}

    def hand_over(sequence):
        decode.submit(
            sequence.request_id, prompts[sequence.request_id], asked[int(sequence.request_id)][3], (prefill, sequence)
        )

    prefill.done = hand_over
    for number, (time, keys, rest, output) in enumerate(asked):
        prompt = [key for key in keys for _ in range(128)] + [10**9 + number] * rest
        prompts[str(number)] = prompt

        def send(number=number, prompt=prompt, output=output):
            if disaggregated:
                prefill.submit(str(number), prompt, 1, None)
            else:
                decode.submit(str(number), prompt, output, None)

        world.at(time, send)
    world.run()
    return decode, prefill


CASES = {
    "light": (60, 3000, 60, 0.05, 4000),
    "long prompts in chunks": (40, 30_000, 40, 0.3, 4000),
    "a full batch": (150, 1500, 200, 0.005, 4000),
    "little room": (60, 3000, 300, 0.01, 120),
}


@pytest.mark.parametrize("disaggregated", [True, False], ids=["two engines", "one engine"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_comes_when_the_scheduler_stepped_one_by_one_gives_it(case, disaggregated, seed):
    count, longest, output, gap, blocks = CASES[case]
    asked = requests(seed, count, longest, output, gap)
    profile = replace(PROFILE, name="test")
    told, decode, prefill = virtual(asked, profile, blocks, disaggregated)
    expected, expected_prefill = reference(asked, profile, blocks, disaggregated)
    # Blocks that a sequence grows into are taken when its run of steps ends; where they are scarce that shows: others
    # are let in some steps earlier or later, and each that joins makes a step longer.
    most = 0.04 if case == "little room" else 1e-6
    assert bool(decode.preempted) == bool(expected.scheduler.preempted)
    assert told.firsts == pytest.approx(expected.firsts, abs=most)
    assert told.ends == pytest.approx(expected.ends, abs=most)
    assert len(told.ends) == count
    if not decode.preempted:
        lengths, counts = zip(*decode.gaps, strict=True)
        assert sum(counts) == len(expected.gaps)
        assert sum(map(mul, lengths, counts)) == pytest.approx(sum(expected.gaps), abs=1e-4)
        assert max(lengths) == pytest.approx(max(expected.gaps), rel=0.01), "who joins holds others up for a step"
    if disaggregated:
        assert told.prefills == pytest.approx(expected_prefill.ends, abs=most)
        assert told.cached == expected_prefill.cached
    for engine, other in ((decode, expected), (prefill, expected_prefill)):
        assert engine.cache.free == engine.cache.total == other.pool.free


def test_a_run_of_decode_steps_takes_as_long_as_the_steps():
    first, growth = PROFILE.decode_run(40, 60_000)
    for steps in (1, 2, 300):
        one_by_one = sum(PROFILE.step_seconds((), 40, 60_000 + 40 * step) for step in range(steps))
        assert steps * first + growth * steps * (steps - 1) / 2 == pytest.approx(one_by_one)
