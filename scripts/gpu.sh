#!/usr/bin/env bash
# What this machine's CUDA card does, in at most nine minutes: tests, speed against the card's own floor, and short steps of
# the presets beside what `estimate` says; see scripts/gpu.py. It needs a Python with a PyTorch that sees the card, and keeps
# that; what else is missing goes into .venv-gpu (without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER_OF_WHEELS).
# Usage: bash scripts/gpu.sh [--dry] [--fill] [--out FOLDER] [--minutes N] [PRESET …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$(date +%s)
unset PYTHONDONTWRITEBYTECODE  # As in environment.sh: every start would compile the libraries anew.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
sees="assert torch.cuda.is_available()"
case " $* " in *" --dry "*) sees="" && export CUDA_VISIBLE_DEVICES="" ;; esac
python=""
for candidate in ${PYTHON:-} .venv-gpu/bin/python python3 python .venv/bin/python; do
  "$candidate" -c "import sys, torch; assert sys.version_info >= (3, 11); $sees" 2>/dev/null && python="$candidate" && break
done
if [ -z "$python" ]; then
  echo "error: no Python 3.11 or newer with a torch that sees a card; name one, as in PYTHON=/path/to/python, or use --dry" >&2
  exit 1
fi
# What pyproject.toml asks for and is not there, in the versions of constraints.txt.
missing="$("$python" - <<'END'
import importlib.metadata, tomllib
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

pins = dict(line.split("==") for line in Path("scripts/constraints.txt").read_text().split() if "==" in line)
wanted = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
for text in [*wanted, "pytest", "hypothesis"]:
    need = Requirement(text)
    try:
        there = need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        there = False
    if not there:
        assert need.name != "torch", f"this torch is too old: {text} is needed"
        print(f"{need.name}{'[signatures]' * bool(need.extras)}=={pins[need.name]}" if need.name in pins else text)
END
)"
if [ -n "$missing" ]; then
  echo "Installing into .venv-gpu, beside the torch of $python:" $missing
  "$python" -m venv --system-site-packages .venv-gpu
  # A torch of another virtual environment is none of the system's packages.
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$(echo .venv-gpu/lib/python*/site-packages)/machine.pth"
  kept=.venv-gpu/torch.txt
  "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > "$kept"
  # shellcheck disable=SC2086
  .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c "$kept" $missing
  python=.venv-gpu/bin/python
fi
exec "$python" scripts/gpu.py --began "$began" "$@"
