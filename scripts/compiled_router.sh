#!/usr/bin/env bash
# Installs the router, compiled (router/setup.py), into .build/router from the versions in uv.lock.
# The Python that runs a small loop fastest is taken: one built without optimizations costs a sixth more.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=.venv/bin/uv
into=.build/router

command -v cc >/dev/null || { echo "compiled: there is no C compiler; install one (Debian: build-essential)" >&2; exit 1; }

# Seconds for a loop of calls and lookups; nothing when it is no Python that can be used (3.11, with headers).
speed() { "$1" - 2>/dev/null <<'PY'
import os, sys, sysconfig, timeit
if sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"):
    sys.exit(1)
def call(held, key): held[key & 63] = (key, len(held)); return held
held = {}
print(min(timeit.repeat(lambda: [call(held, key) for key in range(20000)], number=1, repeat=15)))
PY
}
if [ -s $into/python ]; then
  python=$(cat $into/python)
else
  python=$(for one in ${ROUTER_PYTHON:-python3.14 python3.13 python3.12 python3.11 python3 /usr/bin/python3 .venv/bin/python}; do
    command -v "$one" >/dev/null && took=$(speed "$one") && echo "$took $(command -v "$one")"
  done | sort -g | head -1 | cut -d' ' -f2-)
fi
[ -n "$python" ] || { echo "compiled: no Python 3.11 or newer with its headers; install them (Debian: python3-dev)" >&2; exit 1; }

stamp=$( { find router -name '*.py' -print0 | sort -z | xargs -0 cat; cat uv.lock router/pyproject.toml; "$python" -V; } | sha256sum)
if [ "$(cat $into/stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi
echo "compiled: building the router with mypyc for $("$python" -V), $python (half a minute)"
rm -rf "$into"
mkdir -p "$into"
echo "$python" > "$into/python"
"$uv" venv --quiet --python "$python" "$into/venv"
"$uv" export --quiet --frozen --package pd-router --no-emit-workspace --no-hashes --format requirements-txt > "$into/requirements.txt"
export VIRTUAL_ENV="$into/venv"
compiler=(setuptools mypy types-jsonschema types-PyYAML)
"$uv" export --quiet --frozen --no-emit-workspace --no-hashes --format requirements-txt > "$into/locked.txt"
"$uv" pip install --quiet -r "$into/requirements.txt"
"$uv" pip install --quiet -c "$into/locked.txt" "${compiler[@]}"
cp -r router "$into/source"
rm -rf "$into/source/build" "$into"/source/*.egg-info
# Not isolated: the compiler has to see the types of what the router imports.
PD_ROUTER_COMPILE=1 "$uv" pip install --quiet --no-deps --no-build-isolation "$into/source"
"$uv" pip uninstall --quiet "${compiler[@]}"
"$into/venv/bin/python" -c 'import pdrouter.handoff.pair as pair; assert pair.__file__.endswith(".so"), pair.__file__'
echo "$stamp" > "$into/stamp"
