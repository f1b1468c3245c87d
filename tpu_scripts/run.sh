#!/usr/bin/env bash
# A run from nothing to its end: creates the slice, sets it up, launches, follows, goes on after a preemption, deletes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HOURS=""
PREPARE=""
COMMIT=HEAD
KEEP=false
FAILURES=3
CREATE=()
SET_UP=()
POLL_SECONDS=${POLL_SECONDS:-30}

usage() {
  cat <<EOF
Usage: run.sh --name NAME --zone ZONE --type TYPE --hours HOURS [options] -- LINE --run-dir=FOLDER

LINE is "jaxrl-llm STAGE ARGUMENTS" or "FILE.py ARGUMENTS". Creates the slice if it is not there, sets it up, launches
the line on every worker and shows the first one's output. A slice that is taken away is asked for again, and the run
goes on from its last checkpoint. At the end what the run wrote in ~/$REMOTE_REPOSITORY/runs is fetched, and the slice
is deleted: when the line has ended, failed too often, or the hours are spent (it saves first). The same command again,
after Ctrl-C or from another machine, finds out how far it is.

The run folder has to outlive the slice and be the same for all workers: on a mounted bucket or share. Files that the
line names without a folder at the root (a script, rewards, a configuration) are those of the commit.

  --type TYPE        accelerator type, as for create.sh; so are --runtime, --spot, --reserved and --valid-for
  --hours HOURS      budget: the longest that this command keeps a slice that is there
  --prepare LINE     shell line for every worker of a new slice, after its set-up: mounts the bucket, say
  --failures N       relaunches after a run that failed on a slice that stayed (default $FAILURES)
  --commit, --python as for setup.sh
  --keep             leave the slice, and its costs, at the end
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --hours) HOURS=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --prepare) PREPARE=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --failures) FAILURES=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --keep) KEEP=true; CONSUMED=1 ;;
    --spot | --reserved) CREATE+=("$1"); CONSUMED=1 ;;
    --type | --runtime | --valid-for) CREATE+=("$1" "$(value_of "${@:1:2}")"); CONSUMED=2 ;;
    --commit) COMMIT=$(value_of "${@:1:2}"); SET_UP+=("$1" "$COMMIT"); CONSUMED=2 ;;
    --python) SET_UP+=("$1" "$(value_of "${@:1:2}")"); CONSUMED=2 ;;
  esac
}

say() { printf '%s  %s: %s\n' "$(date +%H:%M:%S)" "$NAME" "$*"; }

# Another script of this folder, on the same slice.
script() {
  local name=$1 options=(--name "$NAME" --zone "$ZONE")
  shift
  [[ -z $PROJECT ]] || options+=(--project "$PROJECT")
  if $DRY_RUN; then options+=(--dry-run); fi
  "$HERE/$name.sh" "${options[@]}" "$@"
}

# What the first worker has of the run: nothing, "running", or its status; "other" while it runs something else.
progress() {
  tpus tpu-vm ssh "$NAME" --worker=0 --command="cd ~/$REMOTE_REPOSITORY/runs 2>/dev/null || exit 0
[ -f launch.pid ] || exit 0
[ \"\$(cat launch.line)\" = $(printf '%q' "$(words "${ARGUMENTS[@]}")") ] && ours=true || ours=false
if kill -0 \"\$(cat launch.pid)\" 2>/dev/null; then \$ours && echo running || echo other
elif \$ours && [ -f launch.status ]; then cat launch.status; fi"
}

follow() {
  tpus tpu-vm ssh "$NAME" --worker=0 --ssh-flag='-o ServerAliveInterval=20' \
    --command="cd ~/$REMOTE_REPOSITORY/runs && tail -n 50 -F --pid=\"\$(cat launch.pid)\" launch.log"
}

spent() { [[ -n $DEADLINE ]] && ((SECONDS >= DEADLINE)); }

# Returns with a slice that is ACTIVE. While there is none the hours stand still.
have_slice() {
  local now away=""
  while true; do
    now=$(state)
    case $now in ACTIVE | UNKNOWN) ;; *) away=${away:-$SECONDS} ;; esac
    case $now in
      ACTIVE) break ;;
      NONE) script create ${CREATE[@]+"${CREATE[@]}"} || finish 1 "there is no slice" ;;
      FAILED | SUSPENDING | SUSPENDED)
        say "is $now: asks for it again"
        script delete --yes || sleep "$POLL_SECONDS"
        ;;
      *) say "$now"; sleep "$POLL_SECONDS" ;;
    esac
  done
  if [[ -z $DEADLINE ]]; then
    DEADLINE=$((SECONDS + BUDGET))
  else
    DEADLINE=$((DEADLINE + SECONDS - ${away:-$SECONDS}))
  fi
}

