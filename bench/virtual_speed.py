"""How quick the virtual fleet is: `make bench-virtual TRACE=conversation_trace.jsonl`.

For each policy the simulated requests in a second of CPU time, the best of some runs, and what of a request's time is
the policy's own: its calls are timed one by one, less what timing costs.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import pdsim.virtual.engine
from pdrouter.policies import POLICIES, Commons, Policy, PolicyFactory, RoleName
from pdsim.virtual.fleet import Fleet, Setup
from pdsim.virtual.judge import Source, load
from pdsim.virtual.workload import Workload

CALLS = ("choose", "bypass", "uncached", "routed", "prefilled", "handed_over", "generated")


class Watch:
    """Adds up the time of calls."""

    def __init__(self) -> None:
        self.nanoseconds = self.calls = 0
        self._kinds: dict[type, type] = {}

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give the call with its time taken."""

        @wraps(call)
        def measured(*given: Any) -> Any:
            begin = time.thread_time_ns()
            found = call(*given)
            self.nanoseconds += time.thread_time_ns() - begin
            self.calls += 1
            return found

        return measured

    def over(self, make: PolicyFactory) -> PolicyFactory:
        """Give a factory of policies whose calls are timed. They stay of one kind, as the router asks for that."""

        def factory(role: RoleName, commons: Commons | None = None) -> Policy:
            policy = make(role, commons)
            kind = self._kinds.setdefault(type(policy), type("Timed", (), {}))
            watched: Any = kind()
            watched.name, watched.uses_key = policy.name, policy.uses_key
            for name in (*CALLS, "answered", "gone"):
                if hasattr(policy, name):
                    setattr(watched, name, self.timed(getattr(policy, name)))
            found: Policy = watched
            return found

        return factory


def seconds(policy: str, speed: float, workload: Workload) -> float:
    """Give the CPU time of a run."""
    gc.collect()
    fleet = Fleet(Setup(prefill_policy=policy, speed=speed), workload, 0)
    begin = time.process_time()
    fleet.run()
    return time.process_time() - begin


def own(policy: str, speed: float, workload: Workload) -> float:
    """Give the CPU time of a policy's calls in a run."""
    watch, make = Watch(), POLICIES[policy]
    idle = Watch()
    nothing = idle.timed(lambda: None)
    for _ in range(100_000):
        nothing()
    POLICIES[policy] = watch.over(make)
    try:
        seconds(policy, speed, workload)
    finally:
        POLICIES[policy] = make
    return (watch.nanoseconds - watch.calls * idle.nanoseconds / idle.calls) / 1e9


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", help="Mooncake's conversation_trace.jsonl")
    parser.add_argument("--speed", type=float, default=6.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--policy", default=",".join(sorted(POLICIES)), help="names with commas between them")
    options = parser.parse_args()
    workload = load(Source(options.trace))
    many = len(workload.requests)
    how = "plain Python" if str(pdsim.virtual.engine.__file__).endswith(".py") else "compiled"
    print(f"{many} requests at {options.speed:g}x, best of {options.runs}, {how}\n")
    print("| policy | requests/s | us a request | of which the policy |\n|---|---|---|---|")
    for policy in options.policy.split(","):
        whole, alone = (
            min(one(policy, options.speed, workload) for _ in range(options.runs)) / many for one in (seconds, own)
        )
        print(f"| {policy} | {1 / whole:,.0f} | {whole * 1e6:.1f} | {alone * 1e6:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
