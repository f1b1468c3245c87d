#!/usr/bin/env bash
# Starts the same command on every worker, in the background.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: launch.sh --name NAME --zone ZONE [options] -- experiments/FILE.py [ARGUMENTS]

Starts "python experiments/FILE.py --distributed ARGUMENTS" on every worker. The run outlives the connection; its
output goes to ~/$REMOTE_REPOSITORY/runs/launch.log of each worker. A worker that still has a run refuses.

$COMMON_OPTIONS
EOF
}

own_option() { :; }

parse_options "$@"
((${#ARGUMENTS[@]} > 0)) || die "nothing to run: name a script after --; see --help"
set -- "${ARGUMENTS[@]}"
script=$1
shift
[[ $script == *.py ]] || die "'$script' is no Python script; one looks like experiments/grpo_gsm8k.py"
# jax.distributed.initialize() finds the other workers by itself on a TPU, and is right on a single one too.
command=("$script" --distributed "$@")

# Runs on the workers. setsid frees the run from the connection; its process id is kept for stop.sh.
on_all_workers "set -eu
cd ~/$REMOTE_REPOSITORY
mkdir -p runs
if [ -f runs/launch.pid ] && kill -0 \"\$(cat runs/launch.pid)\" 2>/dev/null; then
  echo \"\$(hostname): a run is active (process \$(cat runs/launch.pid)); end it with stop.sh\" >&2
  exit 1
fi
setsid nohup ~/$REMOTE_ENVIRONMENT/bin/python$(printf ' %q' "${command[@]}") > runs/launch.log 2>&1 < /dev/null &
echo \$! > runs/launch.pid"

$DRY_RUN || cat <<EOF
Started on every worker of $NAME. To follow the first one:
  gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE${PROJECT:+ --project=$PROJECT} --worker=0 --command='tail -n 50 -f $REMOTE_REPOSITORY/runs/launch.log'
EOF
