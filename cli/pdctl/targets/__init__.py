"""Where a deployment lives, behind one protocol."""

from pdctl.targets.local import LocalTarget
from pdctl.targets.target import Health, Routing, Target

__all__ = ["Health", "LocalTarget", "Routing", "Target"]
