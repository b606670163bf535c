"""All cases, group by group."""

from pdsim.referee.case import Case
from pdsim.referee.cases import abort, batch, failover, fairness, security, wire

GROUPS = (wire.wire, batch.batch, abort.abort, failover.failover, fairness.fairness, security.security)
CASES: tuple[Case, ...] = tuple(case for group in GROUPS for case in group.cases)
