#!/usr/bin/env bash
# Installs ctxjax on every host of every slice. Safe to repeat: what is there is brought up to date.
#   tpu/setup.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME REPOSITORY

printf -v from '%q' "$REPOSITORY"
printf -v at '%q' "$BRANCH"
install="set -e
if [ -d ctxjax ]; then git -C ctxjax fetch -q origin && git -C ctxjax checkout -q $at && git -C ctxjax pull -q
else git clone -q --branch $at $from ctxjax; fi
python3 -m pip install -q --user uv
[ -d venv ] || ~/.local/bin/uv venv -q --python 3.12 venv
~/.local/bin/uv pip install -q --python venv/bin/python -e './ctxjax[tpu]'
venv/bin/python -c 'import jax; print(jax.local_device_count(), jax.local_devices()[0].device_kind)'"
nodes | while read -r node; do
  on_workers "$node" "$install" < /dev/null
done
