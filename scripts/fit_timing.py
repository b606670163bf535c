# /// script
# requires-python = ">=3.11"
# dependencies = ["scipy>=1.16", "pd-simulator"]
#
# [tool.uv.sources]
# pd-simulator = { path = "../simulator", editable = true }
# ///
"""Fit the time model to the figures in a profile's JSON and write the coefficients back into it.

    uv run scripts/fit_timing.py

Relative errors of all points are minimised together, single outliers weigh less (soft L1). Deterministic.
"""

import json
import pathlib
from dataclasses import asdict, replace

import numpy as np
from scipy.optimize import least_squares

from pdsim.timing.model import Profile
from pdsim.timing.replay import points

PATH = pathlib.Path(__file__).parent.parent / "simulator/pdsim/timing/h200.json"
MS, US, NS = 1e-3, 1e-6, 1e-9
# where the search begins, and what stays as it is (None): (start, lower bound)
FREE = {
    "frontend_base": (1.0 * MS, 0.5 * MS),
    "frontend_per_token": (1.0 * US, 0.0),
    "decode_base": (4.85 * MS, 0.0),
    "decode_per_sequence": (9.0 * US, 0.0),
    "decode_per_sequence_squared": (33.0 * NS, 0.0),
    "decode_per_context_token": (28.5 * NS, 0.0),
    "prefill_base": (4.6 * MS, 0.0),
    "prefill_floor": (9.3 * MS, 0.0),
    "prefill_per_token": (23.0 * US, 0.0),
    "pair": (1.0 * NS, 0.0),
    "context_pair": (0.8 * NS, 0.0),
    "context_base": (4.6 * MS, 0.0),
    "transfer_base": (5.0 * MS, 0.0),
    "transfer_per_token": (1.0 * US, 0.0),
    "transfer_notice": (7.0 * MS, 0.0),
}
FIXED = {
    "answer": 0.3 * MS,
    "transfer_share": 0.03,
    "max_num_batched_tokens": 8192,
    # not in the figures that are fitted, which come from prompts of token ids: vLLM's own setting, and what is left of
    # the first-token time at concurrency 1 through vllm-router (text prompts), shared by both legs
    "tokenize_window": 2.0 * MS,
    "tokenize_per_token": 5.5 * US,
    # nor is this in them: fitted to how long tokens took in all, at 32, 64 and 128 requests at once, in
    # docs/measured/two-h200.json (docs/decisions/0014-…); what it takes, `transfer_notice` had before
    "decode_join": 2.5 * MS,
}


def main() -> None:
    """Fit and write."""
    told = json.loads(PATH.read_text())
    kv = {"kv_bytes_per_token": told["kv"]["bytes_per_token"], "kv_cache_tokens": told["kv"]["cache_tokens"]}
    start = Profile(name="h200", **{name: value for name, (value, _) in FREE.items()}, **FIXED, **kv)
    scale = np.array([value for value, _ in FREE.values()])

    def profile(shares: np.ndarray) -> Profile:
        return replace(start, **{name: float(value) for name, value in zip(FREE, shares * scale, strict=True)})

    def errors(shares: np.ndarray) -> list[float]:
        return [point.error for point in points(profile(shares))]

    lower = np.array([bound for _, bound in FREE.values()]) / scale
    fitted = least_squares(errors, np.ones(len(FREE)), bounds=(lower, 20), loss="soft_l1", f_scale=0.03)
    best = profile(fitted.x)
    coefficients = {name: value for name, value in asdict(best).items() if name != "name"}
    told["model"] = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in coefficients.items()
    }
    PATH.write_text(json.dumps(told, indent=1) + "\n")
    print(f"largest error {max(map(abs, errors(fitted.x))):.1%}; coefficients written to {PATH.name}")


if __name__ == "__main__":
    main()
