"""What is made quicker gives the same figures: outcomes of every policy beside those kept in `outcomes.json`.

`python tests/virtual/test_outcomes.py` writes the table anew, after a change that is meant to change outcomes.
"""

import json
from pathlib import Path

import pytest

from pdrouter.policies import POLICIES
from pdsim.virtual.figures import Slo, figures
from pdsim.virtual.fleet import Fleet, Setup
from pdsim.virtual.judge import Source, load
from pdsim.virtual.synthetic import Shape

KEPT = Path(__file__).with_name("outcomes.json")
NAMES = ("ttft_mean", "ttft_p99", "itl_mean", "itl_p99", "hit_share", "moved_bytes", "bypassed_share", "preempted")
SHAPES = {
    "conversations": ("conversations", 40.0, 0),
    "prefixes, little KV room": ("prefixes", 30.0, 60_000),
}  # fmt: skip


def outcome(policy: str, shape: str) -> dict[str, float]:
    name, rate, kv_tokens = SHAPES[shape]
    source = Source(f"synthetic:{name}", shape=Shape(requests=250, rate=rate))
    setup = Setup(prefill=3, decode=3, prefill_policy=policy, kv_tokens=kv_tokens)
    told = figures(Fleet(setup, load(source), 7).run(), Slo())
    return {one: told[one] for one in NAMES}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_run_comes_out_as_it_always_has(policy, shape):
    kept = json.loads(KEPT.read_text())[shape][policy]
    assert outcome(policy, shape) == pytest.approx(kept, rel=1e-9)


if __name__ == "__main__":
    table = {shape: {policy: outcome(policy, shape) for policy in sorted(POLICIES)} for shape in SHAPES}
    KEPT.write_text(json.dumps(table, indent=1) + "\n")
