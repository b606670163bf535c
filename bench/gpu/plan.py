"""What is measured, in which order."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OURS, THEIRS, DIRECT, PLAIN = "pd-router", "vllm-router", "direct", "nginx"

# Flags of our router by the name of a variant. With one engine of a role a policy has nothing to choose: what differs
# is whether decode computes a prompt itself when that is thought to be quicker (the bypass of pd_cost for decode).
VARIANTS: dict[str, tuple[str, ...]] = {
    OURS: (),
    f"{OURS}:pd_cost": ("--policy", "pd_cost"),
    f"{OURS}:pd_cost-no-bypass": ("--prefill-policy", "pd_cost", "--decode-policy", "least_tokens"),
    f"{OURS}:no-prefill": ("--admin-port", "0"),
    # Engines are not asked for token ids, and a stream ends with its engine: what following streams costs.
    f"{OURS}:no-continue": ("--no-continue-streams",),
}
ROUTERS = (*VARIANTS, THEIRS, DIRECT, PLAIN)
CONCURRENCIES = (32, 8, 64, 128, 1)  # by what they tell, should the time not suffice for all


@dataclass(frozen=True, slots=True)
class Point:
    """One run of `vllm bench serve`.

    Args:
        router: one of `ROUTERS`; `direct` is the decode engine alone, which computes prompts too; `nginx` is a plain
            proxy before it, which reads and writes each token once and understands nothing.
        concurrency: requests at once.
        prompts: requests in all.
        repeat: which of the runs, from 1.
    """

    router: str
    concurrency: int
    prompts: int
    repeat: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.router} c{self.concurrency} run {self.repeat}"

    @property
    def seed(self) -> int:
        """Seed of its prompts, unlike that of any other point: no engine may have a prompt in its cache."""
        return zlib.crc32(self.key.encode()) % 2**31

    @property
    def seconds(self) -> float:
        """Guess how long it takes at most, the router's start included: 200 tokens at up to 12 ms apart."""
        return 30 + self.prompts * 2.5 / min(self.concurrency, 32)


def points(
    routers: Sequence[str], concurrencies: Sequence[int], repeats: int, prompts: int, prompts_alone: int
) -> Iterator[Point]:
    """Give all points. Routers take turns, in turn the first, so that what drifts meets all alike.

    Args:
        routers: of `ROUTERS`.
        concurrencies: the most telling first.
        repeats: runs of each.
        prompts: requests of a run.
        prompts_alone: requests of a run with one at a time, which take a second each.
    """
    for repeat in range(1, repeats + 1):
        for number, concurrency in enumerate(concurrencies):
            turn = (number + repeat - 1) % len(routers)
            for router in (*routers[turn:], *routers[:turn]):
                yield Point(router, concurrency, prompts_alone if concurrency == 1 else prompts, repeat)
