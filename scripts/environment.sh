# Sourced by quickstart.sh and test.sh: makes .venv once, with the versions of constraints.txt. Usage: . environment.sh EXTRAS
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Tensors of a tiny model are allocated and freed all the time: keep glibc from returning their pages (a quarter faster).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
# The libraries are compiled by their first import: where Python may not keep that, every start costs half a minute more.
unset PYTHONDONTWRITEBYTECODE
wanted="$(cat scripts/constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1) $1"
if [ "$(grep -Fx -- "$wanted" .venv/installed 2>/dev/null)" != "$wanted" ]; then
  python=""
  for candidate in python3 python3.13 python3.12 python3.11; do  # A name may be there and not work, as with version managers.
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && python="$candidate" && break
  done
  [ -n "$python" ] || { echo "error: Python 3.11, 3.12 or 3.13 is needed; found none of them on the PATH" >&2; exit 1; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "Installing into .venv (once; a minute or two) …"
  # Uncompiled: Python compiles what it imports, a small part, and keeps it; this halves the time.
  install=".venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c scripts/constraints.txt"
  $install torch
  $install -e ".$1"
  echo "$wanted" >> .venv/installed
fi
