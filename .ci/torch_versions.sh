#!/usr/bin/env bash
# One wheel, several torch versions: builds the wheel once in isolation, installs it beside each torch and
# runs the tests of the ops there. Usage: .ci/torch_versions.sh 2.10.0 2.15.0
# (Slow: away from the pinned CPU build each torch is several gigabytes. Set VENVS to keep the environments.)
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: $0 TORCH_VERSION..." >&2; exit 2; }
venvs=${VENVS:-$(mktemp -d)}
wheels=$(mktemp -d)
python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" .
for version in "$@"; do
  venv="$venvs/torch-$version"
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet "torch==$version" numpy safetensors pytest hypothesis pytest-benchmark
  "$venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheels"/*.whl
  echo "== torch $version"
  "$venv/bin/python" -m pytest -q tests/ops tests/goldens_v2
done
