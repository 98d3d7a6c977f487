#!/usr/bin/env bash
# Request the slices: through the queue (default; the request waits for capacity), or directly with --now.
#   tpu/create.sh [--now]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME TYPE

version=$(runtime)
extra=()
[ "$SPOT" = 1 ] && extra=(--spot)
if [ "${1:-}" = "--now" ]; then
  [ "$SLICES" = 1 ] || fail "--now makes one slice; SLICES=$SLICES need the queue: leave --now out"
  run gcloud compute tpus tpu-vm create "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --accelerator-type="$TYPE" --version="$version" "${extra[@]}"
  exit
fi
[ $# = 0 ] || fail "unknown argument $1; tpu/create.sh [--now]"
if [ "$SLICES" = 1 ]; then
  which=(--node-id="$NAME")
else
  which=(--node-count="$SLICES" --node-prefix="$NAME")
fi
run gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" \
  --accelerator-type="$TYPE" --runtime-version="$version" "${which[@]}" "${extra[@]}"
