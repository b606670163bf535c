"""When what is read now may have come."""

from collections.abc import Callable
from typing import Any

from pdrouter.upstream.arrivals import Arrivals


class Loop:
    """A loop whose time and timer are moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timer: Callable[[], None] = lambda: None

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], None]) -> Any:
        self.timer = call
        return self

    def turn(self, seconds: float) -> None:
        self.now += seconds
        self.timer()


def test_while_the_loop_runs_what_is_read_has_just_come() -> None:
    loop = Loop()
    arrivals = Arrivals(loop)  # type: ignore[arg-type]
    for _ in range(4):
        loop.turn(0.25)
    assert arrivals.earliest(loop.now - 5) == loop.now


def test_after_a_standstill_it_may_have_come_at_its_begin_but_not_before_it_was_asked_for() -> None:
    loop = Loop()
    arrivals = Arrivals(loop)  # type: ignore[arg-type]
    loop.turn(0.25)
    stood = loop.now
    loop.turn(7)  # the timer goes off before anything is read
    assert arrivals.earliest(stood - 5) == stood
    assert arrivals.earliest(stood + 3) == stood + 3
