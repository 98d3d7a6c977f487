#!/usr/bin/env bash
# Delete the slices. Checkpoints are in the run's workdir, not on the slices.
#   tpu/delete.sh [--now]      --now: for slices made with create.sh --now
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME

if [ "${1:-}" = "--now" ]; then
  run gcloud compute tpus tpu-vm delete "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet
else
  run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
fi
