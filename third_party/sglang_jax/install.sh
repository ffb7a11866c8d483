#!/usr/bin/env bash
# Builds the sglang-jax server for CPU machines in a virtual environment of its own.
#   third_party/sglang_jax/install.sh [TARGET, default .venv-sglang-jax in the checkout]     (PYTHON=python3.12 chooses the interpreter)
# About 1 GB and two minutes. On a TPU VM: see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$here/../../.venv-sglang-jax}
stamp=$(sha256sum < "$here/requirements-cpu.txt" | cut -d' ' -f1)
if [ "$(cat "$target/installed" 2>/dev/null)" = "$stamp" ]; then
  echo "sglang-jax is already installed in $target"
  exit 0
fi

"${PYTHON:-python3.12}" -m venv --clear "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements-cpu.txt"
JAX_PLATFORMS=cpu "$target/bin/python" -W ignore -c 'import sgl_jax.srt.entrypoints.http_server'
echo "$stamp" > "$target/installed"
echo "sglang-jax is installed in $target"
