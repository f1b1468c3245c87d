#!/usr/bin/env bash
# Starts the same command on every worker, in the background.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN_DIR=""

usage() {
  cat <<EOF
Usage: launch.sh --name NAME --zone ZONE [options] -- jaxrl-llm STAGE [ARGUMENTS]
       launch.sh --name NAME --zone ZONE [options] -- FILE.py [ARGUMENTS]

Starts the line on every worker, in ~/$REMOTE_REPOSITORY and with --distributed. The run outlives the connection; its
output goes to runs/launch.log there, its exit status to launch.status beside it. A worker that still has a run
refuses.

  --go-on FOLDER     add --resume where this run folder, which all workers share, holds a run
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --go-on) RUN_DIR=$(value_of "${@:1:2}"); CONSUMED=2 ;;
  esac
}

parse_options "$@"
for_python ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
line=$(words "${ARGUMENTS[@]}")

# Runs on the workers. setsid frees the run from the connection; the shell around it, whose process id is kept for
# stop.sh, writes down how it ended: its status, or "stopped" after a SIGTERM (stop.sh, or a machine that goes down).
# A Spot machine is told that it goes some seconds before its shutdown comes to the run: then that is the SIGTERM.
# shellcheck disable=SC2016
around='trap "stopped=stopped" TERM
metadata=http://metadata.google.internal/computeMetadata/v1/instance
{
  until [ "$(curl -sf -H Metadata-Flavor:Google "$metadata/preempted?wait_for_change=true")" = TRUE ]; do sleep 5; done
  echo "this machine is being preempted"
  kill -TERM 0
} 2>/dev/null &
"$@"
echo "${stopped:-$?}" > runs/launch.status
trap "" TERM
kill -TERM 0'
on_all_workers "set -eu
cd ~/$REMOTE_REPOSITORY
mkdir -p runs
if [ -f runs/launch.pid ] && kill -0 \"\$(cat runs/launch.pid)\" 2>/dev/null; then
  echo \"\$(hostname): a run is active (process \$(cat runs/launch.pid)); end it with stop.sh\" >&2
  exit 1
fi
rm -f runs/launch.status
printf '%s' $(printf %q "$line") > runs/launch.line
set -- ~/$REMOTE_ENVIRONMENT/bin/python $(words "${ON_A_HOST[@]}")
${RUN_DIR:+$(going_on "$RUN_DIR")}
setsid nohup bash -c $(printf %q "$around") run \"\$@\" > runs/launch.log 2>&1 < /dev/null &
echo \$! > runs/launch.pid"

$DRY_RUN || cat <<EOF
Started on every worker of $NAME. To follow the first one:
  gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE${PROJECT:+ --project=$PROJECT} --worker=0 --command='tail -n 50 -f $REMOTE_REPOSITORY/runs/launch.log'
EOF
