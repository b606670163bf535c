"""Imported by the process from which containers are forked: it must end with the kubelet.

By itself it ends with the last of its children, and they end with it.
"""

from .control_plane import die_with_parent

die_with_parent()
