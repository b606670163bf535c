"""Which router stands before engines, as a value."""

from dataclasses import dataclass
from typing import Literal, get_args

from pdctl.errors import ExitCode, PdctlError
from pdrouter.policies import POLICIES

Router = Literal["ours", "vllm-router", "llm-d"]
POLICIES_OF: dict[str, tuple[str, ...]] = {
    "ours": tuple(POLICIES),
    "vllm-router": ("random", "round_robin", "cache_aware", "power_of_two", "consistent_hash"),
    "llm-d": ("default", "pd-sample", "pd-guide"),
}
_PACKAGES: dict[Router, str] = {"ours": "pd-router", "vllm-router": "vllm-router", "llm-d": "llm-d"}
_RULES = {"default": "llmd_default", "pd-sample": "llmd_pd_sample", "pd-guide": "llmd_pd_guide"}
_ALIASES = {
    "ours": "ours:consistent_hash",
    "vllm-router": "vllm-router:consistent_hash",
    "llm-d": "llm-d:default",
    "llm-d-pd-sample": "llm-d:pd-sample",
    "llm-d-pd-guide": "llm-d:pd-guide",
    "llm-d-policies": "ours:llmd_pd_guide",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A router with a policy.

    Args:
        router: ours, vllm-router as the package index has it, or llm-d's endpoint picker, Envoy and sidecars.
        policy: how it chooses engines; of llm-d, which configuration its endpoint picker has (`presets/`).
    """

    router: Router
    policy: str

    @property
    def name(self) -> str:
        """What files are called after it."""
        return f"{self.router}-{self.policy}"

    @property
    def package(self) -> str:
        """Its distribution."""
        return _PACKAGES[self.router]

    @property
    def rule(self) -> str:
        """The policy as ours calls it: llm-d's configurations choose as our policies of llm-d do."""
        return _RULES[self.policy] if self.router == "llm-d" else self.policy

    @property
    def title(self) -> str:
        """What people read."""
        return f"{self.package}, {self.policy}"


def read(text: str) -> Choice:
    """Read `ours`, `vllm-router:cache_aware` or `llm-d-pd-guide`.

    Raises:
        PdctlError: a name or policy is not known.
    """
    router, _, policy = _ALIASES.get(text.strip(), text.strip()).partition(":")
    for known in get_args(Router):
        if router == known:
            if policy in POLICIES_OF[router]:
                return Choice(known, policy)
            raise PdctlError(
                f"{router} has no policy {policy!r}", f"its policies are {', '.join(POLICIES_OF[router])}",
                ExitCode.USAGE,
            )  # fmt: skip
    raise PdctlError(
        f"there is no router {text!r}", f"name one of {', '.join(_ALIASES)}; the first three perhaps with :POLICY",
        ExitCode.USAGE,
    )  # fmt: skip
