"""llm-d's programs, which a machine has or has not."""

import os

import pytest

EPP, SIDECAR = (os.environ.get(f"PDCTL_LLM_D_{name}", "") for name in ("EPP", "SIDECAR"))
needed = pytest.mark.skipif(
    not (EPP and SIDECAR),
    reason="llm-d's programs are not here: PDCTL_LLM_D_EPP and PDCTL_LLM_D_SIDECAR name none (docs/llm-d.md)",
)
