# Shared by all scripts in this folder: settings, checks, and the function that runs cloud commands. Source it.
# shellcheck shell=bash
#
# Settings come from the environment, or from the file in CTXJAX_TPU (tpu/example.env shows all settings).

set -euo pipefail

if [ -n "${CTXJAX_TPU:-}" ]; then
  [ -r "$CTXJAX_TPU" ] || { echo "CTXJAX_TPU=$CTXJAX_TPU cannot be read" >&2; exit 2; }
  # shellcheck disable=SC1090  # the user's own file
  source "$CTXJAX_TPU"
fi

PROJECT=${PROJECT:-} ZONE=${ZONE:-} NAME=${NAME:-} TYPE=${TYPE:-} REPOSITORY=${REPOSITORY:-} # see tpu/example.env
DRY_RUN=${DRY_RUN:-0}       # 1: print cloud commands instead of running them
SLICES=${SLICES:-1}         # number of slices of TYPE; several are connected over the data-center network
SPOT=${SPOT:-0}             # 1: spot capacity: cheaper, but it may be taken away at any time
RUNTIME=${RUNTIME:-}        # software version; empty: chosen by TYPE
BRANCH=${BRANCH:-main}      # of REPOSITORY; or a tag, or a commit
BUCKET=${BUCKET:-}          # Cloud Storage bucket; setup.sh mounts it as MOUNT on every host; empty: none
MOUNT=${MOUNT:-/mnt/bucket}
LOGS=${LOGS:-logs}          # local folder for the output of all hosts

fail() { echo "$*" >&2; exit 2; }

# need NAME...: end with a message if a setting is missing.
need() {
  local setting
  for setting in "$@"; do
    [ -n "${!setting:-}" ] || fail "$setting is not set; see tpu/example.env"
  done
}

# run COMMAND...: run it, or print it with shell quoting if DRY_RUN=1.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# shellcheck disable=SC2034  # not every script reads all of them
readonly PROJECT ZONE NAME TYPE REPOSITORY DRY_RUN SLICES SPOT RUNTIME BRANCH BUCKET MOUNT LOGS

# Print the software version for the accelerator type.
runtime() {
  if [ -n "$RUNTIME" ]; then echo "$RUNTIME"; return; fi
  case "$TYPE" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE is not known; v4-N, v5litepod-N, v5p-N (N TensorCores) or v6e-N" ;;
  esac
}

# Print the names of the slices' nodes, one per line.
nodes() {
  local index
  if [ "$SLICES" = 1 ]; then echo "$NAME"; return; fi
  for ((index = 0; index < SLICES; index++)); do echo "$NAME-$index"; done
}

# on_workers NODE COMMAND: run the command on all hosts of a node at the same time.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$1" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$2"
}
