#!/bin/sh
# Install rx-edge from this archive, without a network, and prove that the bundle is the trained
# model on this machine.
#   sh install.sh [DIRECTORY]     where the environment goes; default: ./rx-edge
#   PYTHON=/path/to/python@PYTHON@ sh install.sh     another interpreter
set -eu

say() { echo "install.sh: $*" >&2; }
stop() { say "$*"; exit 1; }

target=${1:-rx-edge}
case $target in /*) ;; *) target=$PWD/$target ;; esac
cd "$(dirname "$0")"

say "[1/4] checking every file"
sums=$(LC_ALL=C sha256sum -c SHA256SUMS) || {
  echo "$sums" | grep -v ': OK$' >&2
  stop "a file differs from SHA256SUMS: copy the archive again"
}

python=${PYTHON:-python@PYTHON@}
command -v "$python" >/dev/null || stop "$python is needed (or: PYTHON=... sh install.sh)"
found=$("$python" -c 'import platform, sys
print("%d.%d %s %s" % (*sys.version_info[:2], sys.platform, platform.machine()))')
[ "$found" = "@PYTHON@ @SYSTEM@" ] || stop "made for Python @PYTHON@ @SYSTEM@, this is $found"

say "[2/4] environment in $target"
[ ! -e "$target" ] || stop "$target exists: remove it, or name another directory"
"$python" -m venv "$target" || stop "$python -m venv failed (Debian: package python@PYTHON@-venv)"

say "[3/4] installing from wheels/"
# neither settings of this machine's pip nor its environment may send it to an index
PIP_CONFIG_FILE=/dev/null "$target/bin/python" -m pip --isolated install --quiet \
  --disable-pip-version-check --no-cache-dir --no-index --find-links wheels \
  --constraint constraints.txt "@REQUIREMENT@"

say "[4/4] comparing the bundle with the trained model on this machine"
code=0
"$target/bin/rx-edge" verify bundle || code=$?
# 132: killed by SIGILL
[ "$code" -ne 132 ] || stop "this processor lacks instructions that llama.cpp was built for: ask" \
  "the sender for an archive with portable wheels (docs/INSTALL.md)"
[ "$code" -eq 0 ] || stop "verification failed (exit code $code): do not use this bundle here"
say "ready: $target/bin/rx-edge report STUDY.dcm --bundle $PWD/bundle"
