#!/usr/bin/env bash
# Two "machines" of two processes each on this computer, one torchrun a machine, joined over loopback: every script takes
# a few steps (benchmarks/nodes.sh), or those whose name has a word in it (benchmarks/nodes.sh ppo). Everything is small:
# four processes share the cores there are, and all but the first wait while it evaluates.
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
only=${1:-.}
failed=0

both() { # both NAME SCRIPT FLAGS...: on each machine
  local name=$1 port=$((20000 + RANDOM % 20000)) start=$SECONDS
  shift
  [[ $name =~ $only ]] || return 0
  local pids=() ok=1
  for machine in 0 1; do
    ${TORCHRUN:-uv run torchrun} --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id "$port" \
      --rdzv-endpoint "localhost:$port" "$@" --device cpu --output-dir runs/nodes >"runs/nodes-$name-$machine.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || ok=0; done
  if [ $ok = 1 ]; then echo "$name: ok, $((SECONDS - start)) s"; else
    echo "$name: FAILED, runs/nodes-$name-*.log"
    failed=1
  fi
}

mkdir -p runs
grpo="--n-samples 32 --epochs 1 --batch-size 64 --eval-samples 1"
both grpo_arithmetic grpo_arithmetic.py $grpo
both grpo_arithmetic_fsdp grpo_arithmetic.py $grpo --fsdp
both grpo_mixed grpo_mixed.py $grpo --fsdp --task-eval-problems 10
lite="--model-path lite --max-steps 4 --batch-size 16 --no-closed-loop --eval-trajs 2"
both gr00t_finetune gr00t_finetune.py $lite
both gr00t_finetune_fsdp gr00t_finetune.py $lite --fsdp
both ppo_fetch ppo_fetch.py --total-timesteps 4000 --eval-episodes 8 --no-capture-video
# its default would be to fine-tune a policy of its own, which takes minutes: a run of gr00t_finetune.py serves
policy() { ls -dt runs/nodes/gr00t_finetune/*/ 2>/dev/null | head -1; }
[ -n "$(policy)" ] || only=gr00t_finetune$ both gr00t_finetune gr00t_finetune.py $lite
both ppo_gr00t ppo_gr00t.py --model-path "$(policy)" --num-envs 8 --num-steps 2 --total-timesteps 240 --eval-episodes 8 \
  --update-epochs 1 --critic-epochs 1 --no-capture-video
exit $failed
