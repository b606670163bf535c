"""Where the programs of other routers are."""

from dataclasses import dataclass
from pathlib import Path

from pdctl.errors import ExitCode, PdctlError


@dataclass(frozen=True, slots=True)
class Programs:
    """llm-d's programs, which no package index has; needed on this machine only.

    Args:
        epp: its endpoint picker.
        sidecar: its P/D sidecar.
    """

    epp: Path | None = None
    sidecar: Path | None = None

    def found(self) -> tuple[str, str]:
        """Give the paths of both.

        Raises:
            PdctlError: one is not given, or is no program.
        """
        told = []
        for flag, path in (("--llm-d-epp", self.epp), ("--llm-d-sidecar", self.sidecar)):
            if path is None:
                raise PdctlError(
                    f"llm-d's programs are needed here, and {flag} is not given",
                    "give --llm-d-epp and --llm-d-sidecar; docs/llm-d.md says where the programs are had",
                    ExitCode.PREFLIGHT,
                )
            if not path.is_file() or not path.stat().st_mode & 0o111:
                raise PdctlError(f"{path} is no program", f"correct {flag}", ExitCode.PREFLIGHT)
            told.append(str(path.resolve()))
        return told[0], told[1]
