"""Build the router: plain Python, or with PD_ROUTER_COMPILE=1 its request path compiled by mypyc.

The compiled router is the same code; it needs a C compiler and mypy (`make compiled`) when it is built and nothing more
when it runs. Compiled are the packages that a request passes through; what runs once or seldom stays Python.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

_COMPILED = ("deadlines.py", "outbox.py", "fleet", "handoff", "observe", "openai", "policies", "server", "upstream")


def _modules() -> list[str]:
    here = Path("pdrouter")
    found = []
    for name in _COMPILED:
        path = here / name
        found += [path] if path.suffix else sorted(path.glob("*.py"))
    # `choice.py` has protocols that are asked about at run time, which mypyc cannot make.
    return [str(path) for path in found if path.name not in ("__init__.py", "choice.py")]


def _extensions() -> list[Extension]:
    if os.environ.get("PD_ROUTER_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415 -- only there when compiling

    return mypycify(["--ignore-missing-imports", *_modules()], opt_level="3")


setup(ext_modules=_extensions())
