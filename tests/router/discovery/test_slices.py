"""What EndpointSlices mean."""

import random
from typing import Any

import pytest

from pdrouter.discovery.found import Found
from pdrouter.discovery.slices import Reading, read
from pdrouter.discovery.watched import Gone, Lines, Malformed, Watched, WatchError
from pdrouter.fleet.engine import Role
from router.discovery.kube_api import endpoint, slice_of

PREFILL = Reading(Role.PREFILL)


def urls(*slices: Any, reading: Reading = PREFILL) -> list[str]:
    told = read(slices, reading)
    assert told.problems == ()
    return [one.url for one in told.found]


def test_several_slices_of_a_service_are_one_set_and_an_endpoint_in_two_of_them_is_one_engine():
    one, two, three = (endpoint(f"10.0.0.{number}", f"pod-{number}") for number in (1, 2, 3))
    assert urls(slice_of("b", three, two), slice_of("a", two, one)) == [
        "http://10.0.0.1:8000",
        "http://10.0.0.2:8000",
        "http://10.0.0.3:8000",
    ]


def test_the_order_of_slices_and_endpoints_does_not_matter():
    slices = [
        slice_of("a", endpoint("10.0.0.1", "x"), endpoint("10.0.0.2", "y")),
        slice_of("b", endpoint("10.0.0.2", "y", terminating=True), endpoint("10.0.0.3", "z")),
        slice_of("c", endpoint("fd00::1", "x"), endpoint("fd00::4", "w"), family="IPv6"),
        slice_of("d", endpoint("10.0.0.3"), endpoint("10.0.0.9", "z", uid="another life")),
    ]
    for identity in ("address", "name"):
        reading = Reading(Role.PREFILL, identity=identity)
        expected = read(slices, reading)
        assert len({one.name for one in expected.found}) == len(expected.found)
        for seed in range(20):
            draw = random.Random(seed)
            mixed = [one | {"endpoints": draw.sample(one["endpoints"], len(one["endpoints"]))} for one in slices]
            assert read(draw.sample(mixed, len(mixed)), reading) == expected


@pytest.mark.parametrize(
    ("ready", "serving", "terminating", "expected"),
    [
        (True, True, False, "used"),
        (None, None, None, "used"),
        (True, None, None, "used"),
        (False, False, False, "left out"),
        (False, None, None, "left out"),
        (False, True, True, "ends"),
        (False, False, True, "left out"),
        (True, True, True, "ends"),  # publishNotReadyAddresses
    ],
)
def test_an_endpoint_is_used_by_its_conditions(ready, serving, terminating, expected):
    one = endpoint("10.0.0.1", "pod", ready=ready, serving=serving, terminating=terminating)
    found = read([slice_of("a", one)], PREFILL).found
    assert [one.terminating for one in found] == {"used": [False], "ends": [True], "left out": []}[expected]


def test_an_endpoint_without_conditions_is_ready():
    assert urls(slice_of("a", {"addresses": ["10.0.0.1"]})) == ["http://10.0.0.1:8000"]


def test_the_name_of_a_pod_stays_when_its_address_changes():
    reading = Reading(Role.DECODE, identity="name")
    before = read([slice_of("a", endpoint("10.0.0.1", "decode-0", "first"))], reading).found
    after = read([slice_of("a", endpoint("10.0.0.7", "decode-0", "second"))], reading).found
    assert before == (Found("http://10.0.0.1:8000", "decode-0", Role.DECODE),)
    assert after == (Found("http://10.0.0.7:8000", "decode-0", Role.DECODE),)


def test_of_two_lives_of_a_pod_the_one_that_goes_on_has_the_name():
    old = endpoint("10.0.0.1", "decode-0", "first", ready=False, terminating=True)
    new = endpoint("10.0.0.7", "decode-0", "second")
    found = read([slice_of("a", old, new)], Reading(Role.DECODE, identity="name")).found
    assert found == (Found("http://10.0.0.7:8000", "decode-0", Role.DECODE),)


def test_an_address_that_went_from_an_ending_pod_to_a_new_one_is_not_ending():
    old = endpoint("10.0.0.1", "old", ready=False, terminating=True)
    found = read([slice_of("a", old), slice_of("b", endpoint("10.0.0.1", "new"))], PREFILL).found
    assert found == (Found("http://10.0.0.1:8000", "http://10.0.0.1:8000", Role.PREFILL),)


def test_an_endpoint_that_is_no_pod_is_named_by_its_url():
    found = read([slice_of("a", endpoint("10.0.0.1"))], Reading(Role.PREFILL, identity="name")).found
    assert found[0].name == "http://10.0.0.1:8000"


def test_a_pod_with_addresses_of_both_families_is_one_engine():
    slices = (
        slice_of("six", endpoint("fd00::1", "both"), endpoint("fd00::2", "six"), family="IPv6"),
        slice_of("four", endpoint("10.0.0.1", "both")),
    )
    assert urls(*slices) == ["http://10.0.0.1:8000", "http://[fd00::2]:8000"]


