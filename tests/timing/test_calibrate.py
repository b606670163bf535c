"""The time model is fitted to another GPU, and the fleet can be simulated with it."""

import json
import sys
from dataclasses import replace

import pytest

from pdctl.app import main
from pdsim.timing import load_profile
from pdsim.timing.calibrate import Measured, fit
from support.processes import engine

H200 = load_profile("h200")
POINTS = [Measured(1.0, prompt=length) for length in (256, 1024, 2048, 4096, 8192, 16384)] + [
    Measured(1.0, batch=batch, context=context) for batch in (1, 16, 64) for context in (500, 4000)
]


def test_a_profile_is_found_again_from_what_it_says():
    true = replace(
        H200, prefill_per_token=3 * H200.prefill_per_token, pair=2 * H200.pair, context_pair=2 * H200.context_pair,
        decode_base=1.5 * H200.decode_base, decode_per_context_token=2 * H200.decode_per_context_token,
    )  # fmt: skip
    measured = [replace(point, seconds=point.model(true)) for point in POINTS]
    found = fit(measured, H200, "found")
    for point in measured:
        assert point.model(found) == pytest.approx(point.seconds, rel=0.01), point.name
    assert found.decode_base == pytest.approx(true.decode_base, rel=0.03)
    assert found.prefill_per_token == pytest.approx(true.prefill_per_token, rel=0.1)


def test_where_nothing_was_measured_the_first_profile_stays():
    found = fit([Measured(2 * H200.step_seconds((), 1, 500), batch=1, context=500)], H200, "found")
    assert found.prefill_per_token == pytest.approx(H200.prefill_per_token, rel=1e-3)
    assert found.transfer_per_token == H200.transfer_per_token


def test_calibrate_measures_an_engine_and_writes_a_profile_that_replay_takes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "slow.json"
    for _ in range(3):  # a busy machine may have a quiet moment
        with engine("both", "--speed", "0.1") as started:
            words = ["calibrate", started.url, "--output", str(path), "--longest", "1024", "--json"]
            monkeypatch.setattr(sys, "argv", ["pdctl", *words])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code
            stretch = started.get("/sim/state")["clock"]["itl_stretch"]
        told = json.loads(capsys.readouterr().out)
        assert told == json.loads(path.read_text())
        if stretch <= 1.05:
            break
    else:
        pytest.skip("this machine is too busy to run an engine in real time")
    slow = load_profile(str(path))
    assert slow.decode_run(8, 4000)[0] == pytest.approx(10 * H200.decode_run(8, 4000)[0], rel=0.1)
    monkeypatch.setattr(sys, "argv", ["pdctl", "replay", "synthetic:uniform", "--requests", "20", "--gpu", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
