"""`python -m pdsim.referee`."""

from pdsim.referee.app import main

main()
