#!/usr/bin/env bash
# A machine with Debian, Python 3.11 or newer and pip enters; .venv with the locked packages leaves. Run by `make setup`.
set -euo pipefail
python=${PYTHON:-python3}
# An active environment made by uv has no pip: take the interpreter it stands on.
"$python" -m pip --version >/dev/null 2>&1 || python=$("$python" -c 'import sys; print(sys._base_executable)')

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
  echo "error: $("$python" --version) is not 3.11 to 3.13, for which torch 2.11 is locked: set PYTHON=/path/to/one" >&2
  exit 2
}
[ "$(uname -sm)" = "Linux x86_64" ] || {
  echo "error: this is $(uname -sm), the environment is locked for Linux x86_64: install pyproject.toml's packages by hand" >&2
  exit 2
}

# FFCV is built from source and needs these; they are installed only when missing, and only when we may.
missing=()
for package in ${DEBIAN:-pkg-config libopencv-dev libturbojpeg0-dev build-essential}; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ] && ! bash apt.sh "${missing[@]}"; then
  echo "error: FFCV needs packages that are missing: sudo apt-get install ${missing[*]}" >&2
  exit 2
fi

# uv: the one on PATH, or our own in .uv. (--target needs no venv module and touches no managed environment.)
if ! command -v uv >/dev/null; then
  [ -x .uv/bin/uv ] || "$python" -m pip install --quiet --disable-pip-version-check --target .uv uv
  PATH="$PWD/.uv/bin:$PATH"
fi
# EXTRAS='--extra cluster' adds Ray.
# shellcheck disable=SC2086
uv sync --locked --quiet ${EXTRAS:-} --python "$("$python" -c 'import sys; print(sys.executable)')"
