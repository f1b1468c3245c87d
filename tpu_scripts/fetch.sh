#!/usr/bin/env bash
# Copies what a run has written from the first worker to this machine.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FROM=$REMOTE_REPOSITORY/runs
TO=""

usage() {
  cat <<EOF
Usage: fetch.sh --name NAME --zone ZONE [options]

Copies ~/$FROM (metrics, logs, pictures, configuration) from worker 0, the one that writes them.
Checkpoints of a slice with several workers belong in a bucket: read them there.

  --from FOLDER      folder on the worker, relative to its home (default $FROM)
  --to FOLDER        where to, in a folder of the source's name (default fetched/NAME)
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --from) FROM=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --to) TO=$(value_of "${@:1:2}"); CONSUMED=2 ;;
  esac
}

parse_options "$@"
no_arguments
[[ -n $TO ]] || TO=fetched/$NAME

run mkdir -p "$TO"
tpus tpu-vm scp --recurse "$NAME:$FROM" "$TO" --worker=0
$DRY_RUN || echo "fetched to $TO/$(basename "$FROM")"
