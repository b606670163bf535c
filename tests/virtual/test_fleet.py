"""Whole fleets in virtual time."""

import numpy as np
import pytest

from pdrouter.policies import POLICIES
from pdsim.virtual.figures import Interval, Slo, figures
from pdsim.virtual.fleet import Fleet, Setup
from pdsim.virtual.judge import Case, Source, judge, load
from pdsim.virtual.synthetic import Shape

SOURCE = Source("synthetic:conversations", shape=Shape(requests=300, rate=15))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_serves_every_request_and_all_is_given_back(policy):
    fleet = Fleet(Setup(prefill=3, decode=2, prefill_policy=policy), load(SOURCE), 1)
    run = fleet.run()
    assert len(run.ttft) == 300
    assert (run.ttft > 0).all()
    assert (run.latency >= run.ttft).all()
    assert (run.cached < run.prompt).all()
    for row in (*fleet.router.prefills, *fleet.router.decodes):
        assert (row.in_flight, row.queued_tokens, row.held_tokens) == (0, 0, 0)
        assert row.engine.cache.free == row.engine.cache.total
    told = sum(run.output) - len(run.output)
    assert run.gap_counts.sum() == told, "a gap for each token but the first"


def test_a_seed_gives_the_same_run_again_and_in_another_process():
    setup = Setup(prefill=2, decode=2, prefill_policy="power_of_two")
    cases = [Case(setup, SOURCE, seed) for seed in (1, 1, 2)]
    here = judge(cases, 1)
    assert here[0] == here[1] != here[2]
    assert judge(cases, 2) == here


def test_without_prefill_engines_decode_does_both():
    run = Fleet(Setup(prefill=0, decode=2, prefill_policy="round_robin"), load(SOURCE), 0).run()
    assert run.bypassed == 300
    assert run.moved.sum() == 0


def test_so_many_at_once_means_no_more():
    source = Source("synthetic:uniform", shape=Shape(requests=60))
    one, four = (
        Fleet(Setup(prefill=1, decode=1, prefill_policy="round_robin", concurrency=count), load(source), 0).run()
        for count in (1, 4)
    )
    assert one.seconds == pytest.approx(one.latency.sum(), rel=1e-6), "one after the other"
    assert one.seconds / 4 < four.seconds < one.seconds / 2


def test_a_slow_network_delays_first_tokens():
    quick, slow = (
        Fleet(Setup(prefill=2, decode=2, link=gigabits * 1e9 / 8), load(SOURCE), 0).run() for gigabits in (400, 10)
    )
    assert np.median(slow.ttft) > 1.5 * np.median(quick.ttft)


def test_old_metrics_mislead_policies_that_trust_them():
    source = Source("synthetic:bursts", shape=Shape(requests=600, rate=60))
    fresh, old = (
        Fleet(
            Setup(prefill=4, decode=4, prefill_policy="llmd_default", scrape_interval=interval), load(source), 0
        ).run()
        for interval in (0.05, 10.0)
    )
    assert old.ttft.mean() > fresh.ttft.mean()


def test_requests_wait_in_the_router_while_no_decode_engine_has_room():
    source = Source("synthetic:uniform", shape=Shape(requests=80, rate=200, input_tokens=4000))
    run = Fleet(Setup(prefill=2, decode=1, kv_tokens=20_000, prefill_policy="least_tokens"), load(source), 0).run()
    assert run.preempted == 0
    assert run.ttft.max() > 10 * run.ttft.min()


def test_goodput_counts_requests_that_keep_both_promises():
    run = Fleet(Setup(prefill=2, decode=2), load(SOURCE), 0).run()
    all_of_them, none, some = (
        figures(run, slo) for slo in (Slo(1e9, 1e9), Slo(0.0, 1.0), Slo(float(np.median(run.ttft)), 1.0))
    )
    assert (all_of_them["good_share"], none["good_share"]) == (1, 0)
    assert some["good_share"] == pytest.approx(0.5, abs=0.01)


def test_an_interval_holds_the_mean_of_seeds_with_students_t():
    one = Interval.of([1.0, 2.0, 3.0])
    assert one.mean == 2
    assert one.half == pytest.approx(4.30 / 3**0.5, rel=0.01)
    assert Interval.of([5.0]).half != Interval.of([5.0]).half, "of one nobody knows"
