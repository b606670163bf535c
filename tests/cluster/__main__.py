"""`make cluster`: a control plane with fake nodes, to try things by hand, until Ctrl-C."""

import contextlib
import signal
import sys
import time

from .control_plane import ClusterError
from .fake_nodes import fake_cluster


def main() -> None:
    """Start it, say how to use it, wait."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    began = time.monotonic()
    try:
        with fake_cluster() as plane:
            print(
                f"cluster: ready after {time.monotonic() - began:.0f} s: two nodes with 8 GPUs each, as local processes"
            )
            print(f"cluster: logs are in {plane.folder}; Ctrl-C ends it. In another terminal:")
            print(f"  export KUBECONFIG={plane.kubeconfig}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    except ClusterError as error:
        sys.exit(f"cluster: {error}")


main()
