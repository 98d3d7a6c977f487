#!/usr/bin/env bash
# Install ctxjax on every host of every slice, and mount BUCKET there. Safe to repeat: it updates an installation.
#   tpu/setup.sh [--workdir=DIR]
# With --workdir: the code of the last start of the run in this folder, not the newest of BRANCH.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
need PROJECT ZONE NAME REPOSITORY

workdir=""
case "${1:-}" in
  --workdir=*) workdir=${1#--workdir=} ;;
  "") ;;
  *) fail "unknown argument $1; tpu/setup.sh [--workdir=DIR]" ;;
esac

install="set -e"
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
printf -v from '%q' "$REPOSITORY"
printf -v at '%q' "$BRANCH"
install="$install
at=$at"
if [ -n "$workdir" ]; then
  # A run that has not claimed its folder yet has computed nothing: any code will do. "commit" may have a remark on
  # changes after it, which no clone has.
  printf -v manifest '%q' "$workdir/run.json"
  install="$install
if [ -f $manifest ]; then
  at=\$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[\"commit\"].split()[0])' $manifest)
fi"
fi
# A tag or a commit is no branch, and there is nothing to pull.
install="$install
[ -d ctxjax ] || git clone -q $from ctxjax
git -C ctxjax fetch -q --tags --force origin
git -C ctxjax checkout -q \"\$at\"
if git -C ctxjax symbolic-ref -q HEAD > /dev/null; then git -C ctxjax pull -q; fi
python3 -m pip install -q --user uv
[ -d venv ] || ~/.local/bin/uv venv -q --python 3.12 venv
~/.local/bin/uv pip install -q --python venv/bin/python -e './ctxjax[tpu]'
venv/bin/python -c 'import jax; print(jax.local_device_count(), jax.local_devices()[0].device_kind)'"
nodes | while read -r node; do
  on_workers "$node" "$install" < /dev/null
done
