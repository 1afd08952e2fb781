#!/usr/bin/env bash
# What a GPU has to say, in one command: tests on the device, the GRPO step against TRL's, PPO in each precision.
# A machine without one runs the same at reduced size:  benchmarks/gpu.sh cpu
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
run() { echo "+ $*"; "$@"; }
ppo() { run uv run python ppo_fetch.py --device "$device" --no-capture-video --exp-name "gpu_check" "$@"; }
if [ "$device" = cuda ]; then
  run uv run pytest -m gpu
  run uv run --group bench python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 2
  run uv run --group bench python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --max-completion-length 256
  ppo
  ppo --hidden 1024 --amp bf16 --compile
  ppo --hidden 1024 --amp fp16 --compile
else
  run uv run --group bench python benchmarks/grpo_vs_trl.py --device cpu --pairs 1 --steps 3
  ppo --total-timesteps 1600 --amp bf16
fi
