#!/usr/bin/env bash
# Install the Debian packages that are named, as root or by a sudo that asks for nothing; exit code 1 where neither is to be had.
set -euo pipefail
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null || exit 1
echo "installing $*"
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300)
"${apt[@]}" update || echo "WARNING: apt-get update failed, going on with the lists that are here" >&2
"${apt[@]}" install -y --no-install-recommends "$@" >/dev/null
