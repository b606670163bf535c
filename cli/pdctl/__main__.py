"""`python -m pdctl`."""

from pdctl.app import main

main()
