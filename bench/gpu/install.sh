#!/usr/bin/env bash
# install.sh DIR WHEELS: puts the wheels of pack.sh into DIR, which is to be in PYTHONPATH; no network. A compiled router that
# this machine cannot load (another C library) loses its compiled parts: the Python below is the same code, slower.
set -euo pipefail
site=${1:?usage: install.sh DIR WHEELS} wheels=${2:?usage: install.sh DIR WHEELS}
python3 -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl
export PYTHONPATH=$site
if ! python3 -c 'import pdrouter.app'; then
  echo "install: the compiled router does not load here; going on with plain Python" >&2
  find "$site" -path "$site/pdrouter/*.so" -delete
  rm -f "$site"/*__mypyc*.so
  python3 -c 'import pdrouter.app'
fi
python3 -c 'import pdrouter.handoff.pair as pair; print("install: the router is", "compiled" if pair.__file__.endswith(".so") else "plain Python")'
