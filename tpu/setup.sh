#!/usr/bin/env bash
# Install ctxjax on every host of every slice, and mount BUCKET there. Safe to repeat: it updates an installation.
#   tpu/setup.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME REPOSITORY

printf -v from '%q' "$REPOSITORY"
printf -v at '%q' "$BRANCH"
install="set -e
if [ -d ctxjax ]; then
  git -C ctxjax fetch -q origin
  git -C ctxjax checkout -q $at
  git -C ctxjax pull -q
else git clone -q --branch $at $from ctxjax; fi
python3 -m pip install -q --user uv
[ -d venv ] || ~/.local/bin/uv venv -q --python 3.12 venv
~/.local/bin/uv pip install -q --python venv/bin/python -e './ctxjax[tpu]'
venv/bin/python -c 'import jax; print(jax.local_device_count(), jax.local_devices()[0].device_kind)'"
if [ -n "$BUCKET" ]; then
  # Checkpoints are completed by renaming folders, which gcsfuse does up to a limit. Without a metadata cache all hosts
  # see at once what one host has written.
  printf -v bucket '%q' "$BUCKET"
  printf -v mount '%q' "$MOUNT"
  install="$install
if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  curl -fsS \$apt/doc/apt-key.gpg | sudo tee \$key > /dev/null
  echo \"deb [signed-by=\$key] \$apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -q && sudo apt-get install -qy gcsfuse
fi
sudo mkdir -p $mount && sudo chown \$(id -u) $mount
mountpoint -q $mount || gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 $bucket $mount"
fi
nodes | while read -r node; do
  on_workers "$node" "$install" < /dev/null
done
