#!/usr/bin/env bash
# The router and what it imports, as one folder for PYTHONPATH: what router/Dockerfile puts into the image.
# usage: scripts/router_layer.sh FOLDER PYTHON     a PYTHON with its headers, of the version that will run it
# Versions and hashes are those of uv.lock; only wheels are taken, so nothing but the router itself is built here.
set -euo pipefail
cd "$(dirname "$0")/.."
into=$1 python=$2
uv=${UV:-.venv/bin/uv}
export UV_LINK_MODE=copy
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

extras=()
for extra in ${EXTRAS:-}; do extras+=(--extra "$extra"); done
locked() { "$uv" export --quiet --frozen --package pd-router --no-emit-workspace --no-dev "${extras[@]}" "$@"; }

locked --format requirements.txt > "$work/requirements.txt"
"$uv" pip install --quiet --python "$python" --target "$into" --only-binary :all: --require-hashes -r "$work/requirements.txt"

# mypyc has to see the types of what the router imports, so it works in an environment that has them.
"$uv" venv --quiet --python "$python" "$work/venv"
"$uv" export --quiet --frozen --no-emit-workspace --no-hashes --format requirements.txt > "$work/versions.txt"
"$uv" pip install --quiet --python "$work/venv/bin/python" -c "$work/versions.txt" -r <(sed 's/ *\\$//; /--hash/d' "$work/requirements.txt") \
  setuptools wheel mypy types-jsonschema types-PyYAML
cp -r router "$work/router"
rm -rf "$work/router/build" "$work"/router/*.egg-info
PD_ROUTER_COMPILE=1 "$uv" build --quiet --wheel --no-build-isolation --python "$work/venv/bin/python" -o "$work/wheel" "$work/router"
"$uv" pip install --quiet --python "$python" --target "$into" --no-deps "$work"/wheel/*.whl
rm -rf "$into/bin"

# Which packages are in the image, for scanners; the label org.pdctl.sbom names the file.
locked --format cyclonedx1.5 > "$into/sbom.cdx.json" 2>/dev/null
find "$into" -name __pycache__ -prune -exec rm -rf {} +
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$into" -p /opt/pd-router "$into"
