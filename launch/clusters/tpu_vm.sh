#!/usr/bin/env bash
# One training run on a Cloud TPU VM: create, install, run, stop, delete.
#
#   launch/clusters/tpu_vm.sh create                                      # the TPU (SPOT=1: a preemptible one)
#   launch/clusters/tpu_vm.sh install                                     # this checkout's commit, on all workers
#   launch/clusters/tpu_vm.sh run --config=configs/qwen3_4b_grpo_tcr.py   # on all workers; the same line resumes
#   launch/clusters/tpu_vm.sh stop | status | logs | delete
#
# --dry-run as the first argument prints the commands and runs none. Set TPU_NAME, ZONE, ACCELERATOR, RUNTIME, REPOSITORY
# (an address that the workers can clone) and BUCKET as needed. With BUCKET (gs://name) the workers mount it at ~/bucket:
# give --config.run_dir=bucket/... there, since all workers must see one run directory and a preempted TPU loses its disk.
set -euo pipefail

TPU_NAME=${TPU_NAME:-agentrl}
ZONE=${ZONE:-us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
REPOSITORY=${REPOSITORY:-}
BUCKET=${BUCKET:-}
DRY=
HOME_DIR=open_agentrl_jax

die() {
  echo "error: $1" >&2
  exit 2
}

do_it() { # prints the command; runs it unless this is a dry run
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n $DRY ]] || "$@"
}

tpu() { do_it gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$ZONE" "${@:2}"; }
everywhere() { tpu ssh --worker=all --command="$1"; }

create() {
  local spot=()
  [[ -z ${SPOT:-} ]] || spot=(--spot)
  tpu create --accelerator-type="$ACCELERATOR" --version="$RUNTIME" "${spot[@]}"
}

install() {
  [[ -n $REPOSITORY ]] || die "REPOSITORY is empty; give an address that the workers can clone"
  local commit script
  commit=$(git rev-parse HEAD)
  script="set -e; sudo apt-get -qq update; sudo apt-get -qq install -y git python3.11 python3.11-venv"
  script+="; [ -d $HOME_DIR ] || git clone -q $(printf %q "$REPOSITORY") $HOME_DIR"
  script+="; cd $HOME_DIR; git fetch -q; git checkout -q $commit"
  script+="; python3.11 -m venv .venv; .venv/bin/pip install -q -e '.[tpu,servers]'"
  if [[ -n $BUCKET ]]; then
    script+="; command -v gcsfuse >/dev/null || { echo 'install gcsfuse on this image first' >&2; exit 1; }"
    script+="; mkdir -p bucket; mountpoint -q bucket || gcsfuse --implicit-dirs ${BUCKET#gs://} bucket"
  fi
  everywhere "$script"
}

run() {
  (($#)) || die "run: give the flags of launch.train, e.g. --config=configs/qwen3_4b_grpo_tcr.py"
  local flags
  flags=$(printf ' %q' "$@")
  # setsid: the run outlives this connection; it ends by itself or by stop
  everywhere "cd $HOME_DIR && setsid nohup .venv/bin/python -m launch.train$flags >train.log 2>&1 </dev/null & sleep 5; tail -n 3 $HOME_DIR/train.log"
}

stop() { everywhere "pkill -TERM -f '[l]aunch.train' || true"; } # SIGTERM: checkpoint, then exit
logs() { everywhere "tail -n 20 $HOME_DIR/train.log"; }
status() { tpu describe --format='value(state,health)'; }
delete() { tpu delete --quiet; }

if [[ ${1:-} == --dry-run ]]; then
  DRY=1
  shift
fi
action=${1:-}
case $action in
create | install | run | stop | logs | status | delete) ;;
*) die "give one of create, install, run, stop, logs, status, delete; see the head of this file" ;;
esac
[[ -n $DRY ]] || command -v gcloud >/dev/null || die "gcloud is not installed here; install the Google Cloud CLI, or use --dry-run"
"$action" "${@:2}"
