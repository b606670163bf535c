"""A check: verdict, evidence, fix. Preflight and doctor are made of them."""

from dataclasses import dataclass
from enum import StrEnum


class Mark(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Args:
        name: what was looked at.
        told: what was seen.
        fix: what to do when it is not well.
    """

    name: str
    mark: Mark
    told: str
    fix: str = ""
