#!/usr/bin/env bash
# pack.sh DIR PYTHON: the router, compiled for that Python, and all it imports, as wheels in DIR, for a machine without a
# network. PYTHON is one of the same minor version as the other machine's; install.sh puts the wheels in place there.
set -euo pipefail
into=$(mkdir -p "${1:?usage: pack.sh DIR PYTHON}" && cd "$1" && pwd) python=${2:?usage: pack.sh DIR PYTHON}
cd "$(dirname "$0")/../.."
uv=.venv/bin/uv work=.build/pack
command -v cc >/dev/null || { echo "pack: there is no C compiler; install one (Debian: build-essential)" >&2; exit 1; }
[ -x $uv ] || { echo "pack: run make setup first" >&2; exit 1; }

rm -rf "$work" "$into"/*.whl
mkdir -p "$work"
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet)
export="export --quiet --frozen --no-emit-workspace --no-hashes --no-annotate --format requirements-txt"
# shellcheck disable=SC2086
"$uv" $export --package pd-router > "$work/requirements.txt"
# shellcheck disable=SC2086
"$uv" $export > "$work/locked.txt"
"${pip[@]}" download --only-binary :all: --dest "$into" --requirement "$work/requirements.txt"
"${pip[@]}" install --no-index --find-links "$into" --requirement "$work/requirements.txt"
"${pip[@]}" install --constraint "$work/locked.txt" setuptools wheel mypy types-jsonschema types-PyYAML
cp -r router "$work/source"
rm -rf "$work"/source/build "$work"/source/*.egg-info
# Not isolated: the compiler has to see the types of what the router imports.
PD_ROUTER_COMPILE=1 "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$into" "$work/source"
cp bench/gpu/install.sh "$into/"
echo "pack: $(ls "$into"/*.whl | wc -l) wheels for $("$python" -V), $(du -sh "$into" | cut -f1) in $into"
