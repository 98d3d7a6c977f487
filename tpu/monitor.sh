#!/usr/bin/env bash
# Show the state of the queue and of the slices, whether the run is active, and its last lines.
#   tpu/monitor.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME

run gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
  --format='value(state.state)' || true # slices made with --now are not in the queue
nodes | while read -r node; do
  run gcloud compute tpus tpu-vm describe "$node" --project="$PROJECT" --zone="$ZONE" \
    --format='table(name,state,health,acceleratorType,schedulingConfig.preemptible)' < /dev/null
  on_workers "$node" "pgrep -f '[c]txjax\.main' > /dev/null && echo running || echo idle; tail -n 3 ~/run.log" < /dev/null
done
