"""A closed terminal and a polite kill are interruptions as Ctrl-C is: what was measured is written down first."""

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # one is enough
    if number == signal.SIGHUP:
        _leave_the_terminal()
    ctrl_c = signal.getsignal(signal.SIGINT)
    if callable(ctrl_c):
        ctrl_c(number, frame)  # while an event loop runs, it cancels the work in place of raising amid the loop's own
    else:  # ignored, as in a script's background
        raise KeyboardInterrupt


def _leave_the_terminal() -> None:
    """Let nothing be written to a terminal that is gone: it would fail in the middle of ending well."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nothing, descriptor)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGHUP and SIGTERM be as Ctrl-C; one that is ignored stays so, as SIGHUP is under nohup."""
    wanted = [number for number in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
