"""`make cluster`: a cluster to try things by hand, until Ctrl-C; with `--real`, on real kubelets."""

import contextlib
import signal
import sys
import time

from .control_plane import ClusterError
from .fake_nodes import fake_cluster
from .real_nodes import RealCluster, real_cluster


def main() -> None:
    """Start it, say how to use it, wait."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    real = "--real" in sys.argv
    began = time.monotonic()
    try:
        with real_cluster() if real else fake_cluster() as cluster:
            kind = "with real kubelets" if real else "whose pods run as local processes"
            print(f"cluster: ready after {time.monotonic() - began:.0f} s: two nodes with 8 GPUs each, {kind}")
            if isinstance(cluster, RealCluster):
                print(f"cluster: images {', '.join(cluster.images.values())}; requests of CPU and memory must be small")
            print(f"cluster: logs are in {cluster.folder}; Ctrl-C ends it. In another terminal:")
            print(f"  export KUBECONFIG={cluster.kubeconfig}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    except ClusterError as error:
        sys.exit(f"cluster: {error}")


main()
