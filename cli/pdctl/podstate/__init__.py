"""What pods are doing and why they are not ready: read from API objects, judged by pure rules, no I/O."""

from pdctl.podstate.findings import Finding, Kind, diagnose
from pdctl.podstate.state import Phase, Pod, Snapshot, Workload, read_pod, read_snapshot
from pdctl.podstate.verdict import Verdict, Watched

__all__ = [
    "Finding",
    "Kind",
    "Phase",
    "Pod",
    "Snapshot",
    "Verdict",
    "Watched",
    "Workload",
    "diagnose",
    "read_pod",
    "read_snapshot",
]
