"""Errors with a cause and a next step, and the exit codes of pdctl."""

import contextlib
import errno
import os
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What pdctl's exit status means."""

    OK = 0
    FAILURE = 1  # it ran and did not succeed
    USAGE = 2  # a flag or argument makes no sense
    PREFLIGHT = 3  # something it needs is missing or taken; nothing was started
    TIMEOUT = 4
    INTERRUPTED = 130  # Ctrl-C, SIGTERM or a closed terminal


class PdctlError(Exception):
    """A command cannot go on.

    Args:
        cause: what is wrong, one sentence.
        next_step: what to do about it.
        code: the exit status.
        evidence: lines to show between the two, such as the end of a log.
    """

    def __init__(
        self, cause: str, next_step: str, code: ExitCode = ExitCode.FAILURE, evidence: list[str] | None = None
    ) -> None:
        super().__init__(cause)
        self.cause, self.next_step, self.code, self.evidence = cause, next_step, code, evidence or []


def check_writable(path: Path | None, option: str) -> None:
    """See that a file can be written, before the work whose outcome goes there.

    Args:
        path: the file; None: none is wished.
        option: by which it was chosen.

    Raises:
        PdctlError: it cannot.
    """
    if path is None:
        return
    with writing(path, option):
        file = Path(os.path.realpath(path))  # of a link to nothing, what opening it makes
        there = file.exists()
        file.open("ab").close()
        if not there:
            file.unlink()


def of_files(error: OSError) -> PdctlError | None:
    """Say what to do when pdctl's own files cannot be written; None when an error is of another kind."""
    what = f"{error.filename}: {error.strerror}" if error.filename else f"a file cannot be written: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # these come without a name
        return PdctlError(what, "make room on the disk, then run the command again")
    if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        step = "set HOME, or XDG_STATE_HOME and XDG_DATA_HOME, to a folder that you may write to"
        return PdctlError(what, step, ExitCode.PREFLIGHT)
    return None


@contextlib.contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Name the file and the option by which it was chosen when it cannot be written.

    Raises:
        PdctlError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise PdctlError(
            f"{path} cannot be written: {error.strerror}", f"choose another {option}", ExitCode.USAGE
        ) from None
