#!/usr/bin/env bash
# Serves a real model by llama.cpp and by vLLM on the CPU, and tests what the program asks of them. See scripts/real_servers.py.
# Usage: bash scripts/real_servers.sh [llama.cpp] [vllm] [--real FOLDER] [--gguf FILE] [--folder FOLDER] [--rows N]
set -euo pipefail
. "$(dirname "$0")/environment.sh" ""
exec .venv/bin/python scripts/real_servers.py "$@"
