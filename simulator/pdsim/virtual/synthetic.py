"""Traffic that is made up: each shape is one habit of real traffic, alone, so that policies can be judged on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from math import log
from random import Random

from pdsim.virtual.workload import Asked, Workload

BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """How much of a shape there is.

    Args:
        requests: in all.
        rate: requests a second, on average.
        input_tokens: of a prompt's own part, on average.
        output_tokens: of an answer, on average.
        seed: makes it repeat.
    """

    requests: int = 4000
    rate: float = 20.0
    input_tokens: int = 2000
    output_tokens: int = 300
    seed: int = 0


class _Maker:
    """Draws lengths and hands out block numbers that nobody else has."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.draw = Random(shape.seed)
        self._numbers: Iterator[int] = count()
        self._found: list[Asked] = []

    def length(self, mean: float) -> int:
        """Draw a length: exponential, so a few are long, and at least a twentieth of the mean."""
        return max(1, int(mean / 20 - mean * 0.95 * log(1 - self.draw.random())))

    def new(self, tokens: int) -> list[int]:
        """Give the numbers of blocks that nobody has had."""
        return [next(self._numbers) for _ in range(-(-tokens // BLOCK))]

    def ask(self, at: float, tokens: int, blocks: list[int], output: int, session: str | None = None) -> None:
        """Add a request."""
        self._found.append(Asked(at, tokens, output, blocks, BLOCK, session, f"request:{len(self._found)}"))

    def times(self, rate: float) -> Iterator[float]:
        """Give times of a Poisson process."""
        at = 0.0
        while True:
            at += self.draw.expovariate(rate)
            yield at

    def made(self, name: str) -> Workload:
        """Give what was added, in the order of time."""
        found = sorted(self._found, key=lambda one: one.arrival)[: self.shape.requests]
        return Workload(f"synthetic:{name}", found, BLOCK)


def uniform(shape: Shape) -> Workload:
    """Every prompt new and of one length, as benchmarks send them."""
    maker = _Maker(shape)
    for at in maker.times(shape.rate):
        maker.ask(at, shape.input_tokens, maker.new(shape.input_tokens), shape.output_tokens)
        if len(maker._found) == shape.requests:
            break
    return maker.made("uniform")


def prefixes(shape: Shape) -> Workload:
    """Prompts behind one of 200 shared beginnings, whose popularity falls as Zipf's law says."""
    maker = _Maker(shape)
    kinds = [maker.new(maker.length(2 * shape.input_tokens)) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(kinds))]
    for at in maker.times(shape.rate):
        shared = maker.draw.choices(kinds, weights)[0]
        own = maker.length(shape.input_tokens)
        maker.ask(at, len(shared) * BLOCK + own, shared + maker.new(own), maker.length(shape.output_tokens))
        if len(maker._found) == shape.requests:
            break
    return maker.made("prefixes")


def conversations(shape: Shape) -> Workload:
    """Talks of six turns on average behind one system prompt; each turn repeats all before, half a minute apart."""
    maker = _Maker(shape)
    system, turns = maker.new(1024), 6.0
    for number, begin in enumerate(maker.times(shape.rate / turns)):
        if number * turns > 1.5 * shape.requests:
            break
        at, known = begin, list(system)
        for _ in range(max(1, round(maker.draw.expovariate(1 / turns)))):
            asked, answer = maker.length(shape.input_tokens / 4), maker.length(shape.output_tokens)
            blocks = known + maker.new(asked)
            maker.ask(at, len(known) * BLOCK + asked, blocks, answer, f"talk:{number}")
            # What was asked and answered is part of the next turn, which only begins with whole blocks of this one's.
            known = known + blocks[len(known) : len(known) + asked // BLOCK] + maker.new(asked % BLOCK + answer)
            at += 5 + maker.draw.expovariate(1 / 25)
    return maker.made("conversations")


def agents(shape: Shape) -> Workload:
    """Agents: one of eight long instructions, then twenty quick steps, each a bit longer than the last."""
    maker = _Maker(shape)
    kinds, steps = [maker.new(6000) for _ in range(8)], 20.0
    for number, begin in enumerate(maker.times(shape.rate / steps)):
        if number * steps > 1.5 * shape.requests:
            break
        at, known = begin, list(maker.draw.choice(kinds))
        for _ in range(max(1, round(maker.draw.expovariate(1 / steps)))):
            result, answer = maker.length(shape.input_tokens / 2), maker.length(shape.output_tokens / 3)
            blocks = known + maker.new(result)
            maker.ask(at, len(known) * BLOCK + result, blocks, answer, f"agent:{number}")
            known = known + blocks[len(known) : len(known) + result // BLOCK] + maker.new(result % BLOCK + answer)
            at += 1 + maker.draw.expovariate(1 / 4)
    return maker.made("agents")


def bursts(shape: Shape) -> Workload:
    """Ten quiet seconds, then two in which as much comes as in the ten, behind 50 shared beginnings."""
    maker = _Maker(shape)
    kinds = [maker.new(maker.length(shape.input_tokens)) for _ in range(50)]
    quiet, loud = 10.0, 2.0
    for at in maker.times(shape.rate):
        round_, share = divmod(at, quiet + loud)
        place = share / (quiet + loud)
        moved = place * 2 * quiet if place < 0.5 else quiet + (place - 0.5) * 2 * loud
        shared, own = maker.draw.choice(kinds), maker.length(shape.input_tokens)
        tokens = len(shared) * BLOCK + own
        maker.ask(
            round_ * (quiet + loud) + moved, tokens, shared + maker.new(own), maker.length(shape.output_tokens)
        )  # fmt: skip
        if len(maker._found) == shape.requests:
            break
    return maker.made("bursts")


SHAPES: dict[str, Callable[[Shape], Workload]] = {
    "agents": agents,
    "bursts": bursts,
    "conversations": conversations,
    "prefixes": prefixes,
    "uniform": uniform,
}
