"""The outcome of a run, as Markdown for people and as JSON for programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdsim.referee.case import Verdict
from pdsim.referee.court import Finding

MARKS = {Verdict.PASS: "pass", Verdict.FAIL: "**fail**", Verdict.NOT_APPLICABLE: "n/a"}


@dataclass(frozen=True, slots=True)
class Scorecard:
    """What was found out about one router.

    Args:
        router: its name.
        version: its version, or `unknown`.
        command: how it was started, with placeholders for what differs from run to run.
        date: day of the run, ISO 8601.
        findings: one for each case.
        metrics: whether there is a metrics page; no verdict.
    """

    router: str
    version: str
    command: str
    date: str
    findings: Sequence[Finding]
    metrics: str = "no metrics page"

    def count(self, verdict: Verdict, group: str | None = None) -> int:
        """Give how many cases ended so."""
        return sum(one.verdict is verdict and group in (None, one.case.group) for one in self.findings)

    @property
    def passed(self) -> bool:
        """Whether every case that applies was passed."""
        return not self.count(Verdict.FAIL)

    @property
    def summary(self) -> str:
        """Counts in one line."""
        given = Counter(one.verdict for one in self.findings)
        own = sum(one.verdict is Verdict.FAIL and bool(one.case.own_only) for one in self.findings)
        told = f"{given[Verdict.PASS]} of {len(self.findings)} cases passed, {given[Verdict.FAIL]} failed"
        if own:
            told += f" ({own} of them ask for what only pd-router has)"
        if given[Verdict.NOT_APPLICABLE]:
            told += f", {given[Verdict.NOT_APPLICABLE]} not applicable"
        return told

    def data(self) -> dict[str, Any]:
        """Give everything for JSON."""
        return {
            "simulated": True,
            "router": self.router,
            "version": self.version,
            "command": self.command,
            "date": self.date,
            "passed": self.count(Verdict.PASS),
            "failed": self.count(Verdict.FAIL),
            "not_applicable": self.count(Verdict.NOT_APPLICABLE),
            "metrics": self.metrics,
            "cases": [
                {
                    "group": one.case.group,
                    "name": one.case.name,
                    "sentence": one.case.sentence,
                    "own_only": one.case.own_only or None,
                    "verdict": one.verdict.value,
                    "evidence": one.evidence,
                    "seconds": round(one.seconds, 2),
                }
                for one in self.findings
            ],
        }

    def markdown(self) -> str:
        """Give the scorecard as a section of a page."""
        lines = [
            f"### {self.router} {self.version}",
            "",
            f"{self.date}, simulated engines. {self.summary}. For information: {self.metrics}.",
            "",
            "```text",
            self.command,
            "```",
            "",
            "| group | passed | failed | n/a |",
            "|---|---:|---:|---:|",
        ]
        groups = list(dict.fromkeys(one.case.group for one in self.findings))
        for group in groups:
            counts = " | ".join(str(self.count(verdict, group)) for verdict in Verdict)
            lines.append(f"| {group} | {counts} |")
        for group in groups:
            lines += ["", f"| {group} | | evidence |", "|---|---|---|"]
            for one in self.findings:
                if one.case.group == group:
                    star = " \\*" if one.case.own_only else ""
                    evidence = one.evidence.replace("|", "\\|").replace("*", "\\*")
                    lines.append(f"| `{one.case.name}`{star} | {MARKS[one.verdict]} | {evidence} |")
        if any(one.case.own_only for one in self.findings):
            lines += ["", "\\* Asks for something that no published router but pd-router has (see the list of cases)."]
        return "\n".join(lines) + "\n"
