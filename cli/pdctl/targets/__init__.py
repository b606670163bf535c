"""Where a deployment lives, behind one protocol."""

from pdctl.targets.found import find
from pdctl.targets.kubernetes import KubernetesTarget
from pdctl.targets.local import LocalTarget
from pdctl.targets.target import Health, LogQuery, Routing, Target

__all__ = ["Health", "KubernetesTarget", "LocalTarget", "LogQuery", "Routing", "Target", "find"]
