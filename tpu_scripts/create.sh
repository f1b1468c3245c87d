#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource and waits until it is there.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TYPE=""
RUNTIME=""
CAPACITY=()
VALID_FOR=""
POLL_SECONDS=${POLL_SECONDS:-30}

usage() {
  cat <<EOF
Usage: create.sh --name NAME --zone ZONE --type TYPE [options]

Requests a TPU slice as a queued resource and returns when it is ACTIVE. Interrupting the wait does not withdraw
the request: run delete.sh for that. Where NAME was asked for before, nothing new is: the same command waits for that.

  --type TYPE        accelerator type: v6e-8, v5litepod-16, v5p-8, v4-8, ...
  --runtime VERSION  TPU software version; by default the one for JAX on that type
  --spot             Spot capacity: cheap, and may be taken away at any time
  --reserved         capacity of your project's reservation
  --valid-for TIME   give up if there is no capacity within TIME, such as 90m or 6h
$COMMON_OPTIONS
EOF
}

own_option() {
  case $1 in
    --type) TYPE=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --runtime) RUNTIME=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --valid-for) VALID_FOR=$(value_of "${@:1:2}"); CONSUMED=2 ;;
    --spot | --reserved) CAPACITY+=("$1"); CONSUMED=1 ;;
  esac
}

runtime_for() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) die "no TPU software version is known for --type '$1'; name one with --runtime" ;;
  esac
}

wait_until_active() {
  local state
  if $DRY_RUN; then
    tpus queued-resources describe "$NAME" '--format=value(state.state)'
    return
  fi
  while true; do
    state=$(tpus queued-resources describe "$NAME" '--format=value(state.state)')
    printf '%s  %s: %s\n' "$(date +%H:%M:%S)" "$NAME" "$state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        die "the request for '$NAME' is $state; the reason: gcloud compute tpus queued-resources describe" \
          "$NAME --zone=$ZONE; then run delete.sh and ask again" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

parse_options "$@"
no_arguments
[[ -n $TYPE ]] || die "--type is missing; see --help"
[[ $TYPE =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] || die "--type '$TYPE' is no accelerator type; one looks like v6e-8"
[[ -n $RUNTIME ]] || RUNTIME=$(runtime_for "$TYPE")
((${#CAPACITY[@]} < 2)) || die "--spot and --reserved exclude each other"
[[ -z $VALID_FOR || $VALID_FOR =~ ^[1-9][0-9]*[smhd]$ ]] ||
  die "--valid-for '$VALID_FOR': a whole number and s, m, h or d, such as 6h"

# Whether there is a request of that name already, of this type.
asked_before() {
  local found type
  if $DRY_RUN; then return 1; fi
  found=$(state)
  if [[ $found == NONE || $found == UNKNOWN ]]; then return 1; fi  # what hinders gcloud it says when it is asked
  type=$(tpus queued-resources describe "$NAME" '--format=value(tpu.nodeSpec[0].node.acceleratorType)')
  [[ -z $type || $type == "$TYPE" ]] ||
    die "'$NAME' is there and is a $type: delete it with delete.sh, or give the $TYPE another --name"
  echo "$NAME was asked for before; nothing new is requested"
}

asked_before || tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" \
  ${CAPACITY[@]+"${CAPACITY[@]}"} ${VALID_FOR:+"--valid-until-duration=$VALID_FOR"}
wait_until_active
