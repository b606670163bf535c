"""A program at a terminal of its own, as a person sits before it."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyte


def at_terminal(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, columns: int = 80, lines: int = 24
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program in a terminal; give it, and the descriptor that reads, types and closes the terminal."""
    window, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = subprocess.Popen(
        command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 no other thread holds a lock
    )  # fmt: skip
    os.close(terminal)
    return process, window


class Terminal:
    """What a program shows, with all that has left the window at its top; a context that ends it.

    Args:
        columns, lines: the window's size.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, columns: int = 110, lines: int = 50
    ) -> None:
        self._screen = pyte.Screen(columns, 1000)  # nothing scrolls, so what moves up the cursor still meets its lines
        self._stream = pyte.ByteStream(self._screen)
        self.process, self._window = at_terminal(command, environment, folder, columns, lines)
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(self._window, 65536):
                with self._lock:
                    self._stream.feed(data)

    @property
    def text(self) -> str:
        """What stands there now."""
        with self._lock:
            shown = self._screen.display
        return "\n".join(line.rstrip() for line in shown).rstrip()

    def until(self, pattern: str, seconds: float = 60) -> None:
        """Wait until it shows what a regular expression finds.

        Raises:
            AssertionError: it has ended without that, or does not show it in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            over = not self._reader.is_alive() or time.monotonic() > deadline  # before looking at what it has shown
            text = self.text
            if re.search(pattern, text):
                return
            if over:
                raise AssertionError(f"{pattern!r} is not shown: {text}")
            time.sleep(0.05)

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._window, keys.encode())

    def end(self, seconds: float = 180) -> int:
        """Wait for its end; give its exit status."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def __enter__(self) -> Self:
        """Nothing is left to be done."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join()
        os.close(self._window)
