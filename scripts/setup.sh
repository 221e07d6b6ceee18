#!/usr/bin/env bash
# Shared set-up: a virtual environment with pinned packages; nothing is needed but Python >= 3.11.
# Usage: source scripts/setup.sh EXTRAS   (for instance "fetch" or "dev,fetch"). Safe to repeat.
set -euo pipefail

extras="${1:-fetch}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${EQUIPOISE_VENV:-$root/.venv}"
cpu_index="https://download.pytorch.org/whl/cpu"

find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer was found; install it and run this again" >&2
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  echo "setup: making $venv" >&2
  "$(find_python)" -m venv "$venv"
fi
python="$venv/bin/python"

# The stamp says which pins this environment was made from; it is written last.
stamp="$venv/.equipoise-${extras//,/-}"
wanted="$(cat "$root/constraints.txt" "$root/pyproject.toml" | "$python" -c \
  'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "setup: installing pinned packages (about 2 GB on disk, once)" >&2
  torch_index=()
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 &&
    "$python" -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
    # Without a GPU the CPU build saves gigabytes of CUDA packages.
    torch_index=(--extra-index-url "$cpu_index")
  fi
  pip=("$python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt")
  "${pip[@]}" ${torch_index[@]+"${torch_index[@]}"} torch
  "${pip[@]}" --editable "$root[$extras]"
  echo "$wanted" >"$stamp"
fi
export PATH="$venv/bin:$PATH"
