#!/usr/bin/env bash
# Build the operator on a machine with a GPU, check it, run the sanitizers, and measure it: one command.
#   tools/check_gpu.sh [folder for the results]
# PYTHON chooses the interpreter. The environment needs torch with CUDA, pytest and hypothesis.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
output=${1:-output/benchmark_op}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

echo "== build"
PEFT_D2_CUDA=1 "$python" setup.py -q build_ext --inplace
"$python" -c "
import sys, torch
from peft_d2 import ops
reason = ops.backends()['cuda']
sys.exit(f'stopped after the build: {reason}') if reason else print(torch.cuda.get_device_name())"

echo "== check"
"$python" -m pytest tests/ops -q
"$python" tools/benchmark_op.py --device cuda --check --dtypes float64 float32 bfloat16 float16

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tools/benchmark_op.py --device cuda --check --small
  done
else
  echo "== no compute-sanitizer on the PATH: memcheck and racecheck are left out"
fi

echo "== benchmark"
"$python" tools/benchmark_op.py --device cuda --rounds 30 --output "$output"
