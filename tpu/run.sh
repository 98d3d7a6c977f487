#!/usr/bin/env bash
# Run one command on every host of every slice. All output goes to LOGS/NAME.log here and to ~/run.log on the hosts.
#   tpu/run.sh [--resume] --config=configs/llama3.py:medical --workdir=/mnt/bucket/runs/medical [--config.field=value ...]
# With --resume: after a preemption, request new slices if they are gone, set them up with the run's own code, and repeat
# the same command, which resumes from the latest checkpoint. This goes on until the command ends by itself.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME

PREEMPTED=${PREEMPTED:-75}  # exit code of a run that was stopped by SIGTERM and saved its state
WAIT=${WAIT:-60}            # seconds between questions for the state of a slice
here=$(dirname "$0")

resume=0
if [ "${1:-}" = "--resume" ]; then resume=1; shift; fi
[ $# -gt 0 ] || fail "nothing to run: tpu/run.sh --config=FILE --workdir=DIR"
workdir=""
for argument in "$@"; do
  case "$argument" in --workdir=*) workdir=$argument ;; esac
done
[ -n "$workdir" ] || fail "--workdir is missing; give a folder that all hosts share"

case " $* " in *" --workdir="*://*) fail "--workdir is a folder, not an address: set BUCKET, repeat tpu/setup.sh, and use --workdir=$MOUNT/..." ;; esac

printf -v arguments ' %q' "$@"
flags=$(grep -v '^ *\(#\|$\)' "$here/flags.env" | tr '\n' ' ')

once() {
  local node index=0 first waiting=() code=0 one coordinator="" command mounted
  [ "$DRY_RUN" = 1 ] || mkdir -p "$LOGS"
  first=$(nodes | head -n 1)
  while read -r node; do
    if [ "$SLICES" != 1 ]; then # hosts of several slices need this to find each other
      coordinator="MEGASCALE_COORDINATOR_ADDRESS=$(address "$first") MEGASCALE_NUM_SLICES=$SLICES MEGASCALE_SLICE_ID=$index "
    fi
    index=$((index + 1))
    # If the bucket is not mounted, its folder would be on the host's own disk and be lost with the host.
    mounted=""
    if [ -n "$BUCKET" ]; then printf -v mounted 'mountpoint -q %q && ' "$MOUNT"; fi
    # A shutdown sends SIGTERM and SIGHUP to all processes of this session. The run must get the first one only, and its
    # log and this shell must outlive it, also if ssh is lost: a run that cannot print ends before it has saved.
    command="trap '' HUP; trap : TERM; ${mounted}cd ctxjax && set -o pipefail && env $flags$coordinator../venv/bin/python -m ctxjax.main$arguments 2>&1 | (trap '' TERM; exec tee -p -a ~/run.log)"
    if [ "$DRY_RUN" = 1 ]; then
      on_workers "$node" "$command"
      continue
    fi
    { on_workers "$node" "$command" < /dev/null 2>&1 | tee -a "$LOGS/$node.log"; } &
    waiting+=($!)
  done < <(nodes)
  for one in "${waiting[@]}"; do wait "$one" || code=$?; done
  return "$code"
}

# Print the internal address of a node's first host.
address() {
  if [ "$DRY_RUN" = 1 ]; then echo "ADDRESS-OF-$1"; return; fi
  gcloud compute tpus tpu-vm describe "$1" --project="$PROJECT" --zone="$ZONE" \
    --format='value(networkEndpoints[0].ipAddress)'
}

# Print the state of a node: GONE if it does not exist. Any other error says nothing of the node: ask again.
state() {
  local found errors
  errors=$(mktemp)
  until found=$(gcloud compute tpus tpu-vm describe "$1" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state)' < /dev/null 2> "$errors"); do
    if grep -q NOT_FOUND "$errors"; then found=GONE; break; fi
    echo "the state of $1 is unknown, asking again: $(tail -n 1 "$errors")" >&2
    sleep "$WAIT"
  done
  rm "$errors"
  echo "$found"
}

all_ready() {
  local node
  while read -r node; do [ "$(state "$node")" = READY ] || return 1; done < <(nodes)
}

while true; do
  code=0
  once || code=$?
  if [ "$code" = 0 ] || [ "$resume" = 0 ] || [ "$DRY_RUN" = 1 ]; then exit "$code"; fi
  if [ "$code" != "$PREEMPTED" ] && all_ready; then
    echo "the run failed with exit code $code, and the slices are ready; see $LOGS" >&2
    exit "$code"
  fi
  if ! all_ready; then
    echo "preempted; requesting new slices" >&2
    "$here/delete.sh" || true
    "$here/create.sh"
    until all_ready; do sleep "$WAIT"; done
    "$here/setup.sh" "$workdir"
  fi
done
