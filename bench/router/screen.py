"""Where the benches print."""

import sys

from rich.console import Console

# As wide as it takes where no terminal tells: tables are not cut off in a pipe or a file.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
