"""`pdctl replay`, `pdctl plan` and `pdctl tune` as a person calls them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pdctl.app import main

Pdctl = Callable[..., tuple[str, str]]


@pytest.fixture
def pdctl(monkeypatch, capsys) -> Pdctl:
    def call(*words: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["pdctl", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert (ended.value.code or 0) == status, told.err
        return told.out, told.err

    return call


def test_replay_compares_policies_on_a_trace(tmp_path: Path, pdctl: Pdctl):
    trace, output = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    lines = [
        {
            "timestamp": 100 * n,
            "input_length": 3000,
            "output_length": 40,
            "hash_ids": [n % 5, *range(9 * n + 10, 9 * n + 15)],
        }
        for n in range(120)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("replay", str(trace), "--policy", "random,pd_cost", "--split", "2:2,1:1", "--speed", "1,3", "--seeds", "2")
    shown = pdctl(*words, "--output", str(output))[0]
    assert shown.startswith("SIMULATED")
    assert "pd_cost instead of random would have cut mean TTFT by " in shown
    told = json.loads(output.read_text())
    assert told["simulated"] is True
    assert len(told["rows"]) == 8
    pdctl(*words, "--report", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert "2:2 at 3x: pd_cost instead of random would have cut mean TTFT by " in page
    assert page.index("SIMULATED") < page.index("would have cut")
    assert [len(one["runs"]) for one in told["runs"]] == [2] * 8
    again = json.loads(pdctl(*words, "--json")[0])
    assert again["rows"] == told["rows"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("replay", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("replay", "synthetic:nothing"), "no synthetic shape"),
        (("replay", "synthetic:uniform", "--policy", "best"), "no policy 'best'"),
        (("replay", "synthetic:uniform", "--split", "8"), "--split '8'"),
        (("replay", "synthetic:uniform", "--part", "1:0"), "--part '1:0'"),
        (("replay", "synthetic:uniform", "--speed", "fast"), "--speed 'fast'"),
        (("plan", "--gpu", "h900"), "no timing profile 'h900'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_next_step(words, said, pdctl: Pdctl):
    error = pdctl(*words, status=2)[1]
    assert said in error
    assert "next:" in error
    assert "Traceback" not in error


def test_plan_finds_the_fewest_engines_and_writes_values(tmp_path: Path, pdctl: Pdctl):
    values = tmp_path / "values.yaml"
    words = ("plan", "--rate", "50", "--requests", "300", "--seeds", "1", "--emit-values", str(values), "--json")
    told = json.loads(pdctl(*words)[0])
    assert told["simulated"] is True
    assert told["figures"]["good_share"]["mean"] >= 0.95
    assert told["saturates_at"] >= 1
    written = yaml.safe_load(values.read_text())
    assert written == {"prefill": {"replicas": told["prefill"]}, "decode": {"replicas": told["decode"]}}
    fewer = told["prefill"] + told["decode"] - 1
    assert "engines do not serve" in pdctl(*words, "--max-gpus", str(max(2, fewer)), status=1)[1]


def test_tune_proposes_what_serves_recorded_traffic_better(pdctl: Pdctl):
    words = ("tune", "synthetic:prefixes", "--rate", "15", "--requests", "250", "--split", "1:3", "--seeds", "1")
    shown, _ = pdctl(*words, "--policy", "random")
    assert shown.startswith("SIMULATED")
    assert "change to --policy" in shown
    told = json.loads(pdctl(*words, "--policy", "random", "--json")[0])
    assert told["best"]["figures"]["ttft_mean"]["mean"] < told["now"]["figures"]["ttft_mean"]["mean"]
    best = told["best"]
    assert sum(map(int, best["split"].split(":"))) == 4
    stay = ("--split", best["split"], "--policy", best["policy"])
    assert "stay as you are" in pdctl(*words[:6], *stay, "--seeds", "1")[0]
