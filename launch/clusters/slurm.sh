#!/usr/bin/env bash
# One training run on the GPUs of a SLURM cluster: one process a node, joined by jax.distributed, which asks SLURM.
#
#   launch/clusters/slurm.sh [--dry-run] --config=configs/qwen3_4b_grpo_tcr.py --config.run_dir=/shared/runs/first
#
# Submits itself; the same line resumes. NODES, GPUS (a node), TIME, PARTITION and VENV (whose Python is used) may be set.
# The run directory must lie where every node sees it. Two minutes before the time limit, and on preemption, SLURM sends
# SIGTERM: the run saves and ends, and --requeue starts it again.
set -euo pipefail

NODES=${NODES:-1}
GPUS=${GPUS:-8}
TIME=${TIME:-24:00:00}
PARTITION=${PARTITION:-}
VENV=${VENV:-.venv}

if [[ -n ${SLURM_JOB_ID:-} && ${1:-} == --inside ]]; then
  shift
  exec srun --kill-on-bad-exit=1 "$VENV/bin/python" -m launch.train "$@"
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
partition=()
[[ -z $PARTITION ]] || partition=(--partition="$PARTITION")
command=(sbatch --job-name=agentrl --nodes="$NODES" --ntasks-per-node=1 --gpus-per-node="$GPUS" --exclusive
  --time="$TIME" --signal=TERM@120 --requeue --open-mode=append --output=slurm-%j.log
  "${partition[@]}" "--export=ALL,VENV=$VENV" launch/clusters/slurm.sh --inside "$@")
printf '%q ' "${command[@]}"
printf '\n'
[[ -z $dry ]] || exit 0
if ! command -v sbatch >/dev/null; then
  echo "error: sbatch is not there; run this where SLURM is, or with --dry-run" >&2
  exit 2
fi
exec "${command[@]}"
