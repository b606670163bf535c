"""What was measured, a folder a run."""

from pdctl.runs.run import Run
from pdctl.runs.store import Store

__all__ = ["Run", "Store"]