# Sets up a slice that has nothing of the run, and launches it; a worker may not answer at once.
begin() {
  local attempt
  for attempt in 1 2 3; do
    if script setup ${SET_UP[@]+"${SET_UP[@]}"} && { [[ -z $PREPARE ]] || on_all_workers "$PREPARE"; }; then
      script launch --go-on "$RUN_DIR" -- "${ARGUMENTS[@]}" && return
    fi
    [[ $(state) == ACTIVE ]] || return 0  # taken away meanwhile
    say "could not be set up (attempt $attempt of 3)"
    sleep "$POLL_SECONDS"
  done
  finish 1 "could not be set up"
}

# Shows the output until the run ends, the slice is taken away or the hours are spent.
attend() {
  set -m  # a process group of its own, since gcloud starts ssh
  follow </dev/null &
  FOLLOWER=$!
  set +m
  while kill -0 "$FOLLOWER" 2>/dev/null; do
    sleep "$POLL_SECONDS"
    if spent; then break; fi
    case $(state) in ACTIVE | UNKNOWN) ;; *) break ;; esac
  done
  kill -- "-$FOLLOWER" 2>/dev/null || true
  wait "$FOLLOWER" 2>/dev/null || true
  FOLLOWER=""
}

# Fetches what there is, deletes the slice, and ends with status $1.
finish() {
  local status=$1
  shift
  say "$*"
  if [[ $(state) == ACTIVE ]]; then script fetch || say "nothing could be fetched"; fi
  if $KEEP; then
    say "is kept and costs on; delete.sh ends that"
  elif [[ $(state) != NONE ]]; then
    script delete --yes || die "'$NAME' COULD NOT BE DELETED AND COSTS ON: run delete.sh"
  fi
  exit "$status"
}

leave() {
  trap - INT TERM
  [[ -z $FOLLOWER ]] || kill -- "-$FOLLOWER" 2>/dev/null || true
  printf '\n'
  say "left alone: the slice stays and COSTS ON, the run goes on. The same command attends to it again; delete.sh ends it"
  exit 130
}

parse_options "$@"
for_python ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
[[ $HOURS =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--hours '$HOURS': a number of hours, such as 12 or 0.5"
[[ $FAILURES =~ ^[0-9]+$ ]] || die "--failures '$FAILURES': a whole number"
BUDGET=$(awk "BEGIN { print int($HOURS * 3600) }")
RUN_DIR=$(run_folder "${ARGUMENTS[@]}")
while read -r file; do
  git -C "$HERE/.." cat-file -e "$COMMIT:./$file" 2>/dev/null ||
    die "'$file' is not in commit $COMMIT, which the workers get: commit it, or name one on storage that they share"
done < <(relative_files "${ARGUMENTS[@]}")

if $DRY_RUN; then
  script create ${CREATE[@]+"${CREATE[@]}"}
  script setup ${SET_UP[@]+"${SET_UP[@]}"}
  [[ -z $PREPARE ]] || on_all_workers "$PREPARE"
  script launch --go-on "$RUN_DIR" -- "${ARGUMENTS[@]}"
  follow
  script fetch
  script delete --yes
  exit
fi

# What is wrong with the other scripts' options is said before anything costs.
DRY_RUN=true
script create ${CREATE[@]+"${CREATE[@]}"} >/dev/null
script setup ${SET_UP[@]+"${SET_UP[@]}"} >/dev/null
script launch -- "${ARGUMENTS[@]}" >/dev/null
DRY_RUN=false
[[ $(state) != ACTIVE ]] || script create ${CREATE[@]+"${CREATE[@]}"}  # refuses another type of slice

DEADLINE=""
FOLLOWER=""
trap leave INT TERM
failed=0
while true; do
  have_slice
  if spent; then
    script stop || true
    finish 3 "the $HOURS hours are spent. The same command goes on from the last checkpoint"
  fi
  case $(progress || echo unreachable) in
    "") begin ;;
    running) attend ;;
    other) die "another run is active on '$NAME'; end it with stop.sh, or choose another --name" ;;
    0) finish 0 "the run has ended" ;;
    stopped)
      sleep "$POLL_SECONDS"  # a slice that is being taken away shows it a little later
      sleep "$POLL_SECONDS"
      [[ $(state) != ACTIVE ]] || finish 0 "the run was stopped. The same command goes on from the last checkpoint"
      ;;
    2) finish 2 "the run refuses its settings or data; its last lines say which" ;;
    unreachable) sleep "$POLL_SECONDS" ;;
    *)
      ((failed += 1))
      ((failed <= FAILURES)) || finish 1 "the run failed $failed times"
      say "the run failed; it is launched again ($failed of $FAILURES)"
      script launch --go-on "$RUN_DIR" -- "${ARGUMENTS[@]}" || sleep "$POLL_SECONDS"
      ;;
  esac
done
