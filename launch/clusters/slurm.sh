#!/usr/bin/env bash
# One training run on the GPUs of a SLURM cluster, with SGLang servers on nodes of the same job.
#
#   launch/clusters/slurm.sh [--dry-run] --config=configs/qwen3_4b_grpo_tcr.py --config.run_dir=/shared/runs/first ...
#
# Submits itself; the same line resumes. One training process per node, joined by jax.distributed, takes all its GPUs.
# Variables: NODES for training, SERVER_NODES (one SGLang server per GPU; needs MODEL, the folder they start with), GPUS
# (per node), TIME, PARTITION, VENV and SGLANG_ENV (environments of trainer and servers), CONTEXT (prompt + response).
# The run directory must be on a disk that every node sees. Two minutes before the time limit, and on preemption, SLURM
# sends SIGTERM: the run saves and ends, and --requeue starts it again.
set -euo pipefail

NODES=${NODES:-1}
SERVER_NODES=${SERVER_NODES:-0}
GPUS=${GPUS:-8}
TIME=${TIME:-24:00:00}
PARTITION=${PARTITION:-}
MODEL=${MODEL:-}
VENV=${VENV:-.venv}
SGLANG_ENV=${SGLANG_ENV:-.venv-sglang}
CONTEXT=${CONTEXT:-23040}

inside() { # in the allocation: the last SERVER_NODES nodes serve, the others train
  local nodes urls='' node gpu
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  for node in "${nodes[@]:NODES}"; do
    for ((gpu = 0; gpu < GPUS; gpu++)); do
      urls+="'http://$node:$((30000 + gpu))',"
    done
    # shellcheck disable=SC2016  # expanded by the inner bash
    srun --nodes=1 --ntasks=1 --nodelist="$node" --output="servers-%j-$node.log" bash -c '
      for ((gpu = 0; gpu < $3; gpu++)); do
        "$0" -m sglang.launch_server --model-path "$1" --host 0.0.0.0 --port $((30000 + gpu)) --base-gpu-id "$gpu" \
          --context-length "$2" --skip-tokenizer-init --incremental-streaming-output --device cuda --dtype bfloat16 \
          --mem-fraction-static 0.85 &
      done
      wait' "$SGLANG_ENV/bin/python" "$MODEL" "$CONTEXT" "$GPUS" &
  done
  local servers=()
  [[ -z $urls ]] || servers=("--config.rollout.servers=($urls)" --config.rollout.startup_seconds=1800)
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # JAX's default of 0.75 is too little
  trainers=$(IFS=,; echo "${nodes[*]:0:NODES}")
  trap 'kill -TERM "$train"' TERM # to the training step alone: the servers must outlive its last checkpoint
  srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --nodelist="$trainers" --kill-on-bad-exit=1 \
    "$VENV/bin/python" -m launch.train "$@" "${servers[@]}" &
  train=$!
  local status=0
  wait "$train" || { wait "$train" || status=$?; } # the first wait ends with the signal
  trap - TERM
  local jobs
  mapfile -t jobs < <(jobs -p)
  ((${#jobs[@]} == 0)) || kill "${jobs[@]}" 2>/dev/null || true
  exit "$status"
}

if [[ -n ${SLURM_JOB_ID:-} && ${1:-} == --inside ]]; then
  inside "${@:2}"
fi

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
if ! (($#)); then
  echo "error: give the flags of launch.train, e.g. --config=configs/qwen3_4b_grpo_tcr.py" >&2
  exit 2
fi
if ((SERVER_NODES)) && [[ -z $MODEL ]]; then
  echo "error: MODEL is empty; give the model folder that the servers start with" >&2
  exit 2
fi
partition=()
[[ -z $PARTITION ]] || partition=(--partition="$PARTITION")
exported="ALL,NODES=$NODES,GPUS=$GPUS,MODEL=$MODEL,VENV=$VENV,SGLANG_ENV=$SGLANG_ENV,CONTEXT=$CONTEXT"
command=(sbatch --job-name=agentrl --nodes="$((NODES + SERVER_NODES))" --ntasks-per-node=1 --gpus-per-node="$GPUS"
  --exclusive --time="$TIME" --signal=B:TERM@120 --requeue --open-mode=append --output=slurm-%j.log
  "${partition[@]}" "--export=$exported" launch/clusters/slurm.sh --inside "$@")
printf '%q ' "${command[@]}"
printf '\n'
[[ -z $dry ]] || exit 0
if ! command -v sbatch >/dev/null; then
  echo "error: sbatch is not installed here; run this on a SLURM login node, or with --dry-run" >&2
  exit 2
fi
exec "${command[@]}"
