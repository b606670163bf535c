#!/usr/bin/env bash
# The simulated engine and what it imports, as one folder for PYTHONPATH, with `vllm` as its program: what
# simulator/Dockerfile puts into the image.
# usage: scripts/simulator_layer.sh FOLDER PYTHON     a PYTHON of the version that will run it
# Versions and hashes are those of uv.lock; only wheels are taken.
set -euo pipefail
cd "$(dirname "$0")/.."
into=$1 python=$2
uv=${UV:-.venv/bin/uv}
export UV_LINK_MODE=copy
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

locked() { "$uv" export --quiet --frozen --package pd-simulator --no-emit-workspace --no-dev "$@"; }
locked --format requirements.txt > "$work/requirements.txt"
"$uv" pip install --quiet --python "$python" --target "$into" --only-binary :all: --require-hashes -r "$work/requirements.txt"
"$uv" build --quiet --wheel --python "$python" -o "$work/wheel" simulator
"$uv" pip install --quiet --python "$python" --target "$into" --no-deps "$work"/wheel/*.whl
rm -rf "$into/bin"
mkdir "$into/bin"
printf '#!/usr/bin/python3\nfrom pdsim.engine.vllm import main\n\nmain()\n' > "$into/bin/vllm"
chmod 755 "$into/bin/vllm"

# Which packages are in the image, for scanners; the label org.pdctl.sbom names the file.
locked --format cyclonedx1.5 > "$into/sbom.cdx.json" 2>/dev/null
find "$into" -name __pycache__ -prune -exec rm -rf {} +
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$into" -p /opt/pd-simulator "$into"
