"""`python -m pdrouter`."""

from pdrouter.app import main

main()
