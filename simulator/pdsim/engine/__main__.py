"""`python -m pdsim.engine`."""

from pdsim.engine.app import main

main()
