#!/usr/bin/env bash
# The whole of ZeroSearch in miniature, on two CPU cores, in ten to fifteen minutes: see scripts/quickstart.py for the stages.
# Usage: bash scripts/quickstart.sh [--seed N] [--name NAME] [--world-seed N]
set -euo pipefail
started=$(date +%s)
. "$(dirname "$0")/environment.sh" ""
exec .venv/bin/python scripts/quickstart.py --install-seconds "$(($(date +%s) - started))" "$@"
