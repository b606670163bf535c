"""`python -m pdctl`."""

import sys

try:
    from pdctl.app import main
except KeyboardInterrupt:  # while everything is loaded: half a second
    sys.exit(130)

main()
