"""A scorecard says all that was found, and who may be blamed for what."""

from pdsim.referee.bench import Bench
from pdsim.referee.case import Case, Group, Verdict
from pdsim.referee.cases import CASES
from pdsim.referee.court import Finding
from pdsim.referee.scorecard import Scorecard

group = Group("wire", alone=True)


@group.case(own_only="a router that does magic")
async def does_magic(_: Bench) -> str:
    """Magic is done,
    by the router."""
    return "seen"


def card(*verdicts: Verdict) -> Scorecard:
    findings = [Finding(group.cases[0], verdict, "a | b * c", 0.5) for verdict in verdicts]
    return Scorecard("mine", "1.2", "pd-referee --router mine", "2026-01-02", findings)


def test_a_case_is_told_by_its_function() -> None:
    (case,) = group.cases
    assert (case.name, case.group, case.alone) == ("does-magic", "wire", True)
    assert case.sentence == "Magic is done, by the router."


def test_a_card_is_passed_when_nothing_failed() -> None:
    assert card(Verdict.PASS, Verdict.NOT_APPLICABLE).passed
    assert not card(Verdict.PASS, Verdict.FAIL).passed


def test_the_card_names_router_command_date_and_evidence_and_marks_what_only_ours_can() -> None:
    made = card(Verdict.PASS, Verdict.FAIL, Verdict.NOT_APPLICABLE)
    page = made.markdown()
    for told in (
        "### mine 1.2", "2026-01-02, simulated engines", "pd-referee --router mine", "| wire | 1 | 1 | 1 |",
        "1 of 3 cases passed, 1 failed (1 of them ask for what only pd-router has), 1 not applicable",
        "| `does-magic` \\* | **fail** | a \\| b \\* c |",
    ):  # fmt: skip
        assert told in page
    data = made.data()
    assert (data["passed"], data["failed"], data["not_applicable"]) == (1, 1, 1)
    assert data["cases"][1] == {
        "group": "wire", "name": "does-magic", "sentence": "Magic is done, by the router.", "verdict": "fail",
        "own_only": "a router that does magic", "evidence": "a | b * c", "seconds": 0.5,
    }  # fmt: skip


def test_every_case_has_a_name_of_its_own_and_a_sentence() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40
    assert all(isinstance(case, Case) and case.sentence.endswith(".") for case in CASES)
    assert {case.group for case in CASES} == {"wire", "batch", "abort", "failover", "fairness", "security"}
