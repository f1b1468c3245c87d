# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share. Sourced, never run.
#
# A script that sources this file defines usage() and, in own_option(), its own options; parse_options then
# fills NAME, ZONE, PROJECT, DRY_RUN and ARGUMENTS (what stands after --).

set -euo pipefail

# On a worker: the copied repository, and the Python environment beside it (relative to the home folder).
REMOTE_REPOSITORY=jaxrl_llm
REMOTE_ENVIRONMENT=jaxrl_llm_venv

NAME=""
ZONE=""
PROJECT=""
DRY_RUN=false
ARGUMENTS=()

COMMON_OPTIONS="\
  --name NAME        name of the TPU (and of its queued resource)
  --zone ZONE        its zone, such as us-east5-a
  --project PROJECT  Google Cloud project; gcloud's current one if left out
  --dry-run          print the commands instead of running them
  -h, --help         this text"

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The value of option $1, which is $2 if there is a second argument.
value_of() {
  if (($# < 2)) || [[ $2 == --* ]]; then die "$1 needs a value; see --help"; fi
  printf '%s' "$2"
}

parse_options() {
  while (($# > 0)); do
    case $1 in
      --name) NAME=$(value_of "${@:1:2}"); shift 2 ;;
      --zone) ZONE=$(value_of "${@:1:2}"); shift 2 ;;
      --project) PROJECT=$(value_of "${@:1:2}"); shift 2 ;;
      --dry-run) DRY_RUN=true; shift ;;
      -h | --help) usage; exit 0 ;;
      --) shift; ARGUMENTS=("$@"); break ;;
      *)
        # own_option sets CONSUMED to how many words it took, none if it does not know the first.
        CONSUMED=0
        own_option "$@"
        ((CONSUMED > 0)) || die "unknown argument '$1'; see --help"
        shift "$CONSUMED"
        ;;
    esac
  done
  [[ -n $NAME ]] || die "--name is missing; see --help"
  [[ -n $ZONE ]] || die "--zone is missing; see --help"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "--name '$NAME': lower-case letters, digits and dashes, the first a letter, 63 at most"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$ZONE' is no zone; one looks like us-east5-a"
  $DRY_RUN || command -v gcloud >/dev/null ||
    die "gcloud is not on PATH; install the Google Cloud CLI, or look at the commands with --dry-run"
}

no_arguments() {
  ((${#ARGUMENTS[@]} == 0)) || die "unknown argument '${ARGUMENTS[0]}'; see --help"
}

# Runs a command, or prints it so that a shell could read it back.
run() {
  if $DRY_RUN; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# gcloud compute tpus ... in the TPU's zone and project, never asking a question.
tpus() {
  run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

# Runs one shell line on every worker at once; fails if it fails on any.
on_all_workers() {
  tpus tpu-vm ssh "$NAME" --worker=all --command="$1"
}

# Words as one line that a shell reads back.
words() {
  printf '%q ' "$@"
}

# The folder that --run-dir=/FOLDER among these words names.
run_folder() {
  local word
  for word in "$@"; do
    if [[ $word == --run-dir=/* ]]; then
      printf '%s' "${word#--run-dir=}"
      return
    fi
  done
  die "say --run-dir=/FOLDER after the script, on storage that outlives the slice and all workers share"
}
