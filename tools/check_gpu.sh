#!/usr/bin/env bash
# Check, measure and train on this machine's GPU, in at most eight minutes; what is needed beyond torch is in gpu_kit/.
#   tools/check_gpu.sh [--output DIR] [--steps load correct ...] [--dry-run]      details: tools/check_gpu.py --help
# PYTHON chooses the interpreter. Results go to --output, by default $OUT or output/gpu, line by line as they are known.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}" tools/check_gpu.py "$@"
