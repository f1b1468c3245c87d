#!/usr/bin/env bash
# Submits a run to a GKE cluster by way of XPK: the way to TPU7x, and to several slices.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CLUSTER=""
TYPE=""
SLICES=1
RESTARTS=50
IMAGE=python:3.12

usage() {
  cat <<EOF
Usage: xpk.sh --cluster CLUSTER --name NAME --zone ZONE --type TYPE [options] -- LINE --run-dir=FOLDER

Submits LINE, "jaxrl-llm STAGE ARGUMENTS" or "FILE.py ARGUMENTS", as workload NAME, with this repository copied into an
image and JAX for TPUs installed when it starts. A workload that is interrupted, or one of whose processes is lost, is
restarted and goes on from its last checkpoint. Where NAME was submitted before and has not ended, nothing new is.
The run folder has to outlive the workload and be the same for all hosts: on storage attached with "xpk storage".

  --cluster CLUSTER  made before: xpk cluster create --cluster=CLUSTER --tpu-type=TYPE --num-slices=N --spot
  --type TYPE        TPU type as XPK names it: tpu7x-128, v6e-256, v5p-128, v5litepod-16, ...
  --slices N         slices, which the run needs --mesh.data=N (or a multiple) for (default $SLICES)
  --restarts N       how often it may be restarted (default $RESTARTS)
  --image IMAGE      what the repository is copied into (default $IMAGE)
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --cluster) CLUSTER=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --type) TYPE=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --slices) SLICES=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --restarts) RESTARTS=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --image) IMAGE=$(value_of "${@:1:2}"); CONSUMED=2 ;;
  esac
}

parse_options "$@"
[[ -n $CLUSTER ]] || die "--cluster is missing; see --help"
[[ $TYPE =~ ^(v[0-9]+[a-z]*|tpu[0-9]+x)-[0-9x]+$ ]] || die "--type '$TYPE' is no TPU type; one looks like tpu7x-128"
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "--slices '$SLICES': a whole number"
[[ $RESTARTS =~ ^[0-9]+$ ]] || die "--restarts '$RESTARTS': a whole number"
for_python ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
folder=$(run_folder "${ARGUMENTS[@]}")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
while read -r file; do
  [[ -e $repository/$file ]] || die "'$file' is not in $repository, which the hosts get; name one on their storage"
done < <(relative_files "${ARGUMENTS[@]}")
$DRY_RUN || command -v xpk >/dev/null || die "xpk is not on PATH; pip install xpk, or look at the command with --dry-run"

# Whether the workload is there in such a state: EVERYTHING, or FINISHED.
there_is() {
  local told
  told=$(xpk workload list --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} \
    --filter-by-job="$NAME" --filter-by-status="$1") || die "xpk cannot list the workloads of '$CLUSTER': $told"
  grep -q "^$NAME " <<<"$told"
}

if ! $DRY_RUN && there_is EVERYTHING; then
  if there_is FINISHED; then
    die "workload '$NAME' has ended; another --name goes on with the same run folder, or this one after:" \
      "xpk workload delete --workload=$NAME --cluster=$CLUSTER --zone=$ZONE${PROJECT:+ --project=$PROJECT}"
  fi
  echo "$NAME was submitted before and has not ended; nothing new is"
  exit
fi

# Runs on the hosts. Status 1 is that of a run that lost a process; XPK restarts for a few others by itself.
command="set -e
pip install --quiet -e '.[train,tpu]'
set -- $(words "${ON_A_HOST[@]}")
$(going_on "$folder")
exec python \"\$@\""
run xpk workload create --cluster="$CLUSTER" --workload="$NAME" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} \
  --tpu-type="$TYPE" --num-slices="$SLICES" --max-restarts="$RESTARTS" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=300 --base-docker-image="$IMAGE" \
  --script-dir="$repository" --command="$command"
