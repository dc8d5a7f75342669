#!/usr/bin/env bash
# Runs a command of the project in its own virtual environment, made on the first call:
#   ./launch/local.sh jaxmllm train configs/quickstart.py
#   ./launch/local.sh pytest
# Needs Python >= 3.11 and nothing else; uses uv when it is there. Two lines to edit, if any:
PYTHON="${PYTHON:-python3}"            # the interpreter the environment is made from
EXTRAS="${JAXMLLM_EXTRAS:-test}"       # add cuda, tpu or parity, separated by commas
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${JAXMLLM_VENV:-.venv}"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  for candidate in python3.13 python3.12 python3.11; do
    if "$candidate" -c '' 2>/dev/null; then PYTHON="$candidate"; break; fi
  done
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  { echo "local.sh: Python >= 3.11 not found; set PYTHON to one" >&2; exit 2; }

# Installed once for each content of pyproject.toml and set of extras.
stamp="$venv/.installed-$(cksum <pyproject.toml | cut -d' ' -f1)-${EXTRAS//,/-}"
if [ ! -e "$stamp" ]; then
  echo "local.sh: installing into $venv (once)" >&2
  if command -v uv >/dev/null 2>&1; then
    [ -x "$venv/bin/python" ] || uv venv -q --python "$PYTHON" "$venv"
    uv pip install -q --python "$venv/bin/python" -e ".[$EXTRAS]"
  else
    [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".[$EXTRAS]"
  fi
  touch "$stamp"
fi

[ $# -gt 0 ] || { echo "usage: ./launch/local.sh COMMAND [ARGUMENT ...]" >&2; exit 2; }
PATH="$PWD/$venv/bin:$PATH" exec "$@"
