#!/usr/bin/env bash
# Runs one command on every host of every slice, with all output in LOGS/NAME.log here and in ~/run.log there.
#   tpu/run.sh [--resume] --config=configs/llama3.py:medical --workdir=/mnt/bucket/runs/medical [--config.field=value ...]
# With --resume it waits for preempted slices, asks for new ones, sets them up, and repeats the same command, which goes
# on from the latest checkpoint; until it ends by itself.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME

PREEMPTED=${PREEMPTED:-75}  # the exit code of a run that was told to stop and has saved its state
WAIT=${WAIT:-60}            # seconds between looks at a slice that is being made
here=$(dirname "$0")

resume=0
if [ "${1:-}" = "--resume" ]; then resume=1; shift; fi
[ $# -gt 0 ] || fail "what is to run? tpu/run.sh --config=FILE --workdir=DIR"
case " $* " in *" --workdir="*) ;; *) fail "--workdir is missing; a bucket or folder that all hosts share" ;; esac

case " $* " in *" --workdir="*://*) fail "--workdir is a folder, not an address: set BUCKET, repeat tpu/setup.sh, and use --workdir=$MOUNT/..." ;; esac

printf -v arguments ' %q' "$@"
flags=$(grep -v '^ *\(#\|$\)' "$here/flags.env" | tr '\n' ' ')

once() {
  local node index=0 first waiting=() code=0 one coordinator="" command mounted
  [ "$DRY_RUN" = 1 ] || mkdir -p "$LOGS"
  first=$(nodes | head -n 1)
  while read -r node; do
    if [ "$SLICES" != 1 ]; then # what hosts of several slices need, to find one another
      coordinator="MEGASCALE_COORDINATOR_ADDRESS=$(address "$first") MEGASCALE_NUM_SLICES=$SLICES MEGASCALE_SLICE_ID=$index "
    fi
    index=$((index + 1))
    # Where the bucket is not mounted, its folder would be one of this host, and go with it.
    mounted=""
    if [ -n "$BUCKET" ]; then printf -v mounted 'mountpoint -q %q && ' "$MOUNT"; fi
    command="${mounted}cd ctxjax && set -o pipefail && env $flags$coordinator../venv/bin/python -m ctxjax.main$arguments 2>&1 | tee -a ~/run.log"
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

# The internal address of a node's first host.
address() {
  if [ "$DRY_RUN" = 1 ]; then echo "ADDRESS-OF-$1"; return; fi
  gcloud compute tpus tpu-vm describe "$1" --project="$PROJECT" --zone="$ZONE" \
    --format='value(networkEndpoints[0].ipAddress)'
}

state() {
  gcloud compute tpus tpu-vm describe "$1" --project="$PROJECT" --zone="$ZONE" --format='value(state)' 2>/dev/null ||
    echo GONE
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
    echo "the run failed with exit code $code on slices that are there; see $LOGS" >&2
    exit "$code"
  fi
  if ! all_ready; then
    echo "preempted; asking for new slices" >&2
    "$here/delete.sh" || true
    "$here/create.sh"
    until all_ready; do sleep "$WAIT"; done
    "$here/setup.sh"
  fi
done
