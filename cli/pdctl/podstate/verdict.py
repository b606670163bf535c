"""Whether to go on waiting: findings grow old, patience ends. Pure; the clock is the snapshots'."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from pdctl.podstate.findings import Finding, Kind
from pdctl.podstate.state import Snapshot


class Verdict(StrEnum):
    """What a deployment has come to."""

    COMING = "coming"
    READY = "ready"
    FAILED = "failed"
    LATE = "late"  # the time is over and nothing is plainly wrong


@dataclass(slots=True)
class Watched:
    """Judges one snapshot after the other.

    Args:
        timeout: seconds in all.
        unschedulable_after: seconds that pods may be without a node.
    """

    timeout: float
    unschedulable_after: float
    began: float | None = None
    findings: tuple[Finding, ...] = ()
    _since: dict[tuple[Kind, str], float] = field(default_factory=dict)

    def judge(self, snapshot: Snapshot, findings: tuple[Finding, ...]) -> Verdict:
        """Take a snapshot and its findings; what has gone since is forgotten."""
        self.began = snapshot.at if self.began is None else self.began
        self.findings = tuple(
            replace(one, patience=self.unschedulable_after) if one.kind is Kind.UNSCHEDULABLE else one
            for one in findings
        )
        self._since = {one.key: self._since.get(one.key, snapshot.at) for one in self.findings}
        if snapshot.complete:
            return Verdict.READY
        if self.hopeless(snapshot.at):
            return Verdict.FAILED
        return Verdict.LATE if snapshot.at - self.began > self.timeout else Verdict.COMING

    def hopeless(self, at: float) -> tuple[Finding, ...]:
        """Give the findings that have lasted longer than they may."""
        return tuple(one for one in self.findings if at - self._since[one.key] >= one.patience)
