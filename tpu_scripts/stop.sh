#!/usr/bin/env bash
# Ends the run on every worker: it saves a checkpoint first.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SECONDS_TO_SAVE=600

usage() {
  cat <<EOF
Usage: stop.sh --name NAME --zone ZONE [options]

Sends SIGTERM to the run on every worker, upon which it saves a checkpoint and exits, and waits for its end.

  --wait SECONDS     how long it may take (default $SECONDS_TO_SAVE); then stop.sh fails and the run goes on
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --wait) SECONDS_TO_SAVE=$(value_of "${@:1:2}"); CONSUMED=2 ;;
  esac
}

parse_options "$@"
no_arguments
[[ $SECONDS_TO_SAVE =~ ^[1-9][0-9]*$ ]] || die "--wait '$SECONDS_TO_SAVE': a whole number of seconds"

# Runs on the workers.
on_all_workers "set -eu
cd ~/$REMOTE_REPOSITORY
[ -f runs/launch.pid ] || { echo \"\$(hostname): nothing was launched\"; exit 0; }
pid=\$(cat runs/launch.pid)
kill -TERM -- \"-\$pid\" 2>/dev/null || { echo \"\$(hostname): the run had ended\"; exit 0; }
for _ in \$(seq $SECONDS_TO_SAVE); do
  kill -0 \"\$pid\" 2>/dev/null || { echo \"\$(hostname): stopped\"; exit 0; }
  sleep 1
done
echo \"\$(hostname): process \$pid is still running after $SECONDS_TO_SAVE s\" >&2
exit 1"
