#!/usr/bin/env bash
# Checks style and types and runs the tests on the CPU, without network. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "[dev]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