def test_an_end_that_one_of_two_slices_knows_of_holds():
    known = endpoint("10.0.0.1", "pod", ready=False, terminating=True)
    for slices in ([known], [endpoint("10.0.0.1", "pod")]), ([endpoint("10.0.0.1", "pod")], [known]):
        found = read([slice_of(name, *each) for name, each in zip("ab", slices, strict=True)], PREFILL).found
        assert [one.terminating for one in found] == [True]


def test_a_label_on_the_slice_decides_the_role_before_the_setting():
    slices = [
        slice_of("p", endpoint("10.0.0.1"), role="prefill"),
        slice_of("d", endpoint("10.0.0.2"), role="decode"),
        slice_of("n", endpoint("10.0.0.3")),
    ]
    found = read(slices, PREFILL).found
    assert [one.role for one in found] == [Role.PREFILL, Role.DECODE, Role.PREFILL]


def test_slices_of_no_known_role_are_left_out_with_what_to_do():
    slices = [
        slice_of("p", endpoint("10.0.0.1"), role="prefill"),
        slice_of("n", endpoint("10.0.0.2")),
        slice_of("o", endpoint("10.0.0.3"), role="both"),
        slice_of("nobody", ports=None),
    ]
    told = read(slices, Reading())
    assert [one.url for one in told.found] == ["http://10.0.0.1:8000"]
    assert len(told.problems) == 2
    assert told.problems[0].startswith("EndpointSlice n: has no label llm-d.ai/role; label its Service")
    assert told.problems[1].startswith("EndpointSlice o: has 'both' as its label llm-d.ai/role")


TWO_PORTS = (("http", 8000), ("metrics", 9090))


@pytest.mark.parametrize(
    ("ports", "wanted", "expected"),
    [
        (TWO_PORTS, "metrics", 9090),
        (TWO_PORTS, 8200, 8200),
        (None, 8000, 8000),
        ([(None, 8000)], None, 8000),
        ([("", 8000)], None, 8000),
        ([("http", 8000)], None, 8000),
    ],
)
def test_a_port_is_found_by_name_or_number_or_as_the_only_one(ports, wanted, expected):
    one = slice_of("a", endpoint("10.0.0.1"), ports=ports)
    assert urls(one, reading=Reading(Role.PREFILL, wanted)) == [f"http://10.0.0.1:{expected}"]


@pytest.mark.parametrize(
    ("ports", "wanted", "problem"),
    [
        (TWO_PORTS, "htpt", "no TCP port named 'htpt' (TCP ports: http=8000, metrics=9090)"),
        (TWO_PORTS, None, "the port of the engines is not clear (TCP ports: http=8000, metrics=9090)"),
        (None, None, "the port of the engines is not clear (TCP ports: none)"),
    ],
)
def test_a_port_that_cannot_be_found_is_told_with_those_there_are(ports, wanted, problem):
    told = read([slice_of("a", endpoint("10.0.0.1"), ports=ports)], Reading(Role.PREFILL, wanted))
    assert told.found == ()
    assert problem in told.problems[0]


def test_pods_whose_named_ports_differ_each_have_their_own():
    slices = (
        slice_of("a", endpoint("10.0.0.1"), ports=[("http", 8000)]),
        slice_of("b", endpoint("10.0.0.2"), ports=[("http", 8200)]),
    )
    assert urls(*slices, reading=Reading(Role.PREFILL, "http")) == ["http://10.0.0.1:8000", "http://10.0.0.2:8200"]


def test_lines_are_whole_however_the_bytes_are_cut():
    text = '{"a":"ü\u0085\u2028"}\n\n{"b":1}\n'.encode()
    for size in range(1, len(text) + 1):
        lines = Lines()
        got = [line for at in range(0, len(text), size) for line in lines.feed(text[at : at + size])]
        assert got == ['{"a":"ü\u0085\u2028"}'.encode(), b'{"b":1}']
        assert not lines.begun
    lines = Lines()
    assert lines.feed(b'{"half') == []
    assert lines.begun


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        {"type": "ADDED"},
        {"type": "ADDED", "object": {"metadata": {"name": "x"}}},
        {"type": "ADDED", "object": {"metadata": {"resourceVersion": "1"}}},
        {"type": "NEW", "object": {"metadata": {"name": "x", "resourceVersion": "1"}}},
        {"type": "ERROR", "object": {"code": "many"}},
        {"type": "ERROR", "object": None},
    ],
)
def test_an_event_that_makes_no_sense_asks_for_a_new_list_and_keeps_what_is_known(event):
    watched = Watched()
    watched.replace({"metadata": {"resourceVersion": "7"}, "items": [slice_of("a")]})
    with pytest.raises(Malformed):
        watched.apply(event)
    assert watched.version is None
    assert len(watched.objects) == 1


def test_only_a_lost_history_asks_for_a_new_list():
    watched = Watched()
    watched.replace({"metadata": {"resourceVersion": "7"}, "items": None})
    with pytest.raises(WatchError, match="slow down"):
        watched.apply({"type": "ERROR", "object": {"code": 429, "message": "slow down"}})
    assert watched.version == "7"
    with pytest.raises(Gone):
        watched.apply({"type": "ERROR", "object": {"code": 410}})
    assert watched.version is None
