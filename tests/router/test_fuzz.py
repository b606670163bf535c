"""Whatever bytes come: nothing fails inside the router, and engines get only what clients asked for.

A fixed budget here; `make fuzz` goes on for as long as is wanted. What has to hold is in `router.streams`.
"""

import os
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pdrouter.openai.asked import DEEPEST
from router.streams import Played, bodies, depth, spoilt, streams
from router.test_closed import CASES

BUDGET = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "400")), deadline=None, database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ, suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    with Played() as bed:
        yield bed
        bed.serves()


@BUDGET
@given(stream=streams())
def test_streams_that_are_nearly_http(played: Played, stream: tuple[bytes, list[int]]):
    answers = played.play(*stream)
    event(f"statuses {sorted({answer.status for answer in answers})}")


@BUDGET
@given(case=st.sampled_from([case for case in CASES if 408 not in case.statuses]), data=st.data())
def test_attacks_with_changes(played: Played, case, data: st.DataObject):
    if len(case.raw) < 5000:
        raw = data.draw(spoilt(case.raw))
        played.play(raw, sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=3))))


@BUDGET
@given(body=st.one_of(bodies(), bodies().flatmap(spoilt), st.binary(max_size=50)), data=st.data())
def test_bodies_that_are_nearly_json(played: Played, body: bytes, data: st.DataObject):
    path = data.draw(st.sampled_from([b"/v1/completions", b"/v1/chat/completions", b"/v1/messages", b"/tokenize"]))
    raw = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)
    first, health = played.play(raw)
    assert health.status == 200, "whatever a body holds, the connection goes on"
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        told = None
    served = path in (b"/v1/messages", b"/tokenize") and not body
    right = isinstance(told, dict) and depth(told) <= DEEPEST
    assert first.status in ((200, 502) if right or served else (400,))
    event(f"status {first.status}")


@BUDGET
@given(data=st.binary(max_size=300))
def test_any_bytes(played: Played, data: bytes):
    played.play(data)
