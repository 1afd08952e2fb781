#!/usr/bin/env bash
# What a GPU has to say, in one command that ends with one table (and leaves its log in runs/gpu-DEVICE.log):
#     benchmarks/gpu.sh                       on a GPU, some half an hour, half of them compiling
#     benchmarks/gpu.sh cuda 'decode|probe'   only the parts whose name has this in it
#     benchmarks/gpu.sh cpu                   everything at reduced size on a CPU: does all of it run
# A part that fails is named at the end and makes the exit code 1; the others run all the same. PYTHON=python3 where there
# is no uv; what to carry to a machine without a network: benchmarks/gpu_wheels.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
only=${2:-.}
python=${PYTHON:-uv run --group bench python}
log=${LOG:-runs/gpu-$device.log}
mkdir -p "$(dirname "$log")" && : >"$log"
failed=()

part() { # part NAME SECONDS COMMAND...: runs it so long at most, copies its output to the log, remembers a failure
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [[ $name =~ $only ]] || return 0
  echo "## $name" | tee -a "$log"
  echo "+ $*" | tee -a "$log"
  timeout "$limit" "$@" 2>&1 | tee -a "$log" || failed+=("$name")
  echo "$((SECONDS - start)) s" | tee -a "$log"
}

if [ "$device" = cuda ]; then
  part "probe: rates" 60 $python benchmarks/gpu_probe.py --parts rates
  part "numerics" 100 $python -m pytest -n 0 -vv -m gpu -k "not compiled" tests/test_grpo_gpu.py tests/test_gr00t_gpu.py
  part "decode, Qwen2-0.5B" 150 $python benchmarks/gpu_decode.py --modes eager graph --no-checks
  part "probe: compiled step" 130 $python benchmarks/gpu_probe.py --parts kernels --compiled
  part "numerics of decoding, sampling" 70 $python benchmarks/gpu_decode.py --modes
  part "probe: head" 70 $python benchmarks/gpu_probe.py --parts head
  part "probe: cuDNN attention" 90 $python benchmarks/gpu_probe.py --parts attention
  part "probe: kernels of a step" 60 $python benchmarks/gpu_probe.py --parts kernels --batch-sizes 16 256
  part "probe: proposals" 120 $python benchmarks/gpu_probe.py --parts proposals --batch-sizes 256 16
  part "step, 16 tokens, eager" 120 $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 5
  part "step, 16 tokens, graph" 120 $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 5 --decode graph
  part "step, 256 tokens, graph" 200 $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 2 --warmup 1 --max-completion-length 256 --micro-batch-size 64 --decode graph
  part "step, 16 tokens, compiled" 200 $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 5 --warmup 3 --decode compile --compile
  part "step, 256 tokens, compiled" 300 $python benchmarks/grpo_vs_trl.py --device cuda --random-qwen2 --pairs 1 --steps 2 --warmup 2 --max-completion-length 256 --micro-batch-size 64 --decode compile --compile
  part "GR00T, published size" 120 $python benchmarks/gpu_gr00t.py --no-compiled
  part "GR00T, compiled" 300 $python benchmarks/gpu_gr00t.py --batch-sizes 1
  part "PPO update" 120 $python benchmarks/gpu_ppo.py --no-compiled --epochs 2
  part "PPO update, compiled" 120 $python benchmarks/gpu_ppo.py --widths 1024 --amp off bf16 --epochs 2
  part "numerics, compiled" 300 $python -m pytest -n 0 -vv -m gpu -k compiled tests/test_grpo_gpu.py tests/test_gr00t_gpu.py
  part "numerics of the others" 300 $python -m pytest -n 0 -vv -m gpu --ignore tests/test_grpo_gpu.py --ignore tests/test_gr00t_gpu.py
  part "FetchVec" 120 $python benchmarks/fetch_speed.py --scaling --num-envs 64 --rounds 3 --tasks FetchPush
  part "run of PPO" 300 $python ppo_fetch.py --device cuda --no-capture-video --exp-name gpu_check
  part "run of GRPO" 600 $python grpo_arithmetic.py --beta 0.1 --device cuda --exp-name gpu_check
elif [ "$device" = cpu ]; then
  part "probe" 900 $python benchmarks/gpu_probe.py --device cpu --size toy
  part "decode, toy" 900 $python benchmarks/gpu_decode.py --device cpu --reduced
  part "step, bundled model" 900 $python benchmarks/grpo_vs_trl.py --device cpu --pairs 1 --steps 2 --warmup 1
  part "GR00T, tiny" 900 $python benchmarks/gpu_gr00t.py --device cpu --reduced
  part "PPO update" 900 $python benchmarks/gpu_ppo.py --device cpu --reduced
  part "FetchVec" 900 $python benchmarks/fetch_speed.py --scaling --rounds 1 --tasks FetchReach
  part "run of PPO" 900 $python ppo_fetch.py --total-timesteps 1600 --amp bf16 --no-capture-video --exp-name gpu_check
else
  echo "error: '$device' is neither cuda nor cpu" >&2
  exit 2
fi

echo
$python benchmarks/table.py "$log"
echo "$SECONDS s in all, commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}, log $log"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'error: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
