#!/usr/bin/env bash
# Deletes the TPU and its queued resource: nothing is billed afterwards, and its disks are gone.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CONFIRMED=false

usage() {
  cat <<EOF
Usage: delete.sh --name NAME --zone ZONE [options]

Deletes the TPU with its disks, or withdraws the request for it. Fetch what you want to keep first. What is gone
already is no error.

  --yes              do not ask
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --yes) CONFIRMED=true; CONSUMED=1 ;;
  esac
}

parse_options "$@"
no_arguments

if ! $CONFIRMED && ! $DRY_RUN; then
  [[ -t 0 ]] || die "there is no terminal to ask on; say --yes"
fi
if ! $DRY_RUN; then
  case $(state) in
    NONE) echo "there is no queued resource '$NAME' in $ZONE: nothing to delete"; exit ;;
    DELETING) echo "'$NAME' is being deleted already"; exit ;;
  esac
fi
if ! $CONFIRMED && ! $DRY_RUN; then
  read -r -p "Delete TPU '$NAME' in $ZONE with its disks? Type its name: " answer
  [[ $answer == "$NAME" ]] || die "not deleted"
fi
# --force deletes the running TPU along with its queued resource.
tpus queued-resources delete "$NAME" --force
