"""Fits the time model to a few measurements of another GPU.

What one engine can show is fitted: prefill by length, times between tokens by batch and context. What it takes two
engines or whole fleets to show (transfers, frontends) stays as in the profile that the fit begins from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pdsim.timing.model import Profile
from pdsim.timing.replay import burst_seconds

# What is scaled by one factor: attention over new and over cached tokens is the same work.
_FACTORS: tuple[tuple[str, ...], ...] = (
    ("prefill_base", "context_base"),
    ("prefill_floor",),
    ("prefill_per_token",),
    ("pair", "context_pair"),
    ("decode_base",),
    ("decode_per_sequence", "decode_per_sequence_squared"),
    ("decode_per_context_token",),
)
_ROUNDS = 60
_MOST = 20.0  # how far off the profile that the fit begins from a number may be
_PRIOR = 0.02  # weight of that profile where the measurements tell nothing

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One figure of an engine.

    Args:
        seconds: what it took.
        prompt: tokens of a prompt that was computed alone; 0 for a time between tokens.
        batch: sequences that were decoded together.
        context: tokens that each of them had.
    """

    seconds: float
    prompt: int = 0
    batch: int = 0
    context: int = 0

    @property
    def name(self) -> str:
        """What it is."""
        return f"prefill {self.prompt}" if self.prompt else f"itl {self.batch} x {self.context}"

    def model(self, profile: Profile) -> float:
        """Give what a profile says of it, seconds."""
        if self.prompt:
            return burst_seconds(profile, [(self.prompt, 0)])
        return profile.step_seconds((), self.batch, self.batch * self.context)


def _scaled(basis: Profile, logarithms: Floats) -> Profile:
    values: dict[str, Any] = {
        name: getattr(basis, name) * float(np.exp(one))
        for names, one in zip(_FACTORS, logarithms, strict=True)
        for name in names
    }
    return replace(basis, **values)


def fit(measured: Sequence[Measured], basis: Profile, name: str) -> Profile:
    """Fit by relative error (Levenberg and Marquardt), beginning from another profile.

    Args:
        measured: at least one figure.
        basis: gives what is not fitted, and what is where the figures tell nothing.
        name: of the new profile.
    """

    def errors(logarithms: Floats) -> Floats:
        profile = _scaled(basis, logarithms)
        off = [np.log(one.model(profile) / one.seconds) for one in measured]
        return np.array([*off, *(_PRIOR * logarithms)])

    at = np.zeros(len(_FACTORS))
    now, damping = errors(at), 1e-2
    for _ in range(_ROUNDS):
        slopes = np.stack([(errors(at + step) - now) / 1e-4 for step in np.eye(len(at)) * 1e-4], axis=1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.eye(len(at)), -slopes.T @ now)
        tried = np.clip(at + step, -np.log(_MOST), np.log(_MOST))
        then = errors(tried)
        if then @ then < now @ now:
            at, now, damping = tried, then, damping / 3
        else:
            damping *= 4
    return replace(_scaled(basis, at), name=name)
