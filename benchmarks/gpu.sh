#!/usr/bin/env bash
# What a GPU has to say, in one command that ends with one table (and leaves its log in runs/gpu-DEVICE.log):
#     benchmarks/gpu.sh          on a GPU, under 10 minutes
#     benchmarks/gpu.sh cpu      everything at reduced size on a CPU: does all of it run
# A part that fails is named at the end and makes the exit code 1; the others run all the same.
# Minutes planned on a GPU: numerics 1, GRPO decode 1.5, GRPO step 2.5, GR00T 2.5 (most of it compiling), PPO 1.5, FetchVec 0.5.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
python=${PYTHON:-uv run --group bench python}
log=${LOG:-runs/gpu-$device.log}
mkdir -p "$(dirname "$log")" && : >"$log"
failed=()

part() { # part NAME COMMAND...: runs it, copies its output to the log, remembers a failure
  local name=$1 start=$SECONDS
  shift
  echo "## $name" | tee -a "$log"
  echo "+ $*" | tee -a "$log"
  timeout 300 "$@" 2>&1 | tee -a "$log" || failed+=("$name")
  echo "$((SECONDS - start)) s" | tee -a "$log"
}

if [ "$device" = cuda ]; then
  part "numerics on the GPU" $python -m pytest -n 0 -m gpu
  part "GRPO decode, Qwen2-0.5B" $python benchmarks/gpu_decode.py --device cuda
  part "GRPO step, Qwen2-0.5B, 16 tokens" $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 5
  part "GRPO step, graphed and compiled" $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 5 --decode graph --compile
  part "GRPO step, 256 tokens, graphed" $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 2 --max-completion-length 256 --decode graph
  part "GR00T, published size" $python benchmarks/gpu_gr00t.py --device cuda
  part "PPO update" $python benchmarks/gpu_ppo.py --device cuda
  part "FetchVec" $python benchmarks/fetch_speed.py --scaling --num-envs 64 --rounds 3 --tasks FetchPush
  part "PPO run" $python ppo_fetch.py --device cuda --no-capture-video --exp-name gpu_check
elif [ "$device" = cpu ]; then
  part "GRPO decode, bundled model" $python benchmarks/gpu_decode.py --device cpu --reduced
  part "GRPO step, bundled model" $python benchmarks/grpo_vs_trl.py --device cpu --pairs 1 --steps 3
  part "GR00T, tiny" $python benchmarks/gpu_gr00t.py --device cpu --reduced
  part "PPO update" $python benchmarks/gpu_ppo.py --device cpu --reduced
  part "FetchVec" $python benchmarks/fetch_speed.py --scaling --rounds 1 --tasks FetchReach
  part "PPO run" $python ppo_fetch.py --total-timesteps 1600 --amp bf16 --no-capture-video --exp-name gpu_check
else
  echo "error: '$device' is neither cuda nor cpu" >&2
  exit 2
fi

echo
$python benchmarks/table.py "$log"
echo "$SECONDS s in all, commit $(git describe --always --dirty 2>/dev/null || echo unknown), log $log"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'error: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
