# What all scripts here share: settings, checks, and the one way in which a cloud command is run. Sourced, not run.
# shellcheck shell=bash
#
# Settings come from the environment, or from the file that CTXJAX_TPU names (tpu/example.env shows them all).

set -euo pipefail

if [ -n "${CTXJAX_TPU:-}" ]; then
  [ -r "$CTXJAX_TPU" ] || { echo "CTXJAX_TPU=$CTXJAX_TPU cannot be read" >&2; exit 2; }
  # shellcheck disable=SC1090  # the user's own file
  source "$CTXJAX_TPU"
fi

PROJECT=${PROJECT:-} ZONE=${ZONE:-} NAME=${NAME:-} TYPE=${TYPE:-} REPOSITORY=${REPOSITORY:-} # see tpu/example.env
DRY_RUN=${DRY_RUN:-0}       # 1: print every cloud command instead of running it
SLICES=${SLICES:-1}         # slices of TYPE; more than one are connected over the data-center network
SPOT=${SPOT:-0}             # 1: cheaper, and may be taken away at any time
RUNTIME=${RUNTIME:-}        # software version; empty: by TYPE
BRANCH=${BRANCH:-main}      # of REPOSITORY
BUCKET=${BUCKET:-}          # of Cloud Storage, mounted by setup.sh as MOUNT on every host; empty: none
MOUNT=${MOUNT:-/mnt/bucket}
LOGS=${LOGS:-logs}          # folder on this machine for the workers' output

fail() { echo "$*" >&2; exit 2; }

# need NAME...: ends with a message where a setting is missing.
need() {
  local setting
  for setting in "$@"; do
    [ -n "${!setting:-}" ] || fail "$setting is not set; see tpu/example.env"
  done
}

# run COMMAND...: runs it, or prints it where DRY_RUN=1, quoted as a shell reads it.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# shellcheck disable=SC2034  # which of them a script reads is its own business
readonly PROJECT ZONE NAME TYPE REPOSITORY DRY_RUN SLICES SPOT RUNTIME BRANCH BUCKET MOUNT LOGS

# The software version that belongs to an accelerator type.
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

# The names of the slices' nodes, one a line.
nodes() {
  local index
  if [ "$SLICES" = 1 ]; then echo "$NAME"; return; fi
  for ((index = 0; index < SLICES; index++)); do echo "$NAME-$index"; done
}

# on_workers NODE COMMAND: on all of a node's hosts at once.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$1" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$2"
}
