#!/usr/bin/env bash
# The whole way in real English, on CPU cores: a dictionary, a small model, a night. See scripts/real.py for the stages.
# Usage: bash scripts/real.sh [--model NAME] [--encoder NAME] [--dictionary FOLDER] [--share X] [--folder FOLDER] [--stages]
set -euo pipefail
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-0}"
. "$(dirname "$0")/environment.sh" "[dense]"
case " $* " in *" --dictionary"* | *" --stages "* | *" --help "*) ;; *)
  if [ ! -d runs/foldoc ]; then  # Debian's dictionary of computing; nothing is installed.
    mkdir -p runs/fetched
    (cd runs/fetched && rm -f dict-foldoc_*.deb && apt-get download dict-foldoc && dpkg-deb -x dict-foldoc_*.deb foldoc) && mv runs/fetched/foldoc runs/
  fi ;;
esac
exec .venv/bin/python scripts/real.py "$@"
