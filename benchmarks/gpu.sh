#!/usr/bin/env bash
# What a GPU has to say about grpo_arithmetic.py, in one command: tests on the device, then the step against TRL's.
# A machine without one runs the same at reduced size:  benchmarks/gpu.sh cpu
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
run() { echo "+ $*"; "$@"; }
if [ "$device" = cuda ]; then
  run uv run pytest -m gpu
  run uv run --group bench python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 2
  run uv run --group bench python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --max-completion-length 256
else
  run uv run --group bench python benchmarks/grpo_vs_trl.py --device cpu --pairs 1 --steps 3
fi
